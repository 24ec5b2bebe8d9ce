//! What QEMU needs whichever way it runs the processor. Found by tracing QEMU 7.2 and 10.0 as they booted, ran, were
//! stopped, saved to a descriptor and restored with every device that Bailey gives them; each call has its reason.
//!
//! Absent on purpose: everything that makes a socket, a process or a name (all of that is passed in as open
//! descriptors), and everything that changes what the process may do.

use super::{Call, Check, any, is, when, without};

/// The bits of `open` that make, change or write: `O_CREAT`, `O_TRUNC`, `O_APPEND`, `O_TMPFILE` without
/// `O_DIRECTORY`. QEMU opens what exists.
const CREATING: u64 = 0o100 | 0o1000 | 0o2000 | 0o20_000_000;

/// The flags of a thread: memory, files, signals and all shared with the others.
const THREAD: u64 = 0x003d_0f00;
/// Every bit that a clone can have, but for the thread identifiers that the C library asks for as well.
const CLONE_BITS: u64 = 0xffff_ffff & !(0x0010_0000 | 0x0020_0000 | 0x0100_0000 | 0x0008_0000);

const fn request(number: u64) -> [Check; 1] {
    [is(1, number)]
}

pub(super) const CALLS: &[Call] = &[
    // Reading and writing what is open: disks, sockets, pipes, the state of a VM.
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    // A guest's disk requests: flush, discard, zeroes, and the size of the disk.
    any(libc::SYS_fdatasync),
    any(libc::SYS_fsync),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    any(libc::SYS_lseek),
    // Before a saved VM goes on, its disks forget what they have cached.
    any(libc::SYS_fadvise64),
    // The monitor and the guest's channel are connected sockets; descriptors arrive over the monitor.
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_recvfrom),
    any(libc::SYS_sendto),
    any(libc::SYS_getsockname),
    any(libc::SYS_getpeername),
    any(libc::SYS_getsockopt),
    // SO_ZEROCOPY (60), which QEMU asks for on each socket that it is given; and SO_TYPE and the like are read only.
    when(libc::SYS_setsockopt, &[&[is(1, 1), is(2, 60)]]),
    any(libc::SYS_shutdown),
    // The loader finds libraries, QEMU its firmware and its accelerator module. Landlock says which.
    when(libc::SYS_openat, &[&[without(2, CREATING)]]),
    any(libc::SYS_newfstatat),
    any(libc::SYS_fstat),
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    // Libraries look for SELinux and for NUMA nodes and find neither.
    any(libc::SYS_statfs),
    any(libc::SYS_access),
    any(libc::SYS_faccessat2),
    any(libc::SYS_readlink),
    any(libc::SYS_readlinkat),
    any(libc::SYS_getdents64),
    // A library walks /sys/bus/nd and goes back to where it was.
    any(libc::SYS_fchdir),
    any(libc::SYS_getcwd),
    any(libc::SYS_close),
    any(libc::SYS_dup),
    any(libc::SYS_dup3),
    // F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; image locks: F_OFD_GETLK, F_OFD_SETLK.
    when(
        libc::SYS_fcntl,
        &[
            &[is(1, 0)],
            &[is(1, 1)],
            &[is(1, 2)],
            &[is(1, 3)],
            &[is(1, 4)],
            &[is(1, 1030)],
            &[is(1, 36)],
            &[is(1, 37)],
        ],
    ),
    when(
        libc::SYS_ioctl,
        &[
            // TCGETS: is this a terminal. FIONBIO: do not block.
            &request(0x5401),
            &request(0x5421),
            // BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKDISCARD, BLKZEROOUT: a disk that is a block device.
            &request(0x8008_1272),
            &request(0x1268),
            &request(0x127b),
            &request(0x1277),
            &request(0x127f),
            // A network card whose tap was passed in: TUNGETIFF, TUNGETFEATURES, TUNSETOFFLOAD, TUNGETVNETHDRSZ,
            // TUNSETVNETHDRSZ, TUNSETSNDBUF, TUNSETVNETLE, TUNSETVNETBE. Not TUNSETIFF, which makes one.
            &request(0x8004_54d2),
            &request(0x8004_54cf),
            &request(0x4004_54d0),
            &request(0x8004_54d7),
            &request(0x4004_54d8),
            &request(0x4004_54d4),
            &request(0x4004_54dc),
            &request(0x4004_54de),
        ],
    ),
    // Waiting: the event loops.
    any(libc::SYS_poll),
    any(libc::SYS_ppoll),
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_eventfd2),
    any(libc::SYS_signalfd4),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_nanosleep),
    any(libc::SYS_restart_syscall),
    // Time, where the C library cannot read it without a call.
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_getres),
    any(libc::SYS_gettimeofday),
    any(libc::SYS_time),
    any(libc::SYS_timerfd_create),
    any(libc::SYS_timerfd_settime),
    // Memory. A processor emulator makes code, so memory may become executable.
    any(libc::SYS_mmap),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_mprotect),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    any(libc::SYS_membarrier),
    // QEMU tries whether memory files can be sealed and be of huge pages.
    any(libc::SYS_memfd_create),
    // A library asks which memory policies there are: MPOL_DEFAULT and MPOL_PREFERRED_MANY.
    any(libc::SYS_get_mempolicy),
    when(libc::SYS_set_mempolicy, &[&[is(0, 0)], &[is(0, 5)]]),
    // Threads: exactly with the flags of a thread.
    when(libc::SYS_clone, &[&[Check { argument: 0, mask: CLONE_BITS, value: THREAD & CLONE_BITS }]]),
    any(libc::SYS_futex),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_rseq),
    any(libc::SYS_set_tid_address),
    // ARCH_SET_FS: a thread's own storage. Nothing else.
    when(libc::SYS_arch_prctl, &[&[is(0, 0x1002)], &[is(0, 0x3001)]]),
    any(libc::SYS_gettid),
    any(libc::SYS_getpid),
    any(libc::SYS_getuid),
    any(libc::SYS_geteuid),
    any(libc::SYS_getgid),
    any(libc::SYS_getegid),
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_sched_yield),
    any(libc::SYS_sysinfo),
    any(libc::SYS_uname),
    any(libc::SYS_getrandom),
    any(libc::SYS_getrusage),
    // Reading limits; with a new value (the third argument) none can be set.
    when(libc::SYS_prlimit64, &[&[is(0, 0), Check { argument: 2, mask: u64::MAX, value: 0 }]]),
    // PR_SET_NAME of a thread, PR_SET_TIMERSLACK, PR_MCE_KILL; PR_CAPBSET_READ, by which a library of Debian 13's QEMU counts
    // the capabilities that there are.
    when(libc::SYS_prctl, &[&[is(0, 15)], &[is(0, 29)], &[is(0, 33)], &[is(0, 23)]]),
    // Signals: handlers, and a thread that wakes another one. The process namespace holds no other process.
    any(libc::SYS_rt_sigaction),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigpending),
    any(libc::SYS_rt_sigtimedwait),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_tgkill),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];
