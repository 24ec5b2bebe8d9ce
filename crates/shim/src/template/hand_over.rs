//! Handing descriptors over a socket: one message of bytes, and what goes with it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use bailey_host::sys::process::inherited;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::io::Interest;

use super::GIVE;
use crate::error::{Context, Error, Result};
use crate::vmm::Saved;

/// Longest message, in bytes.
const MESSAGE_MAX: usize = 64 << 10;

/// Most descriptors that go with one.
const FDS_MAX: usize = 4;

/// A message as it arrived. Without bytes: the other end is gone.
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Message> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            for number in numbers {
                fds.push(inherited(number)?);
            }
        }
    }
    let count = message.bytes;
    bytes.truncate(count);
    Ok(Message { bytes, fds })
}

/// The next message, when there is one.
pub(super) async fn next(socket: &tokio::net::UnixStream) -> Result<Message> {
    let next = socket.async_io(Interest::READABLE, || receive(socket.as_fd())).await;
    next.context(|| "reading what another process hands over".into())
}

/// Asks a keeper for its template. None when it has nothing to give (any more).
pub(super) fn take(stream: &UnixStream) -> Result<Option<Saved>> {
    let Some(message) = ask(stream, GIVE) else { return Ok(None) };
    saved(message.fds).map(|(saved, _)| saved)
}

/// Asks a keeper something; none when it is just ending.
pub(super) fn ask(stream: &UnixStream, asked: u8) -> Option<Message> {
    send(stream.as_fd(), &[asked], &[]).ok()?;
    receive(stream.as_fd()).ok()
}

/// The template that came with a message, if one did, and what else came.
pub(super) fn saved(fds: Vec<OwnedFd>) -> Result<(Option<Saved>, Vec<OwnedFd>)> {
    let mut fds = fds.into_iter();
    let (Some(memory), Some(devices)) = (fds.next(), fds.next()) else { return Ok((None, Vec::new())) };
    // The keeper's descriptor and its other copies share one place to read at: this one gets its own.
    let devices = File::open(format!("/proc/self/fd/{}", devices.as_raw_fd()))
        .context(|| "opening a template's devices".into())?;
    Ok((Some(Saved { memory: memory.into(), devices }), fds.collect()))
}

/// Hands both files of a template over.
pub(super) fn give(stream: &UnixStream, saved: &Saved) -> nix::Result<()> {
    send(stream.as_fd(), b"!", &[saved.memory.as_raw_fd(), saved.devices.as_raw_fd()])
}

/// Says that there is nothing to give.
pub(super) fn refuse(stream: &UnixStream) -> nix::Result<()> {
    send(stream.as_fd(), b"-", &[])
}

/// A message that its sender wrote as JSON.
pub(super) fn parse<T: serde::de::DeserializeOwned>(message: &Message) -> Result<T> {
    serde_json::from_slice(&message.bytes)
        .map_err(|error| Error::internal("reading a message").because(error))
}
