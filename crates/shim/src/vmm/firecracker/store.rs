//! A template's memory and devices: two files in a file system in memory, which is mounted in a mount namespace that
//! no process is in.
//!
//! Firecracker opens both by name, in each clone's jail anew, and a file that has lost its names cannot be mounted
//! there. So these keep their names, but in a place that only the holder of a descriptor of the namespace can reach:
//! on the host there is nothing to be left behind, and all of it is gone with the last descriptor (and the last
//! clone that maps the memory).
//!
//! Nobody writes to a saved template: its file system is made read-only, which the kernel refuses for as long as
//! anybody has a file of it open for writing.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::thread;

use bailey_host::sys::mount::clone_tree;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;

use super::parent::own_mounts;
use super::requests::{DEVICES, MEMORY};
use crate::error::{Context, Error, Result};
use crate::vmm::Saved;

/// A template that is being made.
pub(super) struct Store {
    namespace: File,
    /// Where the file system is mounted in that namespace.
    place: PathBuf,
    memory_bytes: u64,
}

/// Both files, as mounts that are attached nowhere yet.
pub(super) struct Trees {
    pub(super) memory: OwnedFd,
    pub(super) devices: OwnedFd,
}

impl Store {
    /// Makes both files, for `uid` to write.
    pub(super) fn create(place: &Path, uid: u32, memory_bytes: u64) -> Result<(Store, Trees)> {
        let at = place.to_owned();
        let (namespace, trees) = in_thread(move || {
            own_mounts()?;
            let doing = || format!("mounting a file system in memory at {}", at.display());
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("tmpfs"), &at, Some("tmpfs"), flags, Some("size=100%,mode=0700")).context(doing)?;
            for (name, bytes) in [(MEMORY, memory_bytes), (DEVICES, 0)] {
                make(&at.join(name), uid, bytes)?;
            }
            let namespace =
                File::open("/proc/thread-self/ns/mnt").context(|| "opening a namespace".into())?;
            Ok((namespace, trees(&at)?))
        })?;
        Ok((Store { namespace, place: place.to_owned(), memory_bytes }, trees))
    }

    /// Makes them read-only for good. Whoever wrote to them must have ended.
    pub(super) fn protect(&self) -> Result<Saved> {
        let copy = || self.namespace.try_clone().context(|| "copying a descriptor".into());
        let (inside, at, memory_bytes) = (copy()?, self.place.clone(), self.memory_bytes);
        let devices = in_thread(move || {
            enter(inside)?;
            let memory = check(&at.join(MEMORY))?;
            check(&at.join(DEVICES))?;
            if memory != memory_bytes {
                return Err(Error::internal(format!(
                    "Firecracker has saved {memory} bytes of the template's memory, not {memory_bytes}"
                )));
            }
            let flags = MsFlags::MS_REMOUNT
                | MsFlags::MS_RDONLY
                | MsFlags::MS_NOSUID
                | MsFlags::MS_NODEV
                | MsFlags::MS_NOEXEC;
            mount(None::<&str>, &at, None::<&str>, flags, None::<&str>)
                .context(|| "making the template read-only".into())?;
            File::open(at.join(DEVICES)).context(|| "opening the template's devices".into())
        })?;
        Ok(Saved { memory: copy()?, devices })
    }
}

/// What a clone is made from.
pub(super) fn open(saved: Saved, place: &Path) -> Result<Trees> {
    let at = place.to_owned();
    in_thread(move || {
        enter(saved.memory)?;
        trees(&at)
    })
}

/// Does something in a thread of its own, since namespaces belong to threads.
fn in_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = thread::Builder::new().name("template".into()).spawn(work);
    let done = thread.context(|| "starting a thread".into())?.join();
    done.unwrap_or_else(|_| Err(Error::internal("looking after a template ended in a panic")))
}

fn enter(namespace: File) -> Result<()> {
    // A thread that shares its working directory with others may not change its mount namespace.
    unshare(CloneFlags::CLONE_FS)
        .and_then(|()| setns(namespace, CloneFlags::CLONE_NEWNS))
        .context(|| "entering the template's mount namespace".into())
}

fn make(path: &Path, uid: u32, bytes: u64) -> Result<()> {
    let doing = || format!("making the template's {}", path.display());
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).context(doing)?;
    if bytes > 0 {
        // All of it now, so that it is not on the account of the VMM, which has the same again as the guest's memory.
        let bytes = bytes.try_into().context(doing)?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes).context(doing)?;
    }
    fchown(&file, Some(uid), Some(uid)).context(doing)
}

fn trees(at: &Path) -> Result<Trees> {
    let tree = |name: &str| {
        let path = at.join(name);
        let doing = || format!("opening the template's {name}");
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = nix::fcntl::open(&path, flags, Mode::empty()).context(doing)?;
        clone_tree(file.as_fd(), false).context(doing)
    };
    Ok(Trees { memory: tree(MEMORY)?, devices: tree(DEVICES)? })
}

/// Makes a file root's, for all to read; gives its size. Who wrote to it had no way to its name.
fn check(path: &Path) -> Result<u64> {
    let doing = || format!("taking the template's {}", path.display());
    std::os::unix::fs::lchown(path, Some(0), Some(0)).context(doing)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o444)).context(doing)?;
    fs::symlink_metadata(path).map(|metadata| metadata.size()).context(doing)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_template_is_written_once_and_leaves_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let (store, trees) = Store::create(folder.path(), 4711, 1 << 20).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "the host sees none of it");
        let memory = format!("/proc/self/fd/{}", trees.memory.as_raw_fd());
        fs::OpenOptions::new().write(true).open(&memory).unwrap();
        let writer = fs::OpenOptions::new().write(true).open(&memory).unwrap();
        let error = store.protect().unwrap_err().chain();
        assert!(error.contains("read-only"), "somebody can write to it still: {error}");
        drop(writer);
        let saved = store.protect().unwrap();
        drop((store, trees));

        let again = saved.memory.try_clone().unwrap();
        let devices = saved.devices.try_clone().unwrap();
        let clone = open(Saved { memory: again, devices }, folder.path()).unwrap();
        let memory = format!("/proc/self/fd/{}", clone.memory.as_raw_fd());
        assert_eq!(fs::metadata(&memory).unwrap().len(), 1 << 20);
        assert!(fs::OpenOptions::new().write(true).open(&memory).is_err());
        assert_eq!(fs::metadata(&memory).unwrap().uid(), 0);
        // As a descriptor that was handed over is opened anew.
        File::open(format!("/proc/self/fd/{}", saved.devices.as_raw_fd())).unwrap();
    }

    #[test]
    fn a_template_whose_memory_is_of_another_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (store, trees) = Store::create(folder.path(), 4711, 1 << 20).unwrap();
        let memory = format!("/proc/self/fd/{}", trees.memory.as_raw_fd());
        File::options().write(true).open(memory).unwrap().set_len(5).unwrap();
        assert!(store.protect().unwrap_err().chain().contains("saved 5 bytes"));
    }
}
