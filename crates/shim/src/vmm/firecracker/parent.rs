//! The process above Firecracker, and the thread of the shim above that.
//!
//! Firecracker must not outlive its shim. The kernel's signal for a parent's death does not do that here: the jailer
//! changes its user, and with that the kernel forgets the signal. So a process of our own stands between, as the
//! first of a process namespace: it stays root, dies with the shim's thread, and with the first process of a
//! namespace the kernel kills all others in it. It does nothing but start the jailer and wait.
//!
//! The jailer is not asked for a process namespace of its own (`--new-pid-ns`), since it is in one already: so it
//! becomes Firecracker instead of leaving it behind, and how that ends is known.

use std::ffi::OsString;
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::sync::watch;

use crate::error::{Context, Error, Result};

/// The first argument of a shim that is to be such a process.
const ARGUMENT: &str = "firecracker-parent";

/// Exit code when the jailer could not be started.
const NOT_STARTED: i32 = 127;

/// How this program is started as the process above Firecracker: program and first arguments.
pub(super) type Entry = Vec<OsString>;

pub(super) fn entry() -> Entry {
    vec!["/proc/self/exe".into(), ARGUMENT.into()]
}

/// Becomes the process above Firecracker, and never returns, if the program was started as that.
pub(crate) fn enter_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == ARGUMENT) {
        std::process::exit(run(arguments));
    }
}

/// Waits to be released, starts the program that the arguments name, and gives its exit code.
pub(super) fn run(mut arguments: impl Iterator<Item = OsString>) -> i32 {
    let released = set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from).and_then(|()| {
        // If the shim died before the call above, nobody holds the other end any more.
        io::stdin().read_exact(&mut [0])
    });
    let (Ok(()), Some(program)) = (released, arguments.next()) else { return NOT_STARTED };
    match Command::new(&program).args(arguments).env_clear().stdin(Stdio::null()).status() {
        Ok(status) => status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1),
        Err(error) => {
            // The shim reads this as Firecracker's last words.
            let _nowhere_else =
                writeln!(io::stderr(), "starting {} failed: {error}", Path::new(&program).display());
            NOT_STARTED
        }
    }
}

/// What is started.
pub(super) struct Order {
    pub(super) entry: Entry,
    /// The jailer and its arguments.
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// A running process above Firecracker. Dropping this ends both, and waits for it.
pub(super) struct Parent {
    pub(super) pid: u32,
    child: Arc<Mutex<Child>>,
    /// How it ended, once it has.
    ended: watch::Receiver<Option<String>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the process in namespaces of its own, and whatever `place` makes in a mount namespace of its own; gives
/// what `place` gave, and the pipe by which one byte releases the process.
pub(super) fn start<T: Send + 'static>(
    order: Order,
    place: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<(Parent, T, PipeWriter)> {
    let (tell, told) = mpsc::sync_channel(1);
    let (end, ended) = watch::channel(None);
    // The kernel sends the signal for the parent's death when the thread that made the child ends. So this one
    // lives as long as the child does, and gives its namespaces to nobody else.
    let body = move || match place().and_then(|made| Ok((made, spawn(order)?))) {
        Ok((made, (child, release))) => {
            let pid = child.id();
            let child = Arc::new(Mutex::new(child));
            if tell.send(Ok((made, Arc::clone(&child), release))).is_err() {
                kill(&child);
            }
            let how = reap(pid, &child);
            end.send_replace(Some(how));
        }
        Err(error) => {
            // The caller waits for it.
            let _received = tell.send(Err(error));
        }
    };
    let doing = || "starting a thread for Firecracker".to_owned();
    let thread = thread::Builder::new().name("vmm-parent".into()).spawn(body).context(doing)?;
    let (made, child, release) = told.recv().context(doing)??;
    let pid = lock(&child).id();
    Ok((Parent { pid, child, ended, thread: Some(thread) }, made, release))
}

/// Gives the calling thread a mount namespace of its own, whose mounts the host does not see.
pub(super) fn own_mounts() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    unshare(CloneFlags::CLONE_NEWNS).context(|| "making a mount namespace".into())?;
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).context(|| "hiding our mounts".into())
}

fn spawn(order: Order) -> Result<(Child, PipeWriter)> {
    // The network namespace is empty but for its loopback device, which is down, and has no name anywhere.
    let namespaces = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).context(|| "making namespaces for Firecracker".into())?;
    let (released, release) = io::pipe().context(|| "making a pipe".into())?;
    let Some((own, first)) = order.entry.split_first() else {
        return Err(Error::internal("there is no program to stand above Firecracker"));
    };
    let child = Command::new(own)
        .arg0("bailey-vmm-parent")
        .args(first)
        .arg(order.program)
        .args(order.arguments)
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(OwnedFd::from(released))
        .stdout(order.stdout)
        .stderr(order.stderr)
        .spawn()
        .context(|| "starting the process above Firecracker".into())?;
    Ok((child, release))
}

/// Waits for the end, and gives it in words.
fn reap(pid: u32, child: &Mutex<Child>) -> String {
    // Its number stays taken until it is reaped below, under the lock: so nobody kills another's process.
    let pid = Pid::from_raw(pid.cast_signed());
    while let Err(nix::Error::EINTR) = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {}
    match lock(child).wait() {
        Ok(status) => format!("Firecracker ended: {}", describe(status)),
        Err(error) => format!("Firecracker could not be watched: {error}"),
    }
}

/// Codes above 128 are signals that ended Firecracker, as [`run`] has them.
fn describe(status: ExitStatus) -> String {
    let inner = status.code().filter(|code| (129..160).contains(code)).map(|code| code - 128);
    match status.signal().or(inner).map(Signal::try_from) {
        Some(Ok(signal)) => format!("killed by {signal}"),
        _ => status.to_string(),
    }
}

fn kill(child: &Mutex<Child>) {
    // It has ended already, which is as good.
    let _ended = lock(child).kill();
}

fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parent {
    pub(super) fn kill(&self) {
        kill(&self.child);
    }

    /// Waits until all is over; gives how, in words.
    pub(super) async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        let how = ended.wait_for(Option::is_some).await;
        how.ok().and_then(|how| how.clone()).unwrap_or_else(|| "Firecracker has ended".to_owned())
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        self.kill();
        if let Some(thread) = self.thread.take() {
            // A panic of it has been shown already.
            let _panicked = thread.join();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What stands after `--` makes this test the process above a (false) Firecracker.
    #[test]
    fn entry() {
        let mut arguments = std::env::args_os().skip_while(|argument| argument != "--");
        if arguments.next().is_some() {
            exit(run(arguments));
        }
    }

    /// Ends the process from a thread that is not its first, without running what others of its threads rely on.
    pub(in super::super) fn exit(code: i32) -> ! {
        let error = Command::new("/bin/sh").arg("-c").arg(format!("exit {code}")).exec();
        panic!("ending with {code}: {error}");
    }

    #[test]
    fn an_end_is_told_in_words() {
        assert_eq!(describe(ExitStatus::from_raw((128 + 11) << 8)), "killed by SIGSEGV");
        assert_eq!(describe(ExitStatus::from_raw(9)), "killed by SIGKILL");
        assert_eq!(describe(ExitStatus::from_raw(1 << 8)), "exit status: 1");
    }
}
