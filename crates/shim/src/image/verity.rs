//! A dm-verity hash tree, appended to the data that it covers.
//!
//! The format is the kernel's (`admin-guide/device-mapper/verity.rst`): version 1, SHA-256 of salt and block, blocks
//! of 4,096 bytes, each level padded to whole blocks, the root's level first. No superblock: what it would say goes
//! to the guest over the channel, which is where trust in it comes from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

/// Bytes in a block, of data and of hashes.
const BLOCK: usize = 4096;
const DIGEST: usize = 32;

/// A tree that was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tree {
    pub(super) data_blocks: u64,
    pub(super) root_hash: [u8; DIGEST],
}

/// Pads the file to whole blocks and appends its tree.
pub(super) fn append(file: &File, salt: [u8; 32]) -> io::Result<Tree> {
    let data_blocks = file.metadata()?.len().div_ceil(BLOCK as u64).max(1);
    file.set_len(data_blocks * BLOCK as u64)?;
    let mut levels = vec![hash_file(file, data_blocks, &salt)?];
    while levels.last().is_some_and(|level| level.len() > BLOCK) {
        let below = levels.last().map(Vec::as_slice).unwrap_or_default();
        levels.push(pad(below.chunks(BLOCK).flat_map(|block| digest(&salt, block)).collect()));
    }
    if data_blocks == 1 {
        // The root is the hash of the only block: there is no level between.
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, 0)?;
        return Ok(Tree { data_blocks, root_hash: digest(&salt, &block) });
    }
    let root_hash = levels.last().map(|top| digest(&salt, top)).unwrap_or_default();
    let mut at = data_blocks * BLOCK as u64;
    for level in levels.iter().rev() {
        file.write_all_at(level, at)?;
        at += level.len() as u64;
    }
    Ok(Tree { data_blocks, root_hash })
}

fn hash_file(file: &File, blocks: u64, salt: &[u8]) -> io::Result<Vec<u8>> {
    const BATCH: u64 = 256;
    let mut hashes = Vec::new();
    let mut buffer = vec![0; usize::try_from(BATCH).unwrap_or(1) * BLOCK];
    let mut block = 0;
    while block < blocks {
        let count = usize::try_from(BATCH.min(blocks - block)).unwrap_or(1);
        let bytes = &mut buffer[..count * BLOCK];
        file.read_exact_at(bytes, block * BLOCK as u64)?;
        hashes.extend(bytes.chunks(BLOCK).flat_map(|block| digest(salt, block)));
        block += count as u64;
    }
    Ok(pad(hashes))
}

fn pad(mut hashes: Vec<u8>) -> Vec<u8> {
    hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
    hashes
}

fn digest(salt: &[u8], block: &[u8]) -> [u8; DIGEST] {
    Sha256::new().chain_update(salt).chain_update(block).finalize().into()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The reference program must find the tree right, and wrong once a byte of the data is another.
    #[test]
    fn veritysetup_agrees() {
        for blocks in [1_u64, 127, 128, 129, 20_000] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("image");
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
            let data: Vec<u8> = (0..blocks * BLOCK as u64 - 5).map(|n| (n * n % 251) as u8).collect();
            file.write_all_at(&data, 0).unwrap();
            let tree = append(&file, [7; 32]).unwrap();
            assert_eq!(tree.data_blocks, blocks);
            assert!(veritysetup(&path, &tree), "{blocks} blocks");
            file.write_all_at(b"!", data.len() as u64 / 2).unwrap();
            assert!(!veritysetup(&path, &tree), "{blocks} blocks, one flipped");
        }
    }

    fn veritysetup(path: &std::path::Path, tree: &Tree) -> bool {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        Command::new("veritysetup")
            .args(["verify", "--no-superblock", "--hash=sha256", "--data-block-size=4096"])
            .args(["--hash-block-size=4096".into(), format!("--data-blocks={}", tree.data_blocks)])
            .args([format!("--hash-offset={}", tree.data_blocks * 4096), format!("--salt={}", hex(&[7; 32]))])
            .args([path, path])
            .arg(hex(&tree.root_hash))
            .status()
            .expect("veritysetup, of Debian's package cryptsetup-bin")
            .success()
    }
}
