//! Making, replacing and ending processes.

use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::unistd::Pid;

use super::check;

/// What the child of [`clone_and_exec`] needs, all made before the clone: the child must not allocate.
#[derive(Debug)]
pub struct ChildPlan {
    /// Each descriptor and the number that it gets in the new program. No source is a target.
    pub descriptors: Vec<(RawFd, RawFd)>,
    /// The reading end of the pipe that a byte arrives on when the child may go on.
    pub release: RawFd,
    /// The writing end of the same pipe, which the child closes so that it sees the parent's death.
    pub release_writer: RawFd,
    /// The pipe that a failure is told on: the byte `!` and then the errno in one byte.
    pub status: RawFd,
    /// The program.
    pub program: RawFd,
    /// Its arguments. Its environment is empty.
    pub arguments: Vec<CString>,
}

/// Clones this process with `flags` (`CLONE_NEW*`) and executes the plan's program in the child.
///
/// The caller must have blocked all signals: handlers of the parent must not run in the child.
///
/// # Errors
/// The kernel's for the clone. What fails in the child is told on the plan's status pipe.
pub fn clone_and_exec(flags: u64, plan: &ChildPlan) -> io::Result<(Pid, OwnedFd)> {
    let mut arguments: Vec<*const c_char> = plan.arguments.iter().map(|a| a.as_ptr()).collect();
    arguments.push(ptr::null());
    let environment = [ptr::null()];
    let mut pidfd: RawFd = -1;
    // SAFETY: all bytes zero is a valid `clone_args`.
    let mut request: libc::clone_args = unsafe { std::mem::zeroed() };
    request.flags = flags | libc::CLONE_PIDFD.cast_unsigned() as u64;
    request.pidfd = (&raw mut pidfd) as u64;
    request.exit_signal = libc::SIGCHLD.cast_unsigned().into();
    // SAFETY: without CLONE_VM the child has its own memory, and it runs `child`, which only makes system calls
    // that are async-signal-safe and never returns; `request` and `pidfd` live over the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut request, size_of::<libc::clone_args>()) };
    if pid == 0 {
        child(plan, &arguments, &environment);
    }
    let pid = check(pid)?;
    let pid = i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok((Pid::from_raw(pid), unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// What the child does between the clone and the new program. No allocation, no lock, no panic.
fn child(plan: &ChildPlan, arguments: &[*const c_char], environment: &[*const c_char]) -> ! {
    // SAFETY: takes an integer only.
    unsafe { libc::close(plan.release_writer) };
    let mut byte = 0_u8;
    loop {
        // SAFETY: `byte` is one writable byte.
        let got = unsafe { libc::read(plan.release, (&raw mut byte).cast(), 1) };
        if got == 1 {
            break;
        }
        if got == 0 || errno() != libc::EINTR {
            // The parent is gone, or gave up.
            // SAFETY: ends the process without running anything.
            unsafe { libc::_exit(1) };
        }
    }
    for &(from, to) in &plan.descriptors {
        // SAFETY: takes integers only.
        if unsafe { libc::dup2(from, to) } < 0 {
            give_up(plan.status);
        }
    }
    // SAFETY: both lists end with a null pointer and their strings live in the plan.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            plan.program,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    give_up(plan.status)
}

/// The errno of this thread.
fn errno() -> i32 {
    // Neither allocates nor locks: it reads errno.
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Tells errno on the status pipe and ends the process.
fn give_up(status: RawFd) -> ! {
    let message = [b'!', u8::try_from(errno()).unwrap_or(0)];
    // SAFETY: `message` is two readable bytes.
    unsafe { libc::write(status, message.as_ptr().cast(), message.len()) };
    // SAFETY: ends the process without running anything.
    unsafe { libc::_exit(127) }
}

/// Sends `signal` to the process that `pidfd` refers to.
///
/// # Errors
/// `ESRCH` when the process has been reaped.
pub fn kill(pidfd: BorrowedFd<'_>, signal: nix::sys::signal::Signal) -> io::Result<()> {
    let no_info = ptr::null::<libc::siginfo_t>();
    // SAFETY: a null `siginfo` is allowed and means an ordinary signal.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as libc::c_int, no_info, 0)
    })
    .map(drop)
}

/// Closes every descriptor from `first` to `last`, both included.
///
/// # Errors
/// The kernel's.
pub fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the caller owns the whole process (a single-threaded helper); takes integers only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Takes over a descriptor that this process was started with.
///
/// # Errors
/// `EBADF` when there is no such descriptor.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into())?;
    // SAFETY: the descriptor is open, and whoever started this process gave it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A program's path, arguments and environment, at an address that cannot be guessed.
///
/// A system-call filter can allow `execve` for just this path pointer: see [`Image::path_address`].
#[derive(Debug)]
pub struct Image {
    path: *const c_char,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
}

impl Image {
    /// Copies the strings. The path goes to a page of its own at a random address.
    ///
    /// # Errors
    /// The kernel's for the page or the random number; `ENAMETOOLONG` when the path does not fit.
    pub fn new(path: &CStr, arguments: Vec<CString>, environment: Vec<CString>) -> io::Result<Self> {
        let path = place_at_random(path)?;
        // The strings live until the program is replaced, which is the purpose of an image.
        let leak = |strings: Vec<CString>| {
            let mut list: Vec<*const c_char> =
                strings.into_iter().map(|s| s.into_raw().cast_const()).collect();
            list.push(ptr::null());
            list
        };
        Ok(Self { path, arguments: leak(arguments), environment: leak(environment) })
    }

    /// Where the path lies: the value of the first argument of the `execve` that [`Image::execute`] makes.
    #[must_use]
    pub fn path_address(&self) -> u64 {
        self.path as u64
    }

    /// Replaces this process.
    ///
    /// # Errors
    /// Returns only when the kernel refuses, with its reason.
    pub fn execute(&self) -> io::Result<Infallible> {
        // SAFETY: path and lists were made by `new`: NUL-terminated strings that are never freed, lists that end
        // with a null pointer.
        unsafe { libc::execve(self.path, self.arguments.as_ptr(), self.environment.as_ptr()) };
        Err(io::Error::last_os_error())
    }
}

const PAGE: usize = 4096;

/// Copies `text` to a fresh page at a random address, and to a random place in it.
fn place_at_random(text: &CStr) -> io::Result<*const c_char> {
    let bytes = text.to_bytes_with_nul();
    let room =
        PAGE.checked_sub(bytes.len()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?;
    for _attempt in 0..16 {
        let random = random_u64()?;
        // User addresses end at 2^47; stay clear of the low quarter and of the stack's end.
        let address = (0x1000_0000_0000 + (random >> 8) % 0x6000_0000_0000) & !0xfff;
        let offset = usize::from(u16::try_from(random & 0xff).unwrap_or(0)) * room / 256;
        // SAFETY: MAP_FIXED_NOREPLACE never touches a mapping that exists.
        let page = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            continue;
        }
        // SAFETY: offset + bytes.len() <= PAGE, inside the mapping.
        let place = unsafe { page.cast::<u8>().add(offset) };
        // SAFETY: the page is new, writable, long enough, and overlaps nothing.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        return Ok(place.cast::<c_char>().cast_const());
    }
    Err(io::Error::last_os_error())
}

/// A random number from the kernel.
///
/// # Errors
/// The kernel's.
pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0_u8; 8];
    // SAFETY: `bytes` is eight writable bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) == Ok(bytes.len()) {
        Ok(u64::from_ne_bytes(bytes))
    } else {
        Err(io::Error::last_os_error())
    }
}
