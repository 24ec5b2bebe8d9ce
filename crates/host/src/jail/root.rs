//! The root that a jailed process sees: read-only, and with nothing in it that the program does not need.
//!
//! Must never resolve a path of the host twice: what is mounted is opened once, by `path.rs`, and from then on only
//! its descriptor is used.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Gid, Uid};

use super::error::{JailError, StepContext, at, from_to};
use super::path::{self, open_below};
use super::spec::{FileMount, JailSpec};
use crate::sys::mount as raw;

const NONE: Option<&str> = None;
const RUN: &str = "/run";
/// Where the base lies in the empty root of the mount namespace.
const BASE: &str = "base";

/// A file or directory of the host, opened and copied as a mount that is not attached yet.
struct Waiting {
    tree: OwnedFd,
    is_dir: bool,
    target: PathBuf,
}

/// Replaces the root of this process. It must be in a mount namespace of its own, and root.
pub(super) fn replace(spec: &JailSpec) -> Result<(), JailError> {
    // INVARIANT: nothing that follows may propagate to the host's mount namespace.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .step(|| "keep mounts from spreading to the host".to_owned())?;
    let waiting = spec.files.iter().map(wait_to_attach).collect::<Result<Vec<_>, _>>()?;
    let base = path::open_root_owned_dir(&spec.base)?;
    let tree = raw::clone_tree(base.fd.as_fd(), false).step(|| at("copy the mount of", &spec.base))?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    raw::set_attributes(tree.as_fd(), attributes).step(|| at("make read-only the root", &spec.base))?;
    enter(&tree, &base.fd).step(|| at("change the root to", &spec.base))?;
    mount_proc()?;
    mount_dev(spec)?;
    if let Some(bytes) = spec.tmp_bytes {
        mount_tmp(spec, bytes)?;
    }
    attach_files(waiting)
}

/// Makes `tree` the root, and lets go of the old one. `place` is a directory that the change happens at.
fn enter(tree: &OwnedFd, place: &OwnedFd) -> std::io::Result<()> {
    // The root of the namespace is an empty directory, and the base lies in it. For a process whose root is not
    // its namespace's, the kernel makes no user namespaces: with none, no capability comes back in one.
    let restricted = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let outer = raw::new_tmpfs(restricted)?;
    raw::attach(&outer, place)?;
    nix::sys::stat::mkdirat(&outer, BASE, Mode::from_bits_truncate(0o555))?;
    let inner = open_below(&outer, BASE, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW)?;
    raw::set_attributes(outer.as_fd(), restricted | libc::MOUNT_ATTR_RDONLY)?;
    raw::attach(tree, &inner)?;
    nix::unistd::fchdir(&outer)?;
    nix::unistd::pivot_root(".", ".")?;
    // INVARIANT: the old root lies on top of the new one until here; afterwards no path leads to the host.
    umount2(".", MntFlags::MNT_DETACH)?;
    // INVARIANT: the directory that we are in is inside the root at every moment from here on.
    nix::unistd::fchdir(tree)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// Opens a source on the host and takes its mount along.
fn wait_to_attach(file: &FileMount) -> Result<Waiting, JailError> {
    let source = path::open(&file.source, file.writable)?;
    let tree = raw::clone_tree(source.fd.as_fd(), false).step(|| at("copy the mount of", &file.source))?;
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    if !file.writable {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    raw::set_attributes(tree.as_fd(), attributes)
        .step(|| from_to("restrict the mount of", &file.source, &file.target))?;
    Ok(Waiting { tree, is_dir: source.is_dir(), target: file.target.clone() })
}

fn mount_proc() -> Result<(), JailError> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Only what belongs to this process: neither the kernel's own files nor other processes.
    mount(Some("proc"), "/proc", Some("proc"), flags, Some("hidepid=invisible,subset=pid"))
        .step(|| "mount /proc".to_owned())
}

fn mount_tmpfs(target: &str, flags: MsFlags, options: &str) -> Result<(), JailError> {
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        flags | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some(options),
    )
    .step(|| format!("mount {target}"))
}

fn make_read_only(target: &str, flags: MsFlags) -> Result<(), JailError> {
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NONE, target, NONE, flags | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, NONE)
        .step(|| format!("make {target} read-only"))
}

fn mount_dev(spec: &JailSpec) -> Result<(), JailError> {
    mount_tmpfs("/dev", MsFlags::empty(), "mode=0755,size=4k,nr_inodes=16")?;
    // The kernel's fixed numbers. None but kvm, which is the user's own, does anything.
    let mut devices =
        vec![("/dev/null", 1, 3, 0o666), ("/dev/zero", 1, 5, 0o666), ("/dev/random", 1, 8, 0o444)];
    devices.push(("/dev/urandom", 1, 9, 0o444));
    if spec.kvm {
        devices.push(("/dev/kvm", 10, 232, 0o600));
    }
    for (device, major, minor, mode) in devices {
        let mode = Mode::from_bits_truncate(mode);
        mknod(device, SFlag::S_IFCHR, mode, makedev(major, minor))
            .step(|| format!("make the device {device}"))?;
    }
    if spec.kvm {
        nix::unistd::chown("/dev/kvm", Some(Uid::from_raw(spec.uid)), Some(Gid::from_raw(spec.gid)))
            .step(|| "give the device /dev/kvm to the jail's user".to_owned())?;
    }
    make_read_only("/dev", MsFlags::empty())
}

fn mount_tmp(spec: &JailSpec, bytes: u64) -> Result<(), JailError> {
    let options = format!("mode=0700,size={bytes},nr_inodes=1024,uid={},gid={}", spec.uid, spec.gid);
    mount_tmpfs("/tmp", MsFlags::MS_NODEV, &options)
}

/// Makes the mount points below `/run` and attaches what waits for them.
fn attach_files(waiting: Vec<Waiting>) -> Result<(), JailError> {
    if waiting.is_empty() {
        return Ok(());
    }
    mount_tmpfs(RUN, MsFlags::MS_NODEV, "mode=0755,size=64k,nr_inodes=256")?;
    for file in &waiting {
        make_mount_point(&file.target, file.is_dir).step(|| at("make the mount point", &file.target))?;
    }
    make_read_only(RUN, MsFlags::MS_NODEV)?;
    let root = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY, Mode::empty())
        .step(|| "open the new root".to_owned())?;
    for file in waiting {
        let below = file.target.strip_prefix("/").unwrap_or(&file.target);
        let target = open_below(&root, below, OFlag::O_PATH | OFlag::O_NOFOLLOW)
            .step(|| at("open the mount point", &file.target))?;
        raw::attach(&file.tree, &target).step(|| at("attach a file at", &file.target))?;
    }
    Ok(())
}

fn make_mount_point(target: &Path, is_dir: bool) -> std::io::Result<()> {
    if is_dir {
        return std::fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::OpenOptions::new().write(true).create_new(true).open(target).map(drop)
}
