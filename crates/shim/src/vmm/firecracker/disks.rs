//! Disks by name: Firecracker opens a disk by its name in the jail, and all that the driver is given is an open file.
//!
//! A file that has a name is mounted into the jail by its descriptor. One without gets a name for the few
//! milliseconds that mounting takes, in a folder of root's alone; what a killed shim may leave there, the next one
//! removes. One that has lost its name for good can get no other: it is copied.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use bailey_host::jail::path::open_root_owned_dir;
use bailey_host::sys::mount::clone_tree;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::linkat;

use crate::error::{Context, Error, Result};

/// Names that are given for as long as this lives. One shim at a time gives names.
pub(super) struct Names {
    folder: PathBuf,
    given: Vec<PathBuf>,
    _one_at_a_time: Flock<OwnedFd>,
}

impl Drop for Names {
    fn drop(&mut self) {
        for name in &self.given {
            if let Err(error) = fs::remove_file(name) {
                tracing::warn!("removing {}: {error}", name.display());
            }
        }
    }
}

impl Names {
    /// Waits for the folder, and clears it.
    pub(super) fn take(folder: &Path) -> Result<Names> {
        let doing = || format!("locking {}", folder.display());
        make_folder(folder)?;
        let opened = File::open(folder).context(doing)?;
        let lock = Flock::lock(opened.into(), FlockArg::LockExclusive);
        let lock = lock.map_err(|(_, errno)| errno).context(doing)?;
        for entry in fs::read_dir(folder).context(doing)? {
            let path = entry.context(doing)?.path();
            fs::remove_file(&path).context(|| format!("removing {}", path.display()))?;
        }
        Ok(Names { folder: folder.to_owned(), given: Vec::new(), _one_at_a_time: lock })
    }

    /// A disk as a mount that is attached nowhere yet, and must be attached while the names live.
    pub(super) fn tree(&mut self, disk: &File) -> Result<OwnedFd> {
        let doing = || "opening a disk for Firecracker".to_owned();
        if disk.metadata().context(doing)?.nlink() > 0 {
            return clone_tree(disk.as_fd(), false).context(doing);
        }
        let name = self.folder.join(format!("{}-{}", std::process::id(), self.given.len()));
        let from = format!("/proc/self/fd/{}", disk.as_raw_fd());
        linkat(AT_FDCWD, from.as_str(), AT_FDCWD, &name, AtFlags::AT_SYMLINK_FOLLOW).context(doing)?;
        self.given.push(name.clone());
        // By its new name: the descriptor remembers that the file had none.
        tree_at(&name)
    }
}

/// Gives the scratch disk, which has never had a name, to the VMM's user.
pub(super) fn scratch(disk: &File, uid: u32) -> Result<()> {
    fchown(disk, Some(uid), Some(uid)).context(|| "giving the scratch disk to Firecracker".into())
}

/// The image's disk: itself, or a copy that can be given a name, in `folder`'s file system.
pub(super) fn image(disk: File, folder: &Path) -> Result<File> {
    let metadata = disk.metadata().context(|| "reading the image's disk".into())?;
    readable(&metadata, "the image's disk")?;
    if metadata.nlink() > 0 {
        return Ok(disk);
    }
    let doing = || format!("copying the image's disk, which has lost its name, to {}", folder.display());
    let copy = OpenOptions::new().write(true).mode(0o444).custom_flags(libc::O_TMPFILE).open(folder);
    let mut copy = copy.context(doing)?;
    // Opened anew, to read from its start wherever others read.
    let from = File::open(format!("/proc/self/fd/{}", disk.as_raw_fd()));
    std::io::copy(&mut from.context(doing)?, &mut copy).context(doing)?;
    Ok(copy)
}

/// A file that is there by name, for all to read, as a mount that is attached nowhere yet.
pub(super) fn named(path: &Path) -> Result<OwnedFd> {
    let metadata = fs::metadata(path).context(|| format!("reading {}", path.display()))?;
    readable(&metadata, &path.display().to_string())?;
    tree_at(path)
}

fn tree_at(path: &Path) -> Result<OwnedFd> {
    let doing = || format!("opening {}", path.display());
    let opened = nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).context(doing)?;
    clone_tree(opened.as_fd(), false).context(doing)
}

/// Makes a folder that is root's alone, and makes sure that nobody else could have had a hand in it.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    let doing = || format!("making {}", folder.display());
    if let Some(above) = folder.parent() {
        fs::create_dir_all(above).context(doing)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error).context(doing),
        _ => {}
    }
    open_root_owned_dir(folder).map(drop).context(|| {
        format!(
            "{} and all folders above it must belong to root and be writable to root alone",
            folder.display()
        )
    })
}

/// The VMM's user is nobody's friend: what it reads, all may read.
fn readable(metadata: &fs::Metadata, what: &str) -> Result<()> {
    if metadata.mode() & 0o004 != 0 {
        return Ok(());
    }
    Err(Error::internal(format!(
        "{what} is not readable for all, and so not for Firecracker: make it so with chmod o+r"
    )))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn folder() -> tempfile::TempDir {
        // Not in /tmp, which everybody may write to.
        tempfile::tempdir_in("/var/lib").unwrap()
    }

    fn read(tree: &OwnedFd) -> String {
        let mut text = String::new();
        let mut file = File::open(format!("/proc/self/fd/{}", tree.as_raw_fd())).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn disks_with_and_without_names_get_none_that_stays() {
        let folder = folder();
        let named = folder.path().join("named");
        fs::write(&named, "named").unwrap();
        let named = image(File::open(named).unwrap(), folder.path()).unwrap();
        let lost = folder.path().join("lost");
        fs::write(&lost, "lost").unwrap();
        let open = File::open(&lost).unwrap();
        fs::remove_file(&lost).unwrap();
        let lost = image(open, folder.path()).unwrap();
        let mut never = OpenOptions::new();
        never.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        let mut never = never.open(folder.path()).unwrap();
        never.write_all(b"never").unwrap();
        scratch(&never, 4711).unwrap();
        assert_eq!(never.metadata().unwrap().uid(), 4711);

        let names = folder.path().join("names");
        let mut given = Names::take(&names).unwrap();
        let trees = [&named, &lost, &never].map(|disk| given.tree(disk).unwrap());
        assert_eq!(trees.each_ref().map(read), ["named", "lost", "never"]);
        assert_eq!(fs::read_dir(&names).unwrap().count(), 2);
        drop(given);
        assert_eq!(fs::read_dir(&names).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_shim_left_is_removed() {
        let folder = folder();
        let names = folder.path().join("names");
        make_folder(&names).unwrap();
        fs::write(names.join("1-0"), "left").unwrap();
        let _given = Names::take(&names).unwrap();
        assert_eq!(fs::read_dir(&names).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_that_not_all_may_read_is_refused_with_the_remedy() {
        let folder = folder();
        let path = folder.path().join("image");
        fs::write(&path, "secret").unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let error = image(File::open(&path).unwrap(), folder.path()).unwrap_err().chain();
        assert!(error.contains("chmod o+r"), "{error}");
        assert!(named(&path).unwrap_err().chain().contains("chmod o+r"));
    }

    #[test]
    fn a_folder_that_others_can_change_is_refused() {
        let folder = folder();
        let open = folder.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(make_folder(&open.join("names")).unwrap_err().chain().contains("root alone"));
        fs::create_dir(folder.path().join("true")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("true"), folder.path().join("link")).unwrap();
        assert!(make_folder(&folder.path().join("link")).is_err());
    }
}
