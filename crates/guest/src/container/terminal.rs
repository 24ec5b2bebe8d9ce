//! Standard input, output and error of a process: pipes, or a terminal made inside the container.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use bailey_types::guest::spec::Process;
use nix::fcntl::{OFlag, open};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chown, setsid};

use super::DONE;
use crate::error::{Context, Error, Result};
use crate::streams::Pipes;
use crate::sys;

/// What becomes descriptors 0, 1 and 2 of the process.
pub(super) struct ChildStdio {
    pub fds: [OwnedFd; 3],
    /// The terminal's path, when it is one.
    pub terminal: Option<String>,
}

/// Child: takes its ends of the pipes, or makes a terminal and hands the other end to the parent.
pub(super) fn attach(spec: &Process, pipes: Pipes, sync: &OwnedFd) -> Result<ChildStdio> {
    setsid().context(|| "making a session".into())?;
    let Some((columns, rows)) = spec.terminal else {
        return Ok(ChildStdio { fds: pipes.child_ends()?, terminal: None });
    };
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .context(|| "opening /dev/ptmx".into())?;
    grantpt(&master).context(|| "granting the terminal".into())?;
    unlockpt(&master).context(|| "unlocking the terminal".into())?;
    let path = ptsname_r(&master).context(|| "naming the terminal".into())?;
    let terminal = open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .context(|| format!("opening the terminal {path}"))?;
    chown(path.as_str(), Some(Uid::from_raw(spec.uid)), Some(Gid::from_raw(spec.gid)))
        .context(|| format!("giving the terminal {path} to the process's user"))?;
    sys::set_window_size(terminal.as_fd(), columns, rows).context(|| "sizing the terminal".into())?;
    sys::set_controlling_terminal(terminal.as_fd()).context(|| "taking the terminal".into())?;
    let fds = [master.as_fd().as_raw_fd()];
    sendmsg::<()>(
        sync.as_raw_fd(),
        &[IoSlice::new(TERMINAL)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .context(|| "handing the terminal to the host".into())?;
    let clone = || terminal.try_clone().context(|| "copying the terminal".into());
    Ok(ChildStdio { fds: [clone()?, clone()?, clone()?], terminal: Some(path) })
}

/// What the packet with the terminal says.
const TERMINAL: &[u8] = b"\x01";

/// Parent: the child's first words, and before them the terminal if one was asked for.
pub(super) fn receive(sync: &OwnedFd, terminal: bool, max: usize) -> Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut made = None;
    loop {
        let mut text = vec![0; max];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let count = {
            let mut parts = [IoSliceMut::new(&mut text)];
            let packet =
                recvmsg::<()>(sync.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                    .context(|| "waiting for the container's process".into())?;
            for message in packet.cmsgs().context(|| "taking the terminal".into())? {
                if let ControlMessageOwned::ScmRights(fds) = message {
                    made = fds.first().copied().map(sys::adopt);
                }
            }
            packet.bytes
        };
        text.truncate(count);
        if text == TERMINAL {
            continue;
        }
        if text == DONE && terminal != made.is_some() {
            return Err(Error::new("making the container", "its terminal did not arrive"));
        }
        return Ok((text, made));
    }
}
