//! The byte stream to the host: a virtio-serial port, or a vsock connection where the VMM has that instead.
//!
//! Nothing here ever blocks: what the host does not take yet waits in a buffer, whose size the streams' windows
//! bound.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use bailey_types::guest::frame::{CONTROL, Decoder, Frame, encode};
use bailey_types::guest::message::{self, FromGuest};
use bailey_types::guest::{HOST_FRAME_MAX, PORT_NAME, VSOCK_PORT};

use crate::error::{Context, Error, Result};
use crate::sys;

/// What one largest read takes, in bytes.
const READ_MAX: usize = 64 * 1024;

pub(crate) struct Channel {
    stream: fs::File,
    /// Where the next connection comes from, when the host lets go of this one: after a clone, on vsock.
    listener: Option<OwnedFd>,
    decoder: Decoder,
    out: Vec<u8>,
    written: usize,
    scratch: Vec<u8>,
}

/// What reading the channel brought.
pub(crate) enum Got {
    More,
    Drained,
    /// The host has let go of the stream.
    Closed,
}

impl Channel {
    /// Opens the port of our name, or waits for the host on vsock.
    pub(crate) fn open() -> Result<Channel> {
        if let Some(port) = find_port()? {
            let path = format!("/dev/{port}");
            let stream = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(&path)
                .context(|| format!("opening the channel to the host, {path}"))?;
            return Ok(Channel::new(stream, None));
        }
        let listener = sys::vsock_listen(VSOCK_PORT)
            .context(|| format!("there is no port {PORT_NAME}; listening on vsock port {VSOCK_PORT}"))?;
        let stream = wait_for_connection(listener.as_fd())?;
        Ok(Channel::new(stream, Some(listener)))
    }

    fn new(stream: fs::File, listener: Option<OwnedFd>) -> Channel {
        Channel {
            stream,
            listener,
            decoder: Decoder::new(HOST_FRAME_MAX),
            out: Vec::new(),
            written: 0,
            scratch: vec![0; READ_MAX],
        }
    }

    /// Waits for the host to connect anew, and forgets what the old connection left half said.
    ///
    /// # Errors
    /// When this channel has no listener: then the host is gone for good.
    pub(crate) fn reconnect(&mut self) -> Result<()> {
        let Some(listener) = self.listener.take() else {
            return Err(Error::new("reading from the host", "it has closed the channel"));
        };
        let stream = wait_for_connection(listener.as_fd())?;
        *self = Channel::new(stream, Some(listener));
        Ok(())
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Takes what the host has sent, up to one read.
    pub(crate) fn read(&mut self) -> io::Result<Got> {
        match self.stream.read(&mut self.scratch) {
            Ok(0) => Ok(Got::Closed),
            Ok(count) => {
                self.decoder.feed(&self.scratch[..count]);
                Ok(Got::More)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Got::Drained),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Got::More),
            Err(error) => Err(error),
        }
    }

    /// The next whole frame of what was read.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>> {
        self.decoder.next_frame().context(|| "reading from the host".into())
    }

    /// Queues a control message.
    pub(crate) fn send(&mut self, message: &FromGuest) {
        encode(CONTROL, &message::encode(message), &mut self.out);
    }

    /// Queues bytes of a stream; none of them are its end.
    pub(crate) fn send_stream(&mut self, channel: u32, bytes: &[u8]) {
        encode(channel, bytes, &mut self.out);
    }

    /// Writes as much as the host takes now. True when nothing is left.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(true)
    }
}

/// The device name of the virtio-serial port with our name.
fn find_port() -> Result<Option<String>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else { return Ok(None) };
    for port in ports {
        let port = port.context(|| "listing the virtio ports".into())?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(Some(port.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn wait_for_connection(listener: BorrowedFd<'_>) -> Result<fs::File> {
    loop {
        let mut waiting = [nix::poll::PollFd::new(listener, nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut waiting, nix::poll::PollTimeout::NONE)
            .context(|| "waiting for the host on vsock".into())?;
        match sys::accept(listener) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Error::new("accepting the host's connection", error)),
        }
    }
}
