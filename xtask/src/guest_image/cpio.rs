//! A writer of "newc" cpio archives, the format of an initramfs. Same input, same bytes; device nodes need no root.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;

enum Entry {
    Directory,
    CharacterDevice { major: u32, minor: u32 },
    File { mode: u32, content: Vec<u8> },
}

/// An archive in memory. Entries are kept sorted, so that folders come before what is in them.
#[derive(Default)]
pub(super) struct Archive(BTreeMap<String, Entry>);

impl Archive {
    pub(super) fn directory(&mut self, path: &str) {
        self.0.insert(path.to_owned(), Entry::Directory);
    }

    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.0.insert(path.to_owned(), Entry::CharacterDevice { major, minor });
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        self.0.insert(path.to_owned(), Entry::File { mode, content });
    }

    /// The archive's bytes: owner root, time 0, inode numbers in order.
    pub(super) fn write(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for (inode, (path, entry)) in (1u32..).zip(&self.0) {
            let (mode, device, content): (u32, (u32, u32), &[u8]) = match entry {
                Entry::Directory => (DIRECTORY | 0o755, (0, 0), &[]),
                Entry::CharacterDevice { major, minor } => (CHARACTER_DEVICE | 0o600, (*major, *minor), &[]),
                Entry::File { mode, content } => (REGULAR | mode, (0, 0), content),
            };
            let links = if matches!(entry, Entry::Directory) { 2 } else { 1 };
            header(&mut out, path, inode, mode, links, device, content)?;
        }
        header(&mut out, "TRAILER!!!", 0, 0, 1, (0, 0), &[])?;
        Ok(out)
    }
}

fn header(
    out: &mut Vec<u8>,
    path: &str,
    inode: u32,
    mode: u32,
    links: u32,
    (major, minor): (u32, u32),
    content: &[u8],
) -> Result<()> {
    let size = u32::try_from(content.len()).with_context(|| format!("packing {path}: it is too large"))?;
    let name_size =
        u32::try_from(path.len() + 1).with_context(|| format!("packing {path}: name too long"))?;
    out.extend_from_slice(b"070701");
    // inode, mode, uid, gid, links, mtime, size, device of the file system, device, length of the name, checksum
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(content);
    pad(out);
    Ok(())
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_lists_what_was_packed() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"hello".to_vec());
        archive.character_device("dev/console", 5, 1);
        archive.directory("dev");
        let bytes = archive.write().unwrap();
        let mut list = crate::tool::command("cpio");
        let listing =
            crate::tool::filter(list.args(["-itv", "--numeric-uid-gid", "--quiet"]), bytes).unwrap();
        let listing = String::from_utf8(listing).unwrap();
        let words: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words.len(), 3, "{listing}");
        assert_eq!((words[0][0], words[0].last()), ("drwxr-xr-x", Some(&"dev")));
        assert_eq!((words[1][0], words[1][4], words[1][5]), ("crw-------", "5,", "1"));
        assert_eq!((words[2][0], words[2][4], words[2].last()), ("-rwxr-xr-x", "5", Some(&"init")));
    }
}
