//! Which block device a file is on, as the kernel's limits of I/O name devices.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::stat::{major, minor};

/// A whole disk, by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    major: u64,
    minor: u64,
}

impl std::fmt::Display for Disk {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}", self.major, self.minor)
    }
}

impl Disk {
    /// The disk that a file or folder is on. None where its filesystem is on no single one: in memory, over the network,
    /// or over several.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Option<Disk>> {
        let device = fs::metadata(path)?.dev();
        let folder = format!("/sys/dev/block/{}:{}", major(device), minor(device));
        let folder = Path::new(&folder);
        let Ok(real) = folder.canonicalize() else { return Ok(None) };
        // Limits are for whole disks; a partition's folder is in its disk's.
        let whole = if real.join("partition").exists() { real.parent().unwrap_or(&real) } else { &real };
        let numbers = fs::read_to_string(whole.join("dev"))?;
        let parsed = numbers
            .trim()
            .split_once(':')
            .and_then(|(major, minor)| Some(Disk { major: major.parse().ok()?, minor: minor.parse().ok()? }));
        parsed.map(Some).ok_or_else(|| io::Error::other(format!("{numbers:?} are no numbers of a device")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_memory_is_on_no_disk() {
        assert_eq!(Disk::of(Path::new("/proc")).unwrap(), None);
        assert_eq!(Disk::of(Path::new("/dev/shm")).unwrap(), None);
        assert!(Disk::of(Path::new("/no such file")).is_err());
    }

    #[test]
    fn a_disk_that_is_found_is_a_whole_one() {
        let Some(disk) = Disk::of(Path::new("/")).unwrap() else { return };
        let folder = format!("/sys/dev/block/{disk}");
        assert!(Path::new(&folder).exists());
        assert!(!Path::new(&folder).join("partition").exists());
    }
}
