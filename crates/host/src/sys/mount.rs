//! The mount calls that work on file descriptors, so that no path is looked up twice.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::check;

/// Copies the mount at `at` (with what is mounted below it when `recursive`) into a new, unattached mount.
///
/// # Errors
/// The kernel's, for instance `EPERM` without `CAP_SYS_ADMIN`.
pub fn clone_tree(at: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: the path is a NUL-terminated literal and the call writes no memory.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, at.as_raw_fd(), c"".as_ptr(), flags) })?;
    owned(fd)
}

/// Takes over a descriptor that the kernel has just returned.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a file system in memory, of at most one page, as an unattached mount with `attributes` (`MOUNT_ATTR_*`).
///
/// # Errors
/// The kernel's.
pub fn new_tmpfs(attributes: u64) -> io::Result<OwnedFd> {
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const CLOEXEC: u32 = 1;
    // SAFETY: the name is a NUL-terminated literal and the call writes no memory.
    let context = owned(check(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) })?)?;
    for (key, value) in [(c"size", c"4k"), (c"nr_inodes", c"4"), (c"mode", c"0555")] {
        let (fd, key, value) = (context.as_raw_fd(), key.as_ptr(), value.as_ptr());
        // SAFETY: key and value are NUL-terminated literals and the call writes no memory.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_STRING, key, value, 0) })?;
    }
    let nothing = std::ptr::null::<libc::c_char>();
    let fd = context.as_raw_fd();
    // SAFETY: this command takes null pointers.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, nothing, nothing, 0) })?;
    // SAFETY: takes integers only.
    owned(check(unsafe { libc::syscall(libc::SYS_fsmount, fd, CLOEXEC, attributes) })?)
}

/// Sets mount attributes (`MOUNT_ATTR_*`) on the mount that `at` is the root of.
///
/// # Errors
/// The kernel's.
pub fn set_attributes(at: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: `attributes` lives over the call, its size is given, and the call only reads it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(done).map(drop)
}

/// Attaches the unattached mount `tree` on top of what `target` refers to.
///
/// # Errors
/// The kernel's, for instance `ENOTDIR` when one is a directory and the other is not.
pub fn attach(tree: impl AsFd, target: impl AsFd) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated literals and the call writes no memory.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            target.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    check(done).map(drop)
}
