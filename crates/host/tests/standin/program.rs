//! Stands in for a VMM that its guest has taken over: tries one attack and tells how it went.
//!
//! Called as `<name> <attack> <target>`; writes `succeeded`, or `denied: <why>`, to descriptor 3. It is also the helper
//! that goes through the steps of the jail. `unsafe` is its purpose: it makes calls that no library offers.
#![allow(unsafe_code, reason = "attacks are raw system calls")]

use std::ffi::{CStr, CString, c_long};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::FromRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::process::exit;
use std::time::Duration;

use bailey_host::jail::{self, JailSpec, Profile};

fn main() {
    jail::enter_if_asked();
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, mode, base, program] = arguments.as_slice()
        && mode == "spawn-and-hang"
    {
        spawn_and_hang(base, program);
    }
    let [_, attack, target] = arguments.as_slice() else { exit(3) };
    let said = match try_attack(attack, target) {
        Ok(()) => "succeeded".to_owned(),
        Err(why) => format!("denied: {why}"),
    };
    // SAFETY: the test passes this descriptor in and nothing else here uses it.
    let mut report = unsafe { File::from_raw_fd(3) };
    report.write_all(said.as_bytes()).unwrap_or_else(|_| exit(4));
}

/// The attacks. `Ok` means that it worked.
fn try_attack(attack: &str, target: &str) -> io::Result<()> {
    let number = || target.parse::<i32>().unwrap_or(-1);
    let path = || CString::new(target).unwrap_or_default();
    match attack {
        "hang" => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
        "nothing" => Err(io::Error::other("as it should be")),
        "read-file" => fs::read(target).map(drop),
        "open-for-writing" => OpenOptions::new().write(true).open(target).map(drop),
        "open-device" => File::open(target).map(drop),
        "create-file" => File::create_new(Path::new(target).join("made-by-the-standin")).map(drop),
        "connect-path" => UnixStream::connect(target).map(drop),
        "connect-abstract" => {
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(target.as_bytes())?).map(drop)
        }
        "connect-tcp" => TcpStream::connect(target).map(drop),
        "list-processes" => found(fs::read_dir("/proc")?.flatten().any(|e| *e.file_name() == *target)),
        "list-interfaces" => list_interfaces(),
        // SAFETY: takes integers only.
        "signal" => done(unsafe { libc::kill(number(), libc::SIGCONT) }.into()),
        // SAFETY: attaching reads and writes no memory of ours.
        "ptrace" => done(unsafe { libc::ptrace(libc::PTRACE_SEIZE, number(), 0, 0) }),
        // SAFETY: takes integers only.
        "raw-socket" => done(unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, 1) }.into()),
        "mount" => mount(target),
        // SAFETY: the path is NUL-terminated.
        "chroot" => done(unsafe { libc::chroot(path().as_ptr()) }.into()),
        // SAFETY: takes integers only.
        "unshare-user" => done(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) }.into()),
        "mknod" => mknod(target),
        "exec" => exec(target, [c"-c", c"printf succeeded >&3"]),
        // This program again, which becomes root if the file's mode lets it.
        "exec-set-user-id" => exec(target, [c"setuid", c""]),
        // SAFETY: takes integers only.
        "setuid" => done(unsafe { libc::setresuid(0, 0, 0) }.into()),
        "bpf" => bpf(),
        "io-uring" => io_uring(),
        "open-many" => open_many(number()),
        "fork-many" => fork_many(number()),
        "open-by-handle" => open_by_handle(number()),
        "open-memory-files" => open_memory_files(number()),
        "eat-memory" => eat_memory(number()),
        "spin" => loop {
            std::hint::spin_loop();
        },
        "syscall" => raw_call(target),
        other => Err(io::Error::other(format!("no such attack: {other}"))),
    }
}

/// Spawns a jail in which nothing happens, tells its number on standard output, and waits to be killed.
fn spawn_and_hang(base: &str, program: &str) -> ! {
    let mut spec = JailSpec::new(1_900_000_001, base.into(), program.into(), Profile::QemuTcg);
    spec.argv = ["standin", "hang", ""].map(str::to_owned).to_vec();
    let jailed = jail::spawn(&spec, Vec::new(), |_| Ok(())).unwrap_or_else(|_| exit(5));
    writeln!(io::stdout(), "{}", jailed.pid).unwrap_or_else(|_| exit(4));
    loop {
        std::thread::park();
    }
}

fn done(value: c_long) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn found(found: bool) -> io::Result<()> {
    if found { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn list_interfaces() -> io::Result<()> {
    // SAFETY: returns a list that ends with an entry of zeroes, or null.
    let list = unsafe { libc::if_nameindex() };
    if list.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the first entry exists, be it the last one.
    if unsafe { (*list).if_index } == 0 {
        return found(false);
    }
    // SAFETY: after an entry that is not the last one comes another.
    let second = unsafe { list.add(1) };
    // SAFETY: as above.
    found(unsafe { (*second).if_index } != 0)
}

fn mount(target: &str) -> io::Result<()> {
    let target = CString::new(target)?;
    // SAFETY: all strings are NUL-terminated; the data may be null.
    done(
        unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) }
            .into(),
    )
}

fn mknod(folder: &str) -> io::Result<()> {
    let node = CString::new(format!("{folder}/node-of-the-standin"))?;
    // SAFETY: the path is NUL-terminated.
    done(unsafe { libc::mknod(node.as_ptr(), libc::S_IFBLK | 0o600, libc::makedev(7, 0)) }.into())
}

/// A program that runs cannot tell us: the new one reports.
fn exec(program: &str, arguments: [&CStr; 2]) -> io::Result<()> {
    let program = CString::new(program)?;
    let list = [program.as_ptr(), arguments[0].as_ptr(), arguments[1].as_ptr(), std::ptr::null()];
    // SAFETY: path and arguments are NUL-terminated strings and the list ends with a null pointer.
    done(unsafe { libc::execv(program.as_ptr(), list.as_ptr()) }.into())
}

/// Makes a map of a kind that needs a privilege.
fn bpf() -> io::Result<()> {
    const MAP_CREATE: c_long = 0;
    // Kind (an LRU hash), key size, value size, entries.
    let attributes: [u32; 16] = [9, 4, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the attributes are readable for the length given.
    done(unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, attributes.as_ptr(), 64) })
}

fn io_uring() -> io::Result<()> {
    let mut parameters = [0_u32; 30];
    // SAFETY: the parameters are 120 writable bytes, as the call wants.
    done(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) })
}

fn open_many(count: i32) -> io::Result<()> {
    for _ in 0..count {
        // SAFETY: takes integers only.
        done(unsafe { libc::fcntl(3, libc::F_DUPFD_CLOEXEC, 0) }.into())?;
    }
    Ok(())
}

/// Opens the file with this number in the filesystem of the root, past all names: ext4 and its like take a handle that
/// says only that.
fn open_by_handle(inode: i32) -> io::Result<()> {
    // Bytes that follow, their kind (a number and a generation, which may be none), the number, the generation.
    let mut handle = [8_i32, 1, inode, 0];
    let root = File::open("/")?;
    let at = std::os::fd::AsRawFd::as_raw_fd(&root);
    let call = libc::SYS_open_by_handle_at;
    // SAFETY: the handle is as long as it says.
    done(unsafe { libc::syscall(call, at, handle.as_mut_ptr(), libc::O_RDONLY) })
}

/// Opens files that are nothing but memory of the kernel, as many as the host lets a process have.
fn open_memory_files(count: i32) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is writable.
    done(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }.into())?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the limit is readable.
    done(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }.into())?;
    for _ in 0..count {
        // SAFETY: the name is NUL-terminated.
        done(unsafe { libc::memfd_create(c"standin".as_ptr(), 0) }.into())?;
    }
    Ok(())
}

/// Takes so many MiB of memory, and uses every page of it.
fn eat_memory(mib: i32) -> io::Result<()> {
    let mut eaten = vec![0_u8; usize::try_from(mib).unwrap_or(0) << 20];
    for page in eaten.chunks_mut(4096) {
        page[0] = 1;
        std::hint::black_box(page);
    }
    Ok(())
}

fn fork_many(count: i32) -> io::Result<()> {
    let mut children = Vec::new();
    let mut outcome = Ok(());
    for _ in 0..count {
        // SAFETY: there is one thread; the child only waits for its end.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            },
            child => {
                outcome = done(child.into());
                if outcome.is_err() {
                    break;
                }
                children.push(child);
            }
        }
    }
    for child in children {
        // SAFETY: a child of ours that has not been waited for.
        unsafe { libc::kill(child, libc::SIGKILL) };
        // SAFETY: the status may be null.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    }
    outcome
}

/// Makes the call whose number and arguments are given, separated by spaces.
fn raw_call(text: &str) -> io::Result<()> {
    let mut numbers = text.split(' ').map(|n| n.parse::<i64>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let (call, a, b, c, d, e, f) = (next(), next(), next(), next(), next(), next(), next());
    // SAFETY: the test passes numbers for which the call touches no memory of ours, or fails.
    done(unsafe { libc::syscall(call, a, b, c, d, e, f) })
}
