//! Handing a template's files over a socket: one byte asks, two descriptors answer.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use bailey_host::sys::process::inherited;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::error::{Context, Result};
use crate::vmm::Saved;

/// Asks a keeper. None when it has nothing to give (any more).
pub(super) fn take(mut stream: &UnixStream, asked: u8) -> Result<Option<Saved>> {
    let doing = || "asking a template's keeper".to_owned();
    if stream.write_all(&[asked]).is_err() {
        // It is just ending.
        return Ok(None);
    }
    let mut byte = [0];
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC);
    let Ok(message) = message else { return Ok(None) };
    let mut files: Vec<OwnedFd> = Vec::new();
    for control in message.cmsgs().context(doing)? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                files.push(inherited(fd).context(doing)?);
            }
        }
    }
    let mut files = files.into_iter();
    let (Some(memory), Some(devices)) = (files.next(), files.next()) else { return Ok(None) };
    // The keeper's descriptor and its other copies share one place to read at: this one gets its own.
    let devices = File::open(format!("/proc/self/fd/{}", devices.as_raw_fd())).context(doing)?;
    Ok(Some(Saved { memory: memory.into(), devices }))
}

/// Hands both files over.
pub(super) fn give(stream: &UnixStream, saved: &Saved) -> nix::Result<()> {
    let fds = [saved.memory.as_raw_fd(), saved.devices.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}
