//! System calls that no safe crate wraps. Every `unsafe` of this program is here.
#![allow(unsafe_code, reason = "the one place in this crate for raw system calls")]

use std::ffi::{CString, c_void};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use bailey_types::guest::spec::{Capabilities, Rlimit};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// libc's constant is too narrow for its value (linux/sched.h).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a [`fork`] this is.
pub(crate) enum Forked {
    Child,
    Parent(i32),
}

/// Forks, with new namespaces as `flags` says and the child born in the cgroup behind `cgroup`.
///
/// The child is a whole copy, as with fork: this program has one thread, so the child may do anything.
pub(crate) fn fork(flags: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    // SAFETY: clone_args is plain integers, for which all zeroes is a valid value.
    let mut args: libc::clone_args = unsafe { zeroed() };
    args.flags = u64::from(flags.cast_unsigned());
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without CLONE_VM and without a stack this is fork; the arguments live through the call.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) })?;
    Ok(if pid == 0 { Forked::Child } else { Forked::Parent(i32::try_from(pid).unwrap_or(i32::MAX)) })
}

/// A descriptor that stands for a process.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) })
}

/// Loads a kernel module from an open file.
pub(crate) fn finit_module(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the parameter string is a constant with an end; the descriptor is open.
    check(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) }).map(drop)
}

/// random(4): `RNDADDENTROPY`, then `RNDRESEEDCRNG`, so that nothing of the old state is left in use.
pub(crate) fn reseed_kernel_rng(random: BorrowedFd<'_>, entropy: &[u8; 32]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        data: [u8; 32],
    }
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let info = PoolInfo { entropy_bits: 256, bytes: 32, data: *entropy };
    // SAFETY: the structure is rand_pool_info with its 32 bytes of data, and lives through the call.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) }.into())?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG, 0) }.into()).map(drop)
}

/// One ioctl of `/dev/mapper/control`; `buffer` begins with a `struct dm_ioctl` that tells its length.
pub(crate) fn dm_ioctl(control: BorrowedFd<'_>, request: u32, buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is as long as its data_size field says (crate::disk::dm writes it from the same length).
    check(unsafe { libc::ioctl(control.as_raw_fd(), libc::Ioctl::from(request), buffer.as_mut_ptr()) }.into())
        .map(drop)
}

/// Sets up the loopback interface of this network namespace.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: takes three integers.
    let fd = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into())?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) };
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: the request is a whole ifreq that lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Makes the terminal behind `fd` the controlling terminal of this session.
pub(crate) fn set_controlling_terminal(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes an integer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Sets the size of a terminal.
pub(crate) fn set_window_size(fd: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the structure lives through the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into()).map(drop)
}

/// The five capability sets of this process: bounding first, while CAP_SETPCAP is still there. `last` is the
/// highest capability that the kernel knows.
pub(crate) fn drop_bounding(keep: u64, last: u32) -> io::Result<()> {
    for capability in 0..=last {
        if keep >> capability & 1 == 0 {
            // SAFETY: takes integers.
            let done =
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
            check(done.into())?;
        }
    }
    Ok(())
}

/// Keeps the permitted set through a change of uid, or not.
pub(crate) fn keep_capabilities(keep: bool) -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, libc::c_ulong::from(keep), 0, 0, 0) }.into()).map(drop)
}

/// Sets effective, permitted and inheritable, then raises ambient.
pub(crate) fn set_capabilities(sets: &Capabilities, last: u32) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let known = if last >= 63 { u64::MAX } else { (1 << (last + 1)) - 1 };
    let half = |mask: u64, high: bool| {
        let [a, b, c, d, e, f, g, h] = (mask & known).to_le_bytes();
        u32::from_le_bytes(if high { [e, f, g, h] } else { [a, b, c, d] })
    };
    let data = [false, true].map(|high| Data {
        effective: half(sets.effective, high),
        permitted: half(sets.permitted, high),
        inheritable: half(sets.inheritable, high),
    });
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: version 3 takes two data structures; both live through the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    for capability in 0..=last {
        if sets.ambient >> capability & 1 == 1 {
            let raise = libc::c_ulong::try_from(libc::PR_CAP_AMBIENT_RAISE).unwrap_or(0);
            let capability = libc::c_ulong::from(capability);
            // SAFETY: takes integers.
            let done = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0) };
            check(done.into())?;
        }
    }
    Ok(())
}

/// No program that this process runs gains privileges.
pub(crate) fn no_new_privileges() -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as libc::c_ulong, 0, 0, 0) }.into()).map(drop)
}

/// A resource limit of this process.
pub(crate) fn set_rlimit(limit: &Rlimit) -> io::Result<()> {
    let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: the structure lives through the call, and no old value is asked for.
    check(unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, limit.resource, &raw const value, std::ptr::null::<c_void>())
    })
    .map(drop)
}

/// Runs a program in place of this one.
pub(crate) fn execve(program: &CString, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both lists end with a null pointer, and the strings live through the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Takes whatever signal state this process has back to what a new program expects.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is always a valid disposition; SIGKILL, SIGSTOP and the C library's own refuse it.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: sigset_t is plain data, for which all zeroes is a valid value (the empty set).
    let empty: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: the set lives through the call, and no old one is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut()) };
}

/// Sends a process's group or the process a signal through its descriptor number.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes two integers.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// The next child that has ended: its pid and its status (the exit code, or 128 plus the signal).
pub(crate) fn reap() -> Option<(i32, u8)> {
    let mut status = 0;
    // SAFETY: the status lives through the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let code =
        if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    Some((pid, u8::try_from(code & 0xff).unwrap_or(u8::MAX)))
}

/// Closes every descriptor of this process.
pub(crate) fn close_all() {
    // SAFETY: takes integers; whoever calls this uses no descriptor afterwards.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
}

/// Listens on a vsock port, on any local context id.
pub(crate) fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes three integers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) }.into())?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) };
    // SAFETY: sockaddr_vm is plain data, for which all zeroes is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = u16::try_from(libc::AF_VSOCK).unwrap_or(0);
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or(0);
    // SAFETY: the address is a whole sockaddr_vm that lives through the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) }.into())?;
    // SAFETY: takes two integers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 1) }.into())?;
    Ok(socket)
}

/// The next connection of a listener, if one waits.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no address is asked for.
    let fd = check(
        unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) }
            .into(),
    )?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) })
}

/// A descriptor number that the program was promised, as one that it owns.
///
/// # Panics
/// When the number is negative.
pub(crate) fn adopt(fd: RawFd) -> OwnedFd {
    assert!(fd >= 0, "a descriptor number is never negative");
    // SAFETY: callers pass the number of a descriptor that was just made for them and that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
