//! The event loop: requests from the host, ends of processes, and the streams between them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use bailey_types::guest::frame::{CONTROL, Frame};
use bailey_types::guest::message::{self, FromGuest, Request, Response, ToGuest};
use bailey_types::guest::{GUEST_FRAME_MAX, PROCESSES_MAX, ProcessId, Stdio, StreamId, VERSION};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::channel::{Channel, Got};
use crate::container::{self, Waiting};
use crate::disk::Disks;
use crate::error::{Context, Error, Result};
use crate::process::{Process, Step};
use crate::{cgroup, identity, rehearsal, sys};

/// What an event is about: a stream's channel number, shifted to leave room for these.
const TOKEN_HOST: u64 = 0;
const TOKEN_CHILD: u64 = 1;
const TOKEN_MEMORY: u64 = 2;
const TOKEN_STREAMS: u64 = 16;

pub(crate) struct Agent {
    channel: Channel,
    disks: Disks,
    epoll: Epoll,
    children: SignalFd,
    processes: BTreeMap<ProcessId, Process>,
    stage: Stage,
    memory_events: Option<File>,
    oom_kills: u64,
    buffer: Vec<u8>,
    host_watched_for_room: bool,
}

/// How far this VM has come.
enum Stage {
    /// Booted, maybe saved and cloned: nobody's yet.
    Blank,
    /// It has an identity and its disks.
    SetUp,
    Created(Waiting),
    Running,
}

impl Agent {
    /// Opens the channel and greets the host.
    pub(crate) fn new() -> Result<Agent> {
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None).context(|| "blocking SIGCHLD".into())?;
        let children = SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context(|| "watching for the ends of processes".into())?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context(|| "making the event loop".into())?;
        let channel = Channel::open()?;
        watch(&epoll, channel.fd(), TOKEN_HOST, EpollFlags::EPOLLIN)?;
        watch(&epoll, children.as_fd(), TOKEN_CHILD, EpollFlags::EPOLLIN)?;
        let mut agent = Agent {
            channel,
            disks: Disks::prepare()?,
            epoll,
            children,
            processes: BTreeMap::new(),
            stage: Stage::Blank,
            memory_events: None,
            oom_kills: 0,
            buffer: vec![0; GUEST_FRAME_MAX],
            host_watched_for_room: false,
        };
        agent.channel.send(&FromGuest::Ready { version: VERSION });
        Ok(agent)
    }

    /// Serves the host until it lets go of the channel.
    pub(crate) fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            self.flush()?;
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(cause) => return Err(Error::new("waiting for events", cause)),
            };
            for event in &events[..count] {
                match event.data() {
                    TOKEN_HOST => self.read_host()?,
                    TOKEN_CHILD => self.reap()?,
                    TOKEN_MEMORY => self.report_oom(),
                    token => self.carry(token - TOKEN_STREAMS)?,
                }
            }
        }
    }

    /// Writes what waits for the host, and watches for room when it does not take all.
    fn flush(&mut self) -> Result<()> {
        let done = self.channel.flush().context(|| "writing to the host".into())?;
        if done == self.host_watched_for_room {
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, !done);
            self.epoll
                .modify(self.channel.fd(), &mut EpollEvent::new(flags, TOKEN_HOST))
                .context(|| "watching the channel".into())?;
            self.host_watched_for_room = !done;
        }
        Ok(())
    }

    fn read_host(&mut self) -> Result<()> {
        match self.channel.read() {
            Ok(Got::Drained) => return Ok(()),
            Ok(Got::More) => {}
            Ok(Got::Closed) | Err(_) => return self.reconnect(),
        }
        while let Some(frame) = self.channel.next_frame()? {
            self.take(frame)?;
        }
        Ok(())
    }

    /// A clone of a template is let go by the template's host, and found by its own.
    fn reconnect(&mut self) -> Result<()> {
        if !matches!(self.stage, Stage::Blank) {
            return Err(Error::new("reading from the host", "it has closed the channel"));
        }
        self.channel.reconnect()?;
        watch(&self.epoll, self.channel.fd(), TOKEN_HOST, EpollFlags::EPOLLIN)?;
        self.host_watched_for_room = false;
        self.channel.send(&FromGuest::Ready { version: VERSION });
        Ok(())
    }

    fn take(&mut self, frame: Frame) -> Result<()> {
        if frame.channel == CONTROL {
            let message =
                message::decode(&frame.payload).context(|| "reading a request of the host".into())?;
            return match message {
                ToGuest::Credit { channel, bytes } => self.granted(channel, bytes),
                ToGuest::Request { seq, request } => {
                    let result = self.serve(request).map_err(Into::into);
                    self.channel.send(&FromGuest::Reply { seq, result });
                    Ok(())
                }
            };
        }
        let Some(StreamId { process, stdio: Stdio::In }) = StreamId::from_channel(frame.channel) else {
            return Err(Error::new(
                "reading from the host",
                format!("there is no channel {}", frame.channel),
            ));
        };
        if let Some(process) = self.processes.get_mut(&process) {
            process.feed(&frame.payload);
            let id = process.id;
            return self.write_input(id);
        }
        Ok(())
    }

    fn serve(&mut self, request: Request) -> Result<Response> {
        match request {
            Request::Rehearse { setup, container } => {
                if !matches!(self.stage, Stage::Blank) {
                    return Err(Error::state("rehearsing a start", "the sandbox is set up already"));
                }
                rehearsal::rehearse(&mut self.disks, &setup, &container)?;
                Ok(Response::Done)
            }
            Request::Setup(setup) => {
                if !matches!(self.stage, Stage::Blank) {
                    return Err(Error::state("setting up the sandbox", "it is set up already"));
                }
                identity::assume(&setup)?;
                self.disks.mount_root(&setup.root, &setup.scratch)?;
                self.stage = Stage::SetUp;
                Ok(Response::Done)
            }
            Request::Create(spec) => self.create(&spec),
            Request::Start => match std::mem::replace(&mut self.stage, Stage::Running) {
                Stage::Created(waiting) => waiting.start().map(|()| Response::Done),
                other => {
                    self.stage = other;
                    Err(Error::state("starting the container", "it is not waiting for its start"))
                }
            },
            Request::Exec { id, process } => {
                if !matches!(self.stage, Stage::Running) {
                    return Err(Error::state("running a process in the container", "it is not running"));
                }
                if self.processes.len() >= PROCESSES_MAX {
                    return Err(Error::state(
                        "running a process in the container",
                        "it has too many already",
                    ));
                }
                let init = self.pid_of(ProcessId::INIT)?;
                let made = container::exec(init, &process)?;
                self.adopt(id, made)
            }
            Request::Signal { id, signal, all } => self.signal(id, signal, all),
            Request::Resize { id, columns, rows } => {
                let process = self.processes.get(&id);
                let terminal = process.and_then(Process::terminal);
                let terminal =
                    terminal.ok_or_else(|| Error::not_found("sizing a terminal", "there is none"))?;
                sys::set_window_size(terminal, columns, rows).context(|| "sizing a terminal".into())?;
                Ok(Response::Done)
            }
            Request::Pids => cgroup::pids().map(Response::Pids),
            Request::Stats => Ok(Response::Stats(cgroup::stats())),
            Request::Update(limits) => cgroup::set(&limits).map(|()| Response::Done),
            Request::Clock { realtime_ns } => identity::set_clock(realtime_ns).map(|()| Response::Done),
        }
    }

    fn create(&mut self, spec: &bailey_types::guest::spec::Container) -> Result<Response> {
        if !matches!(self.stage, Stage::SetUp) {
            return Err(Error::state(
                "creating the container",
                "the sandbox is not set up, or has one already",
            ));
        }
        cgroup::create()?;
        cgroup::set(&spec.limits)?;
        let memory_events = cgroup::open_memory_events()?;
        watch(&self.epoll, memory_events.as_fd(), TOKEN_MEMORY, EpollFlags::EPOLLPRI)?;
        self.memory_events = Some(memory_events);
        let (made, waiting) = container::create(spec)?;
        self.stage = Stage::Created(waiting);
        self.adopt(ProcessId::INIT, made)
    }

    /// Takes a new process into the event loop.
    fn adopt(&mut self, id: ProcessId, made: container::Made) -> Result<Response> {
        let pid = u32::try_from(made.pid).unwrap_or(0);
        let process = Process::new(id, made);
        for stdio in [Stdio::Out, Stdio::Err] {
            if let Some(fd) = process.fd(stdio) {
                watch(&self.epoll, fd, token(process.stream(stdio)), EpollFlags::EPOLLIN)?;
            }
        }
        self.processes.insert(id, process);
        Ok(Response::Started { pid })
    }

    fn pid_of(&self, id: ProcessId) -> Result<i32> {
        let pid = self.processes.get(&id).and_then(|process| process.pid);
        pid.ok_or_else(|| Error::not_found("looking for a process of the container", "it has ended"))
    }

    fn signal(&mut self, id: ProcessId, signal: i32, all: bool) -> Result<Response> {
        if all && signal == libc::SIGKILL {
            cgroup::kill().context(|| "killing the container".into())?;
            return Ok(Response::Done);
        }
        let pids = if all { cgroup::pids()? } else { vec![u32::try_from(self.pid_of(id)?).unwrap_or(0)] };
        for pid in pids.into_iter().filter_map(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 1) {
            match sys::kill(pid, signal) {
                // It ended in between.
                Err(cause) if all && cause.raw_os_error() == Some(libc::ESRCH) => {}
                Err(cause) => return Err(Error::invalid(format!("sending signal {signal}"), cause)),
                Ok(()) => {}
            }
        }
        Ok(Response::Done)
    }

    /// Reports every process that has ended.
    fn reap(&mut self) -> Result<()> {
        while let Ok(Some(_)) = self.children.read_signal() {}
        while let Some((pid, status)) = sys::reap() {
            // What the kernel killed for want of memory is said before the end that it caused.
            self.report_oom();
            let Some(process) = self.processes.values_mut().find(|process| process.pid == Some(pid)) else {
                continue;
            };
            process.pid = None;
            let id = process.id;
            self.drain(id)?;
            self.channel.send(&FromGuest::Exited { id, status });
            self.forget_if_over(id);
        }
        Ok(())
    }

    /// Sends what a process has written up to its end, as far as the host takes it, so that its output comes
    /// before the word that it ended.
    fn drain(&mut self, id: ProcessId) -> Result<()> {
        self.read_output(id, Stdio::Out)?;
        self.read_output(id, Stdio::Err)
    }

    fn report_oom(&mut self) {
        let Some(memory_events) = &self.memory_events else { return };
        let kills = cgroup::oom_kills(memory_events);
        if kills > self.oom_kills {
            self.channel.send(&FromGuest::OutOfMemory);
        }
        self.oom_kills = kills;
    }

    fn forget_if_over(&mut self, id: ProcessId) {
        if self.processes.get(&id).is_some_and(Process::is_over) {
            self.processes.remove(&id);
        }
    }

    /// Moves bytes of one stream, whose descriptor is ready.
    fn carry(&mut self, channel: u64) -> Result<()> {
        let stream = u32::try_from(channel).ok().and_then(StreamId::from_channel);
        let Some(StreamId { process, stdio }) = stream else { return Ok(()) };
        match stdio {
            Stdio::In => self.write_input(process),
            Stdio::Out | Stdio::Err => self.read_output(process, stdio),
        }
    }

    fn write_input(&mut self, id: ProcessId) -> Result<()> {
        let Some(process) = self.processes.get_mut(&id) else { return Ok(()) };
        let stream = process.stream(Stdio::In);
        if let Some(fd) = process.fd(Stdio::In) {
            unwatch(&self.epoll, fd);
        }
        let (taken, step) = process.write_input();
        if taken > 0 {
            self.channel.send(&FromGuest::Credit { channel: stream.channel(), bytes: taken });
        }
        if let (Step::Wait, Some(fd)) = (step, process.fd(Stdio::In)) {
            watch(&self.epoll, fd, token(stream), EpollFlags::EPOLLOUT)?;
        }
        Ok(())
    }

    fn read_output(&mut self, id: ProcessId, stdio: Stdio) -> Result<()> {
        let Some(process) = self.processes.get_mut(&id) else { return Ok(()) };
        let stream = process.stream(stdio);
        if process.fd(stdio).is_none() {
            return Ok(());
        }
        loop {
            let (count, step) = process.read_output(stdio, &mut self.buffer);
            if count > 0 {
                self.channel.send_stream(stream.channel(), &self.buffer[..count]);
            }
            match step {
                Step::More => {}
                Step::Wait => return Ok(()),
                // Closing the descriptor has taken it out of the loop.
                Step::Ended => {
                    self.channel.send_stream(stream.channel(), &[]);
                    self.forget_if_over(id);
                    return Ok(());
                }
                Step::Starved => {
                    // A descriptor that hung up is ready for ever: it is not watched until there is credit.
                    if let Some(fd) = process.fd(stdio) {
                        unwatch(&self.epoll, fd);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// The host lets us send more of a stream.
    fn granted(&mut self, channel: u32, bytes: u32) -> Result<()> {
        let Some(StreamId { process: id, stdio }) = StreamId::from_channel(channel) else { return Ok(()) };
        let Some(process) = self.processes.get_mut(&id) else { return Ok(()) };
        process.grant(stdio, bytes);
        if let Some(fd) = process.fd(stdio) {
            // It may be watched already, when it never starved.
            unwatch(&self.epoll, fd);
            watch(&self.epoll, fd, token(process.stream(stdio)), EpollFlags::EPOLLIN)?;
        }
        Ok(())
    }
}

fn token(stream: StreamId) -> u64 {
    TOKEN_STREAMS + u64::from(stream.channel())
}

fn watch(epoll: &Epoll, fd: BorrowedFd<'_>, token: u64, flags: EpollFlags) -> Result<()> {
    epoll.add(fd, EpollEvent::new(flags, token)).context(|| "watching a descriptor".into())
}

/// Stops watching, if it is watched.
fn unwatch(epoll: &Epoll, fd: BorrowedFd<'_>) {
    // Not being watched is what is wanted.
    let _not_watched = epoll.delete(fd);
}
