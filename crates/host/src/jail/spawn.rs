//! Starting a process in a jail, from a program with many threads.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::thread;

use nix::fcntl::{FcntlArg, Flock, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::enter::{HELPER_ARGUMENT, Message, Order};
use super::error::{BoxedError, JailError, StepContext, at};
use super::spec::{JailSpec, Layers, Report};
use super::{base, path};
use crate::sys::process::{self, ChildPlan};

/// A process that runs in a jail. Dropping this neither ends nor reaps it; when the program that spawned it ends,
/// however it ends, the kernel kills it.
#[derive(Debug)]
pub struct Jailed {
    /// The process, as the caller's process namespace numbers it.
    pub pid: Pid,
    /// A descriptor that refers to the process whatever becomes of its number.
    pub pidfd: OwnedFd,
    /// What the jail consists of.
    pub report: Report,
    /// Keeps [`base::collect`] from removing the root that the process runs in.
    _in_use: Flock<OwnedFd>,
}

impl Jailed {
    /// Sends the process a signal.
    ///
    /// # Errors
    /// `ESRCH` when it has ended and been reaped.
    pub fn kill(&self, signal: Signal) -> io::Result<()> {
        process::kill(self.pidfd.as_fd(), signal)
    }

    /// Waits, blocking the thread, until the process has ended, and reaps it.
    ///
    /// # Errors
    /// `ECHILD` when it has been reaped already.
    pub fn wait(&self) -> io::Result<WaitStatus> {
        Ok(waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED)?)
    }
}

/// Starts the program of `spec` in its jail.
///
/// Each descriptor of `fds` gets the number beside it; standard input, output and error that are not among them are
/// `/dev/null`; there are no others. `before_exec` is called with the process when it exists and has done nothing
/// yet: to put it into its cgroups.
///
/// Returns when the program has been executed. On an error nothing is left behind. Blocks for some milliseconds.
///
/// # Errors
/// See [`JailError`].
pub fn spawn(
    spec: &JailSpec,
    fds: Vec<(OwnedFd, RawFd)>,
    before_exec: impl FnOnce(Pid) -> Result<(), BoxedError>,
) -> Result<Jailed, JailError> {
    spec.validate()?;
    let in_use = base::mark_in_use(&path::open_root_owned_dir(&spec.base)?)
        .step(|| at("mark as in use", &spec.base))?;
    let mut call = prepare(spec, fds)?;
    let (pid, pidfd) = clone_in_own_thread(namespaces(&spec.layers), call.plan)?;
    // The child has its copies; with ours open, we would wait for ever for the end of the status pipe.
    drop(call.descriptors);
    drop(call.status_writer);
    let outcome = before_exec(pid).map_err(JailError::BeforeExec).and_then(|()| {
        call.release.write_all(b"1").step(|| "release the jail's helper".to_owned())?;
        let mut told = Vec::new();
        call.status.read_to_end(&mut told).step(|| "wait for the jail's helper".to_owned())?;
        understand(&told)
    });
    let ended = |why| bury(&pidfd, why);
    let report = outcome.map_err(ended)?;
    Ok(Jailed { pid, pidfd, report, _in_use: in_use })
}

/// Everything that a clone needs, and our ends of its pipes.
struct Call {
    plan: ChildPlan,
    descriptors: Vec<OwnedFd>,
    release: PipeWriter,
    status: PipeReader,
    status_writer: OwnedFd,
}

fn prepare(spec: &JailSpec, fds: Vec<(OwnedFd, RawFd)>) -> Result<Call, JailError> {
    let fds = with_standard(fds)?;
    let highest = fds.iter().map(|(_, to)| *to).max().unwrap_or(2);
    let (order_at, status_at, parent_at) = (highest + 1, highest + 2, highest + 3);
    // Above every target, so that no descriptor overwrites another one before that has been moved.
    let floor = highest + 4;
    let pipe = || io::pipe().step(|| "make a pipe to the jail's helper".to_owned());
    let ((status, status_writer), (parent, release)) = (pipe()?, pipe()?);
    let order = Order {
        spec: spec.clone(),
        layers: spec.layers.clone(),
        keep: fds.iter().map(|(_, to)| *to).collect(),
        status: status_at,
        parent: parent_at,
    };
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let program =
        nix::fcntl::open(&spec.entry, flags, Mode::empty()).step(|| at("open the helper", &spec.entry))?;
    let program = above(&program, floor)?;
    let status_writer = above(&status_writer, floor)?;
    let parent = above(&parent, floor)?;
    let mut moves = vec![(above(&write_order(&order)?, floor)?, order_at)];
    for (fd, to) in fds {
        moves.push((above(&fd, floor)?, to));
    }
    let mut descriptors: Vec<(RawFd, RawFd)> = moves.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)).collect();
    descriptors.extend([(status_writer.as_raw_fd(), status_at), (parent.as_raw_fd(), parent_at)]);
    let plan = ChildPlan {
        descriptors,
        release: parent.as_raw_fd(),
        release_writer: release.as_raw_fd(),
        status: status_writer.as_raw_fd(),
        program: program.as_raw_fd(),
        arguments: ["bailey-jail", HELPER_ARGUMENT, &order_at.to_string()]
            .into_iter()
            .map(|argument| CString::new(argument).step(|| "name the jail's helper".to_owned()))
            .collect::<Result<_, _>>()?,
    };
    let descriptors = moves.into_iter().map(|(fd, _)| fd).chain([program, parent]).collect();
    Ok(Call { plan, descriptors, release, status, status_writer })
}

/// Adds `/dev/null` for the standard descriptors that are not given, and refuses numbers given twice.
fn with_standard(mut fds: Vec<(OwnedFd, RawFd)>) -> Result<Vec<(OwnedFd, RawFd)>, JailError> {
    for standard in 0..=2 {
        if !fds.iter().any(|(_, to)| *to == standard) {
            let null = File::options().read(true).write(true).open("/dev/null");
            fds.push((null.step(|| "open /dev/null".to_owned())?.into(), standard));
        }
    }
    let mut numbers: Vec<RawFd> = fds.iter().map(|(_, to)| *to).collect();
    numbers.sort_unstable();
    if numbers.first().is_some_and(|lowest| *lowest < 0) || numbers.windows(2).any(|pair| pair[0] == pair[1])
    {
        return Err(JailError::Spec("each descriptor needs a number of its own, from 0 upwards".to_owned()));
    }
    Ok(fds)
}

fn above(fd: &impl AsFd, floor: RawFd) -> Result<OwnedFd, JailError> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(floor)).step(|| "copy a descriptor".to_owned())?;
    process::inherited(copy).step(|| "copy a descriptor".to_owned())
}

fn write_order(order: &Order) -> Result<OwnedFd, JailError> {
    let write = || -> io::Result<OwnedFd> {
        let mut file = File::from(memfd_create("jail-order", MFdFlags::MFD_CLOEXEC)?);
        serde_json::to_writer(&file, order)?;
        file.rewind()?;
        Ok(file.into())
    };
    write().step(|| "write the order for the jail's helper".to_owned())
}

/// The namespaces that the child is cloned into. Its cgroup namespace it enters itself, from its own cgroup.
fn namespaces(layers: &Layers) -> u64 {
    let mut flags = 0;
    if layers.root {
        flags |= libc::CLONE_NEWNS;
    }
    if layers.namespaces {
        flags |= libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;
    }
    flags.cast_unsigned().into()
}

/// Clones in a thread that lives as long as the child: the kernel's signal for the parent's death is sent when the
/// thread that cloned ends, and the caller's may be one of a pool that shrinks.
fn clone_in_own_thread(flags: u64, plan: ChildPlan) -> Result<(Pid, OwnedFd), JailError> {
    let (tell, told) = mpsc::sync_channel(1);
    let body = move || {
        // Neither this thread nor the child may run the handlers that the program has installed.
        let cloned = SigSet::all().thread_block().map_err(io::Error::from);
        let cloned = cloned.and_then(|()| process::clone_and_exec(flags, &plan));
        let watched = cloned.as_ref().ok().and_then(|(_, pidfd)| pidfd.try_clone().ok());
        let _the_caller_waits = tell.send(cloned);
        if let Some(child) = watched {
            wait_for_end(&child);
        }
    };
    let step = || "clone the process for the jail".to_owned();
    thread::Builder::new().name("jail-parent".to_owned()).stack_size(64 << 10).spawn(body).step(step)?;
    told.recv().map_err(io::Error::other).step(step)?.step(step)
}

fn wait_for_end(pidfd: &OwnedFd) {
    let mut ends = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    while let Err(nix::Error::EINTR) = poll(&mut ends, PollTimeout::NONE) {}
}

/// Reads what the helper told until it was replaced by the program, or ended.
fn understand(told: &[u8]) -> Result<Report, JailError> {
    if let [b'!', errno, ..] = told {
        return Err(io::Error::from_raw_os_error((*errno).into()))
            .step(|| "start the jail's helper".to_owned());
    }
    let mut report = None;
    for message in serde_json::Deserializer::from_slice(told).into_iter() {
        match message.map_err(io::Error::from).step(|| "understand the jail's helper".to_owned())? {
            Message::Report(told) => report = Some(told),
            Message::Failed(failure) => return Err(failure.into()),
        }
    }
    report.ok_or_else(|| JailError::Died("nothing said".to_owned()))
}

/// Ends and reaps the child of a spawn that failed.
fn bury(pidfd: &OwnedFd, why: JailError) -> JailError {
    let _gone_already = process::kill(pidfd.as_fd(), Signal::SIGKILL);
    let status = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
    match (why, status) {
        (JailError::Died(_), Ok(status)) => JailError::Died(format!("{status:?}")),
        (why, _) => why,
    }
}
