//! The scratch disk on the host: a file without a name, which the guest encrypts with a key of its own.
//!
//! Its space is reserved in the filesystem when it is made, so that the host promises no more than it has; and since
//! the reservation is the file's, it goes with the file, without books that a crash could leave wrong.
//!
//! The host never sees that key, so all that it stores is noise; and since the file has no name, it is gone with the
//! VMM, however that ends. An empty filesystem is made here, where its tools are: its few blocks go to the guest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use bailey_types::guest::message::{decode, encode};
use bailey_types::guest::spec::{Extent, Scratch};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek};

use crate::error::{Context, Error, Kind, Result};

/// Largest run of a filesystem's blocks that is sent as one, in bytes.
const EXTENT_MAX: usize = 1 << 20;
const BLOCK: usize = 4096;

/// Makes the file behind a scratch disk of so many bytes. One part in `overcommit` of it is reserved: all of it with 1.
pub(crate) fn create(cache: &Path, bytes: u64, overcommit: u32) -> Result<File> {
    let doing = || format!("making a scratch disk of {bytes} bytes in {}", cache.display());
    let file =
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(cache);
    let file = file.context_as(Kind::Unavailable, doing)?;
    file.set_len(bytes).context_as(Kind::Unavailable, doing)?;
    let reserved = bytes.div_ceil(overcommit.into());
    let free = statvfs(cache).context(|| format!("asking for the free space of {}", cache.display()))?;
    let free = free.blocks_available() * free.fragment_size();
    // Some filesystems would first take all that is free, and give it back only when they have found it too little.
    let done = if reserved > free {
        Err(nix::Error::ENOSPC)
    } else {
        fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, reserved.cast_signed())
    };
    done.map_err(|errno| not_reserved(cache, bytes, reserved, free, errno))?;
    Ok(file)
}

fn not_reserved(cache: &Path, bytes: u64, reserved: u64, free: u64, errno: nix::Error) -> Error {
    let (bytes, reserved, free) = (in_words(bytes), in_words(reserved), in_words(free));
    let mut text = format!("reserving {reserved} for a scratch disk of {bytes} in {}", cache.display());
    if errno == nix::Error::ENOSPC {
        text.push_str(&format!(
            ", where {free} are free: ask for a smaller one (the annotation dev.bailey.scratch, or scratch in the \
             shim's settings), make room, or let the host promise more than it has (scratch_overcommit)"
        ));
    }
    Error::new(Kind::Unavailable, text).because(errno)
}

fn in_words(bytes: u64) -> String {
    format!("{bytes} bytes ({} MiB)", bytes >> 20)
}

/// The blocks of an empty filesystem of so many bytes: made once for each size, and kept.
pub(crate) fn filesystem(cache: &Path, bytes: u64) -> Result<Scratch> {
    let folder = cache.join("filesystems");
    fs::create_dir_all(&folder).context(|| format!("making {}", folder.display()))?;
    let kept = folder.join(format!("ext4-{bytes}"));
    if let Ok(found) = fs::read(&kept)
        && let Ok(scratch) = decode::<Scratch>(&found)
        && scratch.bytes == bytes
    {
        return Ok(scratch);
    }
    let scratch = Scratch { bytes, filesystem: format(&folder, bytes)? };
    let new = folder.join(format!("ext4-{bytes}.{}", std::process::id()));
    fs::write(&new, encode(&scratch)).context(|| format!("writing {}", new.display()))?;
    fs::rename(&new, &kept).context(|| format!("naming {}", kept.display()))?;
    Ok(scratch)
}

fn format(folder: &Path, bytes: u64) -> Result<Vec<Extent>> {
    let path = folder.join(format!("mkfs-{bytes}.{}", std::process::id()));
    let doing = || format!("formatting an empty filesystem, {}", path.display());
    let result =
        File::options().read(true).write(true).create_new(true).open(&path).context(doing).and_then(|file| {
            file.set_len(bytes).context(doing)?;
            run_mkfs(&path)?;
            extents(&file).context(doing)
        });
    // What is needed of it has been read; a failure to make it is told above.
    let _absent = fs::remove_file(&path);
    result
}

fn run_mkfs(path: &Path) -> Result<()> {
    // No journal and no checksums of metadata: nothing of it outlives the VM. Inode tables are left unwritten, which
    // the group descriptors' checksums (uninit_bg) make safe.
    let output = Command::new("mke2fs")
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        // Zeros are written, not left out: on the guest's disk, what is left out is noise.
        .env("UNIX_IO_NOZEROOUT", "1")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "scratch"])
        .args(["-O", "^has_journal,^metadata_csum,^resize_inode,uninit_bg,sparse_super2"])
        .args(["-E", "nodiscard,lazy_itable_init=1,num_backup_sb=0,root_owner=0:0"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::internal("running mke2fs, of Debian's package e2fsprogs").because(error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::internal(format!("mke2fs ended with {}: {}", output.status, said.trim())))
}

/// What of the file was written: runs of blocks, zeros at their ends told by their number alone.
fn extents(file: &File) -> io::Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::Error::ENXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        let end = lseek(file, start, Whence::SeekHole)?;
        let mut offset = start.cast_unsigned();
        while offset < end.cast_unsigned() {
            let mut block = [0; BLOCK];
            let count = read_block(file, &mut block, offset)?;
            append(&mut extents, offset, &block[..count]);
            offset += BLOCK as u64;
        }
        at = end;
    }
}

/// Adds a block that follows, or does not.
fn append(extents: &mut Vec<Extent>, offset: u64, block: &[u8]) {
    let zero = block.iter().all(|byte| *byte == 0);
    let follows = extents.last_mut().filter(|last| last.end() == offset);
    match follows {
        Some(last) if zero => last.zeros += block.len() as u64,
        Some(last) if last.zeros == 0 && last.data.len() < EXTENT_MAX => last.data.extend_from_slice(block),
        _ if zero => extents.push(Extent { offset, data: Vec::new(), zeros: block.len() as u64 }),
        _ => extents.push(Extent { offset, data: block.to_vec(), zeros: 0 }),
    }
}

fn read_block(file: &File, block: &mut [u8; BLOCK], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(block, offset) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    /// The blocks that are sent are, on a disk full of noise, a filesystem that its own checker finds clean.
    #[test]
    fn an_empty_filesystem_survives_being_sent_in_parts() {
        let cache = tempfile::tempdir().unwrap();
        for bytes in [4 << 20, 64 << 20, 1_u64 << 30] {
            let scratch = filesystem(cache.path(), bytes).unwrap();
            assert_eq!(filesystem(cache.path(), bytes).unwrap(), scratch, "kept");

            let path = cache.path().join("copy");
            let file = File::options().write(true).create(true).truncate(true).open(&path).unwrap();
            let noise = vec![0xa5; 4 << 20];
            for at in (0..bytes).step_by(noise.len()) {
                file.write_all_at(&noise, at).unwrap();
            }
            for extent in &scratch.filesystem {
                file.write_all_at(&extent.data, extent.offset).unwrap();
                let zeros = vec![0; usize::try_from(extent.zeros).unwrap()];
                file.write_all_at(&zeros, extent.offset + extent.data.len() as u64).unwrap();
            }
            let output = Command::new("e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
            assert!(output.status.success(), "{bytes}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }

    #[test]
    fn what_is_sent_is_little_even_for_a_large_disk() {
        let cache = tempfile::tempdir().unwrap();
        let scratch = filesystem(cache.path(), 100 << 30).unwrap();
        let sent: usize = scratch.filesystem.iter().map(|extent| extent.data.len()).sum();
        let written: u64 = scratch.filesystem.iter().map(|extent| extent.end() - extent.offset).sum();
        assert!(sent < 1 << 20, "{sent} bytes");
        assert!(written < 16 << 20, "{written} bytes, zeros included");
    }

    #[test]
    fn a_scratch_disk_has_no_name() {
        let cache = tempfile::tempdir().unwrap();
        let file = create(cache.path(), 1 << 20, 1).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    #[test]
    fn its_space_is_reserved_as_far_as_the_settings_say() {
        let cache = tempfile::tempdir().unwrap();
        for (overcommit, reserved) in [(1, 8 << 20), (4, 2 << 20), (u32::MAX, 4096)] {
            let file = create(cache.path(), 8 << 20, overcommit).unwrap();
            let about = file.metadata().unwrap();
            assert_eq!((about.len(), about.blocks() * 512), (8 << 20, reserved), "{overcommit}");
        }
    }

    #[test]
    fn more_than_there_is_is_refused_with_sizes_and_a_remedy() {
        let cache = tempfile::tempdir().unwrap();
        let error = create(cache.path(), 8 << 40, 1).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        for word in ["8796093022208 bytes (8388608 MiB)", "are free", "scratch_overcommit"] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
