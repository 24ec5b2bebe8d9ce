//! One process that the host asked for, and its streams as the event loop drives them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bailey_types::guest::{ProcessId, Stdio, StreamId, WINDOW};

use crate::container::Made;

pub(crate) struct Process {
    pub id: ProcessId,
    /// Its number in the VM's first pid namespace; none once it was reaped, when the number may be another's.
    pub pid: Option<i32>,
    input: Option<Input>,
    output: Option<Output>,
    error: Option<Output>,
    terminal: Option<OwnedFd>,
}

/// The way to a process: bytes that the host sent and the process has not read.
struct Input {
    file: File,
    waiting: VecDeque<u8>,
    ends: bool,
}

/// The way from a process.
struct Output {
    file: File,
    /// Bytes that the host lets us send.
    credit: u32,
}

/// What one step of a stream came to.
pub(crate) enum Step {
    /// More may follow at once.
    More,
    /// Nothing until the descriptor is ready again.
    Wait,
    /// Nothing until the host grants more.
    Starved,
    /// The stream is closed.
    Ended,
}

impl Process {
    pub(crate) fn new(id: ProcessId, made: Made) -> Process {
        let output = |fd: Option<OwnedFd>| fd.map(|fd| Output { file: fd.into(), credit: WINDOW });
        Process {
            id,
            pid: Some(made.pid),
            input: made.streams.input.map(|fd| Input {
                file: fd.into(),
                waiting: VecDeque::new(),
                ends: false,
            }),
            output: output(made.streams.output),
            error: output(made.streams.error),
            terminal: made.streams.terminal,
        }
    }

    /// The descriptor of one stream, while it is open.
    pub(crate) fn fd(&self, stdio: Stdio) -> Option<BorrowedFd<'_>> {
        match stdio {
            Stdio::In => self.input.as_ref().map(|input| input.file.as_fd()),
            Stdio::Out => self.output.as_ref().map(|output| output.file.as_fd()),
            Stdio::Err => self.error.as_ref().map(|output| output.file.as_fd()),
        }
    }

    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.terminal.as_ref().map(AsFd::as_fd)
    }

    /// Whether nothing of it is left to carry or to report.
    pub(crate) fn is_over(&self) -> bool {
        self.pid.is_none() && self.output.is_none() && self.error.is_none()
    }

    pub(crate) fn stream(&self, stdio: Stdio) -> StreamId {
        StreamId { process: self.id, stdio }
    }

    /// Takes bytes from the host for standard input; none are its end.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        if let Some(input) = &mut self.input {
            input.waiting.extend(bytes);
            input.ends |= bytes.is_empty();
        }
    }

    /// Writes what waits for standard input. Gives how many bytes the process took.
    pub(crate) fn write_input(&mut self) -> (u32, Step) {
        let Some(input) = &mut self.input else { return (0, Step::Ended) };
        let mut taken = 0;
        let step = loop {
            let (now, _) = input.waiting.as_slices();
            if now.is_empty() {
                break if input.ends { Step::Ended } else { Step::Starved };
            }
            match input.file.write(now) {
                Ok(count) => {
                    input.waiting.drain(..count);
                    taken += u32::try_from(count).unwrap_or(0);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Step::Wait,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nobody reads any more: the rest is taken, and lost, as with any pipe.
                Err(_) => {
                    taken += u32::try_from(input.waiting.len()).unwrap_or(0);
                    break Step::Ended;
                }
            }
        };
        if matches!(step, Step::Ended) {
            // A terminal has no half-closed state; its other copies stay open.
            self.input = None;
        }
        (taken, step)
    }

    /// Reads some output into `buffer`, as much as the host lets us send. Gives how many bytes it is.
    pub(crate) fn read_output(&mut self, stdio: Stdio, buffer: &mut [u8]) -> (usize, Step) {
        let slot = if stdio == Stdio::Out { &mut self.output } else { &mut self.error };
        let Some(output) = slot else { return (0, Step::Ended) };
        let most = buffer.len().min(output.credit as usize);
        if most == 0 {
            return (0, Step::Starved);
        }
        match output.file.read(&mut buffer[..most]) {
            Ok(count @ 1..) => {
                output.credit -= u32::try_from(count).unwrap_or(0);
                (count, Step::More)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => (0, Step::Wait),
            Err(error) if error.kind() == ErrorKind::Interrupted => (0, Step::More),
            // A terminal whose last user is gone reads as an I/O error.
            Ok(0) | Err(_) => {
                *slot = None;
                (0, Step::Ended)
            }
        }
    }

    /// The host lets us send more of one stream.
    pub(crate) fn grant(&mut self, stdio: Stdio, bytes: u32) {
        let slot = if stdio == Stdio::Out { &mut self.output } else { &mut self.error };
        if let Some(output) = slot {
            output.credit = output.credit.saturating_add(bytes);
        }
    }
}
