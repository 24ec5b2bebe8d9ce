//! What the host (the shim) and the guest (`bailey-guest`) say to each other, over one byte stream per sandbox.
//!
//! The stream carries frames ([`frame`]). Channel 0 carries control messages ([`message`]), postcard-encoded;
//! every other channel is one stdio stream of one process ([`StreamId`]), with a window so that no stream can
//! stall another ([`WINDOW`]). The guest trusts the host. The host trusts nothing: each length is bounded here.

pub mod frame;
pub mod message;
pub mod spec;

use serde::{Deserialize, Serialize};

/// Version of this protocol. A template or guest image of another version is not used.
pub const VERSION: u32 = 2;

/// Name of the virtio-serial port that carries the stream.
pub const PORT_NAME: &str = "dev.bailey.guest";

/// Port of the guest's vsock listener that carries the stream where the VMM has vsock instead.
pub const VSOCK_PORT: u32 = 1024;

/// Largest payload that the host accepts from a guest, in bytes: what one read of a stdio stream gives.
pub const GUEST_FRAME_MAX: usize = 64 * 1024;

/// Largest payload that the guest accepts from the host, in bytes: a container with the longest environment that
/// Linux lets a process have (2 MiB of arguments and environment), and small injected files.
pub const HOST_FRAME_MAX: usize = 8 * 1024 * 1024;

/// Bytes that one side may send on a stream before the other has granted more: bounds what a babbling guest can
/// make the host hold for each stream.
pub const WINDOW: u32 = 128 * 1024;

/// Most processes (the container's first and its execs) that one sandbox may have at a time.
pub const PROCESSES_MAX: usize = 512;

/// A process that the host asked for; chosen by the host, never used twice in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId(pub u32);

impl ProcessId {
    /// The container's first process.
    pub const INIT: ProcessId = ProcessId(1);
}

/// Which of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stdio {
    In,
    Out,
    Err,
}

/// One stdio stream of one process, as a channel number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    pub process: ProcessId,
    pub stdio: Stdio,
}

impl StreamId {
    /// The channel number: the process's number times four, plus 0, 1 or 2.
    pub fn channel(self) -> u32 {
        self.process.0.wrapping_mul(4) | self.stdio as u32
    }

    /// The stream behind a channel number; none for the control channel and for numbers that mean nothing.
    pub fn from_channel(channel: u32) -> Option<StreamId> {
        let stdio = match channel % 4 {
            0 => Stdio::In,
            1 => Stdio::Out,
            2 => Stdio::Err,
            _ => return None,
        };
        let process = ProcessId(channel / 4);
        (process.0 != 0).then_some(StreamId { process, stdio })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_survives_its_channel_number() {
        for stdio in [Stdio::In, Stdio::Out, Stdio::Err] {
            let stream = StreamId { process: ProcessId(77), stdio };
            assert_eq!(StreamId::from_channel(stream.channel()), Some(stream));
        }
    }

    #[test]
    fn the_control_channel_and_the_fourth_slot_are_no_streams() {
        assert_eq!(StreamId::from_channel(0), None);
        assert_eq!(StreamId::from_channel(2), None);
        assert_eq!(StreamId::from_channel(4 * 9 + 3), None);
    }
}
