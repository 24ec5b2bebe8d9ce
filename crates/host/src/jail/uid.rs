//! User ids for jails: each leased for as long as its holder lives.
//!
//! A lease is a lock on one byte of one file, held by an open file description: when the holder ends, however it
//! ends, the kernel drops the lock. So nothing can leak and nothing needs cleaning up. The file's contents are the
//! place where the next search starts: an id that was just given back is the last one to be given out again.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};

use super::path::{self, PathError};

/// Why no id was leased.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// The range is empty or has root's id in it.
    #[error("the range of user ids {0:?} is empty or has root's in it")]
    Range(Range<u32>),
    /// Every id of the range is in use.
    #[error("all {0} user ids for jails are in use")]
    Exhausted(usize),
    /// The lock file's directory can be changed by others.
    #[error("trust the directory of the file that holds the leases of user ids")]
    Untrusted(#[source] PathError),
    /// The lock file could not be used.
    #[error("{what} {path}, which holds the leases of user ids")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// A user id that is this process's until the value is dropped or the process ends.
#[derive(Debug)]
pub struct UidLease {
    uid: u32,
    _lock: File,
}

impl UidLease {
    /// The id.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }
}

/// The byte whose lock guards the file's contents: beyond every id.
const CURSOR_LOCK: i64 = 1 << 40;

/// Leases a user id of `range` that no other holder of a lease in `lockfile` has.
///
/// # Errors
/// See [`UidError`].
pub fn lease(range: Range<u32>, lockfile: &Path) -> Result<UidLease, UidError> {
    if range.is_empty() || range.contains(&0) {
        return Err(UidError::Range(range));
    }
    let failed = |what| move |source| UidError::File { what, path: lockfile.to_owned(), source };
    let file = open_lockfile(lockfile)?;
    lock(&file, CURSOR_LOCK, true).map_err(failed("lock"))?;
    let mut cursor = [0_u8; 4];
    let known = file.read_at(&mut cursor, 0).map_err(failed("read"))? == cursor.len();
    let start =
        Some(u32::from_le_bytes(cursor)).filter(|id| known && range.contains(id)).unwrap_or(range.start);
    for uid in (start..range.end).chain(range.start..start) {
        match lock(&file, i64::from(uid), false) {
            Ok(()) => {
                file.write_all_at(&(uid + 1).to_le_bytes(), 0).map_err(failed("write"))?;
                unlock(&file, CURSOR_LOCK).map_err(failed("unlock"))?;
                return Ok(UidLease { uid, _lock: file });
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(failed("lock")(e)),
        }
    }
    Err(UidError::Exhausted(range.len()))
}

fn open_lockfile(lockfile: &Path) -> Result<File, UidError> {
    let parent = lockfile.parent().unwrap_or(Path::new("/"));
    path::open_root_owned_dir(parent).map_err(UidError::Untrusted)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(lockfile)
        .map_err(|source| UidError::File { what: "open", path: lockfile.to_owned(), source })
}

fn lock(file: &File, byte: i64, wait: bool) -> io::Result<()> {
    let range = byte_range(byte, libc::F_WRLCK);
    fcntl(file, if wait { FcntlArg::F_OFD_SETLKW(&range) } else { FcntlArg::F_OFD_SETLK(&range) })?;
    Ok(())
}

fn unlock(file: &File, byte: i64) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&byte_range(byte, libc::F_UNLCK)))?;
    Ok(())
}

fn byte_range(byte: i64, kind: libc::c_int) -> libc::flock {
    // The kernel's constants for the kind of a lock are 0 to 2.
    let l_type = libc::c_short::try_from(kind).unwrap_or_default();
    let l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::{UidError, lease};

    fn folder() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("bailey-uid-").tempdir_in("/run").unwrap()
    }

    #[test]
    fn gives_each_holder_another_id_and_a_freed_one_last() {
        let folder = folder();
        let file = folder.path().join("uids");
        let first = lease(10..13, &file).unwrap();
        let second = lease(10..13, &file).unwrap();
        assert_eq!((first.uid(), second.uid()), (10, 11));
        drop(first);
        assert_eq!(lease(10..13, &file).unwrap().uid(), 12, "not the one that was just given back");
    }

    #[test]
    fn says_when_all_are_taken_and_recovers() {
        let folder = folder();
        let file = folder.path().join("uids");
        let held: Vec<_> = (0..3).map(|_| lease(10..13, &file).unwrap()).collect();
        assert!(matches!(lease(10..13, &file), Err(UidError::Exhausted(3))));
        drop(held);
        lease(10..13, &file).unwrap();
    }

    #[test]
    fn never_leases_root() {
        let folder = folder();
        assert!(matches!(lease(0..5, &folder.path().join("uids")), Err(UidError::Range(_))));
    }

    #[test]
    fn refuses_a_folder_that_others_can_write_to() {
        assert!(matches!(lease(10..13, "/tmp/uids".as_ref()), Err(UidError::Untrusted(_))));
    }
}
