//! The two ends of a process's standard streams: the child's, and ours, which the event loop carries to the host.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;

use bailey_types::guest::spec::Process;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::error::{Context, Error, Result};

/// Pipes of a process that is about to be made. A stream that nobody asked for is the null device; one of a
/// process with a terminal is not here, since the child makes the terminal.
pub(crate) struct Pipes {
    input: Option<Pipe>,
    output: Option<Pipe>,
    error: Option<Pipe>,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

/// Our ends.
#[derive(Default)]
pub(crate) struct HostEnds {
    pub input: Option<OwnedFd>,
    pub output: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    /// The terminal, of which `input` and `output` are copies.
    pub terminal: Option<OwnedFd>,
}

impl Pipes {
    /// Makes what `spec` asks for.
    pub(crate) fn new(spec: &Process) -> Result<Pipes> {
        let wanted = |wanted: bool| -> Result<Option<Pipe>> {
            if !wanted || spec.terminal.is_some() {
                return Ok(None);
            }
            let (read, write) = pipe2(OFlag::O_CLOEXEC).context(|| "making a pipe".into())?;
            Ok(Some(Pipe { read, write }))
        };
        Ok(Pipes { input: wanted(spec.stdin)?, output: wanted(spec.stdout)?, error: wanted(spec.stderr)? })
    }

    /// Child: its ends, as descriptors 0, 1 and 2 will be.
    pub(crate) fn child_ends(self) -> Result<[OwnedFd; 3]> {
        let null = || -> Result<OwnedFd> {
            let file = OpenOptions::new().read(true).write(true).open("/dev/null");
            file.map(Into::into).context(|| "opening /dev/null".into())
        };
        let or_null = |fd: Option<OwnedFd>| fd.map_or_else(null, Ok);
        Ok([
            or_null(self.input.map(|pipe| pipe.read))?,
            or_null(self.output.map(|pipe| pipe.write))?,
            or_null(self.error.map(|pipe| pipe.write))?,
        ])
    }

    /// Parent: our ends, which never block.
    ///
    /// # Errors
    /// When a descriptor cannot be copied or changed.
    pub(crate) fn host_ends(self, terminal: Option<OwnedFd>) -> Result<HostEnds> {
        let ends = match terminal {
            None => HostEnds {
                input: self.input.map(|pipe| pipe.write),
                output: self.output.map(|pipe| pipe.read),
                error: self.error.map(|pipe| pipe.read),
                terminal: None,
            },
            Some(terminal) => {
                let copy = || terminal.try_clone().context(|| "copying the terminal".into());
                HostEnds {
                    input: Some(copy()?),
                    output: Some(copy()?),
                    error: None,
                    terminal: Some(terminal),
                }
            }
        };
        for fd in [&ends.input, &ends.output, &ends.error].into_iter().flatten() {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|cause| Error::new("unblocking a stream", cause))?;
        }
        Ok(ends)
    }
}
