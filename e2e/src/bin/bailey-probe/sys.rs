//! The system calls themselves.
#![allow(unsafe_code, reason = "system calls that no crate wraps, with arguments made here")]

use std::ffi::CStr;

use libc::{c_int, c_long};
use nix::errno::Errno;

type Outcome = Result<(), Errno>;

/// A name, and what to try.
type Attempt = (&'static str, fn() -> Outcome);

/// All attempts.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    ("mount", || mount_tmpfs(c"/var/tmp")),
    ("unshare_mount", || in_child(|| unshare(libc::CLONE_NEWNS))),
    ("unshare_user", || in_child(|| unshare(libc::CLONE_NEWUSER))),
    ("mount_in_user_namespace", || {
        in_child(|| {
            unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)?;
            mount_tmpfs(c"/tmp")
        })
    }),
    ("ptrace", || in_child(trace_me)),
    ("bpf_map", bpf_map),
    ("bpf_program", bpf_program),
    ("io_uring_setup", io_uring_setup),
    ("keyctl", keyctl),
    ("perf_event_open", perf_event_open),
    ("memfd_create", || call(libc::SYS_memfd_create, [c"probe".as_ptr().addr(), 0, 0, 0, 0])),
    ("inotify_init", || call(libc::SYS_inotify_init1, [0; 5])),
    ("fanotify_init", || call(libc::SYS_fanotify_init, [0; 5])),
    ("process_vm_readv", process_vm_readv),
    ("open_by_handle_at", open_by_handle_at),
    ("seccomp", || in_child(seccomp)),
    ("raw_socket", || call(libc::SYS_socket, [AF_PACKET, SOCK_RAW, 0, 0, 0])),
    ("sethostname", || call(libc::SYS_sethostname, [c"probed".as_ptr().addr(), 6, 0, 0, 0])),
];

const AF_PACKET: usize = 17;
const SOCK_RAW: usize = 3;
const BPF_MAP_CREATE: usize = 0;
const BPF_PROG_LOAD: usize = 5;

/// Makes a system call that returns a descriptor, a number or nothing.
fn call(number: c_long, args: [usize; 5]) -> Outcome {
    // SAFETY: every caller in this file gives pointers to values that live through the call, of the size and kind
    // that this call reads or writes.
    let result = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) };
    Errno::result(result).map(drop)
}

/// Does something in a process of its own, since it changes the process that does it.
fn in_child(attempt: fn() -> Outcome) -> Outcome {
    // SAFETY: this program has one thread, so that the child may do all that the parent may.
    let pid = unsafe { libc::fork() };
    if Errno::result(pid)? == 0 {
        let code = attempt().map_or_else(|errno| errno as c_int, |()| 0);
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the status.
        Errno::result(unsafe { libc::waitpid(pid, &raw mut status, 0) })?;
        if libc::WIFSTOPPED(status) {
            // The one that asked to be traced has stopped: let it go on.
            call(libc::SYS_ptrace, [PTRACE_CONT, usize::try_from(pid).unwrap_or(0), 0, 0, 0])?;
        } else {
            break;
        }
    }
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => Ok(()),
        0 => Err(Errno::EINTR),
        code => Err(Errno::from_raw(code)),
    }
}

const PTRACE_CONT: usize = 7;

fn unshare(flags: c_int) -> Outcome {
    call(libc::SYS_unshare, [usize::try_from(flags).unwrap_or(0), 0, 0, 0, 0])
}

fn mount_tmpfs(target: &CStr) -> Outcome {
    let tmpfs = c"tmpfs".as_ptr().addr();
    call(libc::SYS_mount, [tmpfs, target.as_ptr().addr(), tmpfs, 0, 0])
}

fn trace_me() -> Outcome {
    call(libc::SYS_ptrace, [0; 5])?;
    // SAFETY: stops this process, which its tracer lets go on.
    Errno::result(unsafe { libc::raise(libc::SIGSTOP) }).map(drop)
}

fn bpf_map() -> Outcome {
    // An array of one entry: type, size of a key, size of a value, entries.
    let attributes: [u32; 16] = [2, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    call(libc::SYS_bpf, [BPF_MAP_CREATE, attributes.as_ptr().addr(), size_of_val(&attributes), 0, 0])
}

fn bpf_program() -> Outcome {
    // r0 = 0; exit
    let code: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];
    let license = c"GPL";
    let mut attributes = [0_u64; 15];
    // A kprobe program (type 2), which only the privileged may load; two instructions.
    attributes[0] = 2 | 2 << 32;
    attributes[1] = code.as_ptr().addr() as u64;
    attributes[2] = license.as_ptr().addr() as u64;
    call(libc::SYS_bpf, [BPF_PROG_LOAD, attributes.as_ptr().addr(), size_of_val(&attributes), 0, 0])
}

fn io_uring_setup() -> Outcome {
    let mut parameters = [0_u64; 15];
    call(libc::SYS_io_uring_setup, [4, parameters.as_mut_ptr().addr(), 0, 0, 0])
}

fn keyctl() -> Outcome {
    // KEYCTL_JOIN_SESSION_KEYRING without a name, then a key in it (KEY_SPEC_SESSION_KEYRING is -3).
    call(libc::SYS_keyctl, [1, 0, 0, 0, 0])?;
    let (kind, name, secret) = (c"user", c"probe", c"secret");
    let session = (-3_isize).cast_unsigned();
    call(libc::SYS_add_key, [kind.as_ptr().addr(), name.as_ptr().addr(), secret.as_ptr().addr(), 6, session])
}

fn perf_event_open() -> Outcome {
    // PERF_TYPE_SOFTWARE, its size, PERF_COUNT_SW_CPU_CLOCK; on all processes of the first processor.
    let mut attributes = [0_u64; 16];
    attributes[0] = 1 | (128 << 32);
    let all = usize::MAX;
    call(libc::SYS_perf_event_open, [attributes.as_mut_ptr().addr(), all, 0, all, 0])
}

fn process_vm_readv() -> Outcome {
    let (from, mut to) = ([7_u8; 8], [0_u8; 8]);
    let source = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let target = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let own = usize::try_from(std::process::id()).unwrap_or(0);
    let (one, none) = (1_usize, 0_usize);
    let (target, source) = (&raw const target, &raw const source);
    // SAFETY: both vectors point to eight bytes that live through the call.
    let read = unsafe { libc::syscall(libc::SYS_process_vm_readv, own, target, one, source, one, none) };
    Errno::result(read)?;
    if to == from { Ok(()) } else { Err(Errno::EIO) }
}

fn open_by_handle_at() -> Outcome {
    // A handle with room for 128 bytes: its size, its kind, the handle.
    let mut handle = [0_u32; 34];
    handle[0] = 128;
    let mut mount = 0_i32;
    // A tmpfs, which can always make handles; an overlay cannot.
    let path = c"/dev/shm";
    let here = usize::MAX - 99;
    let root = std::fs::File::open("/dev/shm").map_err(|_| Errno::EIO)?;
    let names = [here, path.as_ptr().addr(), handle.as_mut_ptr().addr(), (&raw mut mount).addr(), 0];
    call(libc::SYS_name_to_handle_at, names)?;
    let root = usize::try_from(std::os::fd::AsRawFd::as_raw_fd(&root)).unwrap_or(0);
    call(libc::SYS_open_by_handle_at, [root, handle.as_mut_ptr().addr(), 0, 0, 0])
}

fn seccomp() -> Outcome {
    // A filter of one instruction: allow.
    let code = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 };
    let filter = libc::sock_fprog { len: 1, filter: (&raw const code).cast_mut() };
    // PR_SET_NO_NEW_PRIVS, then SECCOMP_SET_MODE_FILTER.
    call(libc::SYS_prctl, [38, 1, 0, 0, 0])?;
    call(libc::SYS_seccomp, [1, 0, (&raw const filter).addr(), 0, 0])
}
