//! The control messages, on channel 0.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::ProcessId;
use super::spec::{Container, Limits, Process, Setup};

/// Host to guest. Each request is answered by one [`FromGuest::Reply`] with the same `seq`, except
/// [`ToGuest::Credit`], which is not answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToGuest {
    Request {
        seq: u64,
        request: Request,
    },
    /// The host has taken `bytes` of the stream; the guest may send as many more.
    Credit {
        channel: u32,
        bytes: u32,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Does all that a start does, once, with a program that ends by itself, and undoes it: what follows is then
    /// faster. Only before [`Request::Setup`], which comes as to a VM that has done nothing yet.
    Rehearse {
        setup: Box<Setup>,
        container: Box<Container>,
    },
    /// Makes this VM a sandbox of its own, before anything of the workload is there.
    Setup(Box<Setup>),
    /// Makes the container and its first process, which waits for [`Request::Start`].
    Create(Box<Container>),
    Start,
    /// Runs one more process in the container.
    Exec {
        id: ProcessId,
        process: Box<Process>,
    },
    Signal {
        id: ProcessId,
        signal: i32,
        all: bool,
    },
    Resize {
        id: ProcessId,
        columns: u16,
        rows: u16,
    },
    Pids,
    Stats,
    Update(Limits),
    /// Sets the clock, in nanoseconds since the epoch: after a pause.
    Clock {
        realtime_ns: u64,
    },
}

/// Guest to host. Hostile until checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromGuest {
    /// The guest is up and waits for [`Request::Setup`].
    Ready {
        version: u32,
    },
    Reply {
        seq: u64,
        result: Result<Response, GuestError>,
    },
    /// A process ended. `status` is the exit code, or 128 plus the signal that ended it.
    Exited {
        id: ProcessId,
        status: u8,
    },
    /// The kernel killed a process of the container for want of memory.
    OutOfMemory,
    /// The guest has taken `bytes` of the stream.
    Credit {
        channel: u32,
        bytes: u32,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    Done,
    /// The process's number inside the VM.
    Started {
        pid: u32,
    },
    Pids(Vec<u32>),
    Stats(Stats),
}

/// What the guest could not do: a sentence for people, lower case, naming the thing and the cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{text}")]
pub struct GuestError {
    pub kind: ErrorKind,
    pub text: String,
}

/// What kind of failure, as far as a caller acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The request cannot be met as it stands: a command that is not there, a user that is not.
    Invalid,
    /// The process is not there (any more).
    NotFound,
    /// Not now: the container is not created, or is already.
    State,
    /// The guest's own failure.
    Internal,
}

/// Usage of the container, as its own cgroup counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_us: u64,
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    pub memory_peak_bytes: u64,
    pub memory_anon_bytes: u64,
    pub memory_file_bytes: u64,
    pub memory_inactive_file_bytes: u64,
    pub memory_oom: u64,
    pub memory_oom_kill: u64,
    pub pids: u64,
    pub pids_limit: u64,
    pub io_read_bytes: u64,
    pub io_write_bytes: u64,
    pub io_reads: u64,
    pub io_writes: u64,
}

#[derive(Debug, Error)]
pub enum MessageError {
    #[error("a control message that cannot be read")]
    Malformed(#[source] postcard::Error),
    #[error("{0} bytes after a control message")]
    Trailing(usize),
}

/// The bytes of a control message.
///
/// # Panics
/// Never for the messages of this module: they hold nothing that postcard cannot write.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    postcard::to_stdvec(message).expect("messages of this module can always be written")
}

/// Reads one control message, which must fill `bytes` wholly.
///
/// # Errors
/// When the bytes are no such message or more than one.
pub fn decode<'a, M: Deserialize<'a>>(bytes: &'a [u8]) -> Result<M, MessageError> {
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(MessageError::Malformed)?;
    if rest.is_empty() { Ok(message) } else { Err(MessageError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_survives_the_wire() {
        let message = FromGuest::Reply {
            seq: 7,
            result: Err(GuestError { kind: ErrorKind::NotFound, text: "no such process".into() }),
        };
        assert_eq!(decode::<FromGuest>(&encode(&message)).unwrap(), message);
    }

    #[test]
    fn bytes_after_a_message_are_refused() {
        let mut bytes = encode(&FromGuest::OutOfMemory);
        bytes.push(0);
        assert!(matches!(decode::<FromGuest>(&bytes), Err(MessageError::Trailing(1))));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_a_message_and_never_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..512),
        ) {
            if let Ok(message) = decode::<FromGuest>(&bytes) {
                // Whatever is accepted is written again within what it came from could hold.
                prop_assert!(encode(&message).len() <= bytes.len());
            }
        }

        #[test]
        fn a_length_that_lies_is_refused(claim in 1_000u64..u64::MAX) {
            // Pids, with a count far beyond the bytes that follow.
            let mut bytes = vec![1, 0, 0, 2];
            let mut rest = claim;
            while rest >= 0x80 {
                bytes.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
                rest >>= 7;
            }
            bytes.push(u8::try_from(rest).unwrap());
            prop_assert!(decode::<FromGuest>(&bytes).is_err());
        }
    }
}
