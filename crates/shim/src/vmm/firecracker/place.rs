//! The jail's place: a file system in memory, in a mount namespace of Firecracker's own, with all that it opens.
//!
//! Fresh, root's, and seen by no other process, when the jailer comes to copy Firecracker into it: so nobody can have
//! put a link in the jailer's way (CVE-2026-1386). It is not on the host, so it cannot be left behind there: it ends
//! with the processes in it, whether they were dropped, failed, or were killed along with the shim.

use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bailey_host::sys::mount::{attach, set_attributes};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, fstat};
use tokio::net::UnixStream;

use super::disks::Names;
use super::parent::own_mounts;
use super::requests::{ROOT, SCRATCH};
use crate::error::{Context, Error, Result};
use crate::vmm::DISK_MAX;

/// Room for Firecracker's program, which the jailer copies, and for its sockets; on the account of its cgroup.
const OPTIONS: &str = "size=64m,nr_inodes=256,mode=0755";

/// Pause between looks for a socket that is not there yet.
const PAUSE: Duration = Duration::from_millis(2);

/// A file that the jail gets to see.
pub(super) struct Bind {
    pub(super) tree: OwnedFd,
    pub(super) name: &'static str,
    pub(super) writable: bool,
}

/// What a place is made of.
pub(super) struct Place {
    /// An empty folder of root's, where the file system is mounted.
    pub(super) base: PathBuf,
    /// The jail's root below it, as the jailer will have it.
    pub(super) root: PathBuf,
    pub(super) uid: u32,
    pub(super) binds: Vec<Bind>,
    /// Whether disks that hold nothing stand in for the real ones.
    pub(super) stand_ins: bool,
    /// Names that must live until the files are mounted.
    pub(super) names: Option<Names>,
}

/// The jail's root, seen from outside.
pub(super) struct Root {
    folder: OwnedFd,
    uid: u32,
}

impl Place {
    /// Makes the place, in the calling thread's new mount namespace.
    pub(super) fn make(self) -> Result<Root> {
        let doing = || format!("making Firecracker's jail at {}", self.base.display());
        own_mounts()?;
        let flags = MsFlags::MS_NOSUID;
        mount(Some("tmpfs"), &self.base, Some("tmpfs"), flags, Some(OPTIONS)).context(doing)?;
        DirBuilder::new().recursive(true).mode(0o755).create(&self.root).context(doing)?;
        for bind in self.binds {
            let target = self.root.join(bind.name);
            let doing = || format!("mounting {} in Firecracker's jail", bind.name);
            let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
            if !bind.writable {
                attributes |= libc::MOUNT_ATTR_RDONLY;
            }
            set_attributes(bind.tree.as_fd(), attributes).context(doing)?;
            let target = File::create_new(target).context(doing)?;
            attach(bind.tree, target).context(doing)?;
        }
        drop(self.names);
        if self.stand_ins {
            stand_in(&self.root.join(ROOT), None)?;
            stand_in(&self.root.join(SCRATCH), Some(self.uid))?;
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = nix::fcntl::open(&self.root, flags, Mode::empty()).context(doing)?;
        Ok(Root { folder, uid: self.uid })
    }
}

/// A disk that holds nothing, and takes no room for that.
fn stand_in(path: &Path, writer: Option<u32>) -> Result<()> {
    let doing = || format!("making the stand-in for a disk, {}", path.display());
    let file = File::create_new(path).context(doing)?;
    file.set_len(DISK_MAX).context(doing)?;
    match writer {
        Some(uid) => fchown(&file, Some(uid), Some(uid)).context(doing),
        None => {
            let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o444);
            fs::set_permissions(path, everybody).context(doing)
        }
    }
}

impl Root {
    /// Connects to a socket of Firecracker's; none while there is nothing that listens.
    ///
    /// The folder is Firecracker's, and that may be the guest's by now: a link in it would lead us, who are root, to
    /// any socket of the host. So no link is followed, and what is there must be a socket of the jail's user.
    pub(super) async fn try_connect(&self, name: &str) -> Result<Option<UnixStream>> {
        let doing = || format!("connecting to Firecracker's {name}");
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_XDEV;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(resolve);
        let socket = match openat2(&self.folder, name, how) {
            Err(Errno::ENOENT) => return Ok(None),
            opened => opened.context(doing)?,
        };
        let stat = fstat(&socket).context(doing)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFSOCK || stat.st_uid != self.uid {
            let text = "what is there is no socket of its own: the guest may have taken Firecracker over";
            return Err(Error::internal(doing()).because(text));
        }
        match UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(None),
            connected => connected.map(Some).context(doing),
        }
    }

    /// Waits until the socket is there and connects to it. Never ends when it never is.
    pub(super) async fn connect(&self, name: &str) -> Result<UnixStream> {
        loop {
            if let Some(stream) = self.try_connect(name).await? {
                return Ok(stream);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
