//! The container inside the VM: the second wall, between the workload and the guest kernel's keeper.
//!
//! A container is made in two steps, as its callers expect: [`create`] makes the namespaces, the root and a first
//! process that waits; [`Waiting::start`] lets it run the workload. [`exec`] adds a process to it. Each child
//! speaks with us over a socket of packets, until running the workload's program closes it.

mod launch;
mod mounts;
mod root;
mod terminal;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bailey_types::guest::spec::{Container, Process};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use crate::error::{Context, Error, Result};
use crate::streams::{HostEnds, Pipes};
use crate::{cgroup, sys};

/// What a child says when it has done its part; anything else is what went wrong.
const DONE: &[u8] = b"\0";

/// Longest error text of a child, in bytes.
const TEXT_MAX: usize = 4096;

/// Namespaces that a container has of its own. The cgroup namespace follows once the child is in its cgroup.
const NAMESPACES: libc::c_int =
    libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;

/// A process that was just made, and our ends of its streams.
pub(crate) struct Made {
    pub pid: i32,
    pub streams: HostEnds,
}

/// A container whose first process waits for its start.
pub(crate) struct Waiting {
    sync: OwnedFd,
}

impl Waiting {
    /// Lets the first process run its program.
    ///
    /// # Errors
    /// When the program cannot be run: then the process is gone.
    pub(crate) fn start(self) -> Result<()> {
        send(self.sync.as_raw_fd(), DONE, MsgFlags::MSG_NOSIGNAL)
            .context(|| "starting the container's process".into())?;
        until_running(&self.sync)
    }
}

/// Makes the container and its first process.
pub(crate) fn create(spec: &Container) -> Result<(Made, Waiting)> {
    let (ours, theirs) = sync_pair()?;
    let pipes = Pipes::new(&spec.process)?;
    let group = cgroup::open()?;
    match sys::fork(NAMESPACES, Some(group.as_fd())).context(|| "making the container's process".into())? {
        sys::Forked::Child => {
            let result = in_new_container(spec, pipes, &theirs);
            say_and_exit(&theirs, result)
        }
        sys::Forked::Parent(pid) => {
            drop(theirs);
            let terminal = answer(&ours, spec.process.terminal.is_some());
            let terminal = terminal.inspect_err(|_| drop(sys::kill(pid, libc::SIGKILL)))?;
            let streams = pipes.host_ends(terminal)?;
            Ok((Made { pid, streams }, Waiting { sync: ours }))
        }
    }
}

fn in_new_container(spec: &Container, pipes: Pipes, sync: &OwnedFd) -> Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).context(|| "making the cgroup namespace".into())?;
    root::enter(spec)?;
    let stdio = terminal::attach(&spec.process, pipes, sync)?;
    if spec.process.terminal.is_some() {
        mounts::bind_console(&stdio)?;
    }
    root::seal(spec)?;
    launch::make_working_directory(&spec.process)?;
    // What can never run is said now, while nothing has been started.
    launch::find_program(&spec.process)?;
    say(sync, &Ok(()));
    let mut byte = [0; 1];
    match recv(sync.as_raw_fd(), &mut byte, MsgFlags::empty()) {
        Ok(1..) => {}
        // The host has thought better of it.
        Ok(0) | Err(_) => std::process::exit(0),
    }
    if spec.init {
        return launch::under_init(&spec.process, stdio);
    }
    launch::run(&spec.process, stdio)
}

/// Runs one more process in the container whose first process is `init`.
pub(crate) fn exec(init: i32, spec: &Process) -> Result<Made> {
    let (ours, theirs) = sync_pair()?;
    let pipes = Pipes::new(spec)?;
    let group = cgroup::open()?;
    let container = sys::pidfd_open(init)
        .map_err(|cause| Error::not_found("looking for the container's process", cause))?;
    let home = sys::pidfd_open(1).context(|| "looking for our own pid namespace".into())?;
    // A pid namespace is for children: ours is put back at once. So the new process is our own child, to reap.
    setns(&container, CloneFlags::CLONE_NEWPID)
        .context(|| "entering the container's pid namespace".into())?;
    let forked = sys::fork(0, Some(group.as_fd()));
    if !matches!(forked, Ok(sys::Forked::Child)) {
        setns(&home, CloneFlags::CLONE_NEWPID).context(|| "leaving the container's pid namespace".into())?;
    }
    match forked.context(|| "making a process in the container".into())? {
        sys::Forked::Child => {
            let result = in_old_container(spec, pipes, &container, &theirs);
            say_and_exit(&theirs, result)
        }
        sys::Forked::Parent(pid) => {
            drop(theirs);
            let terminal = answer(&ours, spec.terminal.is_some())?;
            until_running(&ours)?;
            Ok(Made { pid, streams: pipes.host_ends(terminal)? })
        }
    }
}

fn in_old_container(spec: &Process, pipes: Pipes, container: &OwnedFd, sync: &OwnedFd) -> Result<()> {
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    setns(container, all).context(|| "entering the container's namespaces".into())?;
    let stdio = terminal::attach(spec, pipes, sync)?;
    say(sync, &Ok(()));
    launch::run(spec, stdio)
}

fn sync_pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .context(|| "making a socket pair".into())
}

/// Child: says how its part went.
fn say(sync: &OwnedFd, result: &Result<()>) {
    let text = result.as_ref().err().map(ToString::to_string);
    let bytes = text.as_ref().map_or(DONE, |text| &text.as_bytes()[..text.len().min(TEXT_MAX)]);
    // A parent that is gone is pid 1: then so is everything.
    let _pid1_gone = send(sync.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL);
}

/// Child: only reached when the workload's program could not be run.
fn say_and_exit(sync: &OwnedFd, result: Result<()>) -> ! {
    say(sync, &result);
    std::process::exit(127)
}

/// Parent: waits until the child is ready; gives the terminal that it made.
fn answer(sync: &OwnedFd, terminal: bool) -> Result<Option<OwnedFd>> {
    let (text, terminal) = terminal::receive(sync, terminal, TEXT_MAX)?;
    match text.as_slice() {
        DONE => Ok(terminal),
        [] => Err(Error::new("making the container", "its first process ended without a word")),
        text => Err(Error::invalid("making the container", String::from_utf8_lossy(text))),
    }
}

/// Parent: waits until the child has become the workload's program, which closes its end.
fn until_running(sync: &OwnedFd) -> Result<()> {
    let mut text = [0; TEXT_MAX];
    let count = recv(sync.as_raw_fd(), &mut text, MsgFlags::empty())
        .context(|| "waiting for the process to run its program".into())?;
    if count == 0 {
        return Ok(());
    }
    Err(Error::invalid("running the process", String::from_utf8_lossy(&text[..count])))
}
