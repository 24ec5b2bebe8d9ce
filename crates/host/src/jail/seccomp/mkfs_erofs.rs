//! What `mkfs.erofs` needs to read a tree of files and to write an image of it. Found by tracing versions 1.5 and 1.8 over
//! trees with every kind of file, attributes and holes; each call has its reason.
//!
//! Absent on purpose: everything that makes a socket, a process or a name, that changes a file's owner or
//! mode, that opens a file by its handle (which, with the capability to read everything, would leave the root), and
//! everything that changes what the process may do.

use super::{Call, Check, any, is, when, without};

/// The bits of `open` that say how a file is opened, and those that make, cut or write at the end.
const ACCESS: u64 = 0o3;
const CREATING: u64 = 0o100 | 0o1000 | 0o2000 | 0o20_000_000;
/// `O_RDWR` with `O_CREAT`: how the image is opened, which is there already. Nothing lets it make a file.
const IMAGE: Check = Check { argument: 2, mask: ACCESS | CREATING, value: 0o102 };

/// The flags of a thread: memory, files, signals and all shared with the others.
const THREAD: u64 = 0x003d_0f00;
/// Every bit that a clone can have, but for the thread identifiers that the C library asks for as well.
const CLONE_BITS: u64 = 0xffff_ffff & !(0x0010_0000 | 0x0020_0000 | 0x0100_0000 | 0x0008_0000);

/// The bits of memory's protection: writable, executable.
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;

pub(super) const CALLS: &[Call] = &[
    // The tree: folders, what is in them, what they are.
    when(libc::SYS_openat, &[&[without(2, ACCESS | CREATING)], &[IMAGE]]),
    any(libc::SYS_getdents64),
    any(libc::SYS_newfstatat),
    any(libc::SYS_fstat),
    any(libc::SYS_lstat),
    any(libc::SYS_statx),
    any(libc::SYS_readlink),
    any(libc::SYS_readlinkat),
    any(libc::SYS_llistxattr),
    any(libc::SYS_lgetxattr),
    // The path of the tree is made absolute; libraries look for SELinux and their settings.
    any(libc::SYS_getcwd),
    any(libc::SYS_access),
    any(libc::SYS_statfs),
    any(libc::SYS_fstatfs),
    // Contents in, image out. Newer versions look for holes, and copy within the kernel.
    any(libc::SYS_copy_file_range),
    any(libc::SYS_sendfile),
    any(libc::SYS_read),
    any(libc::SYS_pread64),
    any(libc::SYS_lseek),
    any(libc::SYS_write),
    any(libc::SYS_writev),
    any(libc::SYS_pwrite64),
    any(libc::SYS_ftruncate),
    any(libc::SYS_fallocate),
    any(libc::SYS_fsync),
    any(libc::SYS_close),
    // Is the output a terminal (TCGETS), and how wide (TIOCGWINSZ).
    when(libc::SYS_ioctl, &[&[is(1, 0x5401)], &[is(1, 0x5413)]]),
    // F_DUPFD, F_GETFD, F_SETFD, F_GETFL: the C library's streams.
    when(libc::SYS_fcntl, &[&[is(1, 0)], &[is(1, 1)], &[is(1, 2)], &[is(1, 3)]]),
    // Memory, which is either written to or executed.
    when(libc::SYS_mmap, &[&[without(2, EXECUTE)], &[without(2, WRITE)]]),
    when(libc::SYS_mprotect, &[&[without(2, EXECUTE)]]),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    // The start of a program: ARCH_SET_FS, a thread's own storage; the size of the stack, read only.
    when(libc::SYS_arch_prctl, &[&[is(0, 0x1002)], &[is(0, 0x3001)]]),
    any(libc::SYS_set_tid_address),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_rseq),
    // Newer versions read files in threads: exactly with the flags of a thread.
    when(libc::SYS_clone, &[&[Check { argument: 0, mask: CLONE_BITS, value: THREAD & CLONE_BITS }]]),
    any(libc::SYS_futex),
    when(libc::SYS_prlimit64, &[&[is(0, 0), Check { argument: 2, mask: u64::MAX, value: 0 }]]),
    any(libc::SYS_sched_getaffinity),
    // How a runtime prepares: handlers of its own, a stack for them, whether its streams are open.
    any(libc::SYS_rt_sigaction),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_poll),
    // Randomness for a hash's seed, and, where there is none, for an image's name, from who and when it is.
    any(libc::SYS_getrandom),
    any(libc::SYS_getpid),
    any(libc::SYS_getppid),
    any(libc::SYS_gettid),
    any(libc::SYS_getuid),
    any(libc::SYS_geteuid),
    any(libc::SYS_getgid),
    any(libc::SYS_getegid),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_gettimeofday),
    any(libc::SYS_time),
    any(libc::SYS_sysinfo),
    // An assertion that fails: it ends itself.
    when(libc::SYS_tgkill, &[&[is(2, 6)]]),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];
