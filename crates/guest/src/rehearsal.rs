//! A rehearsal: everything that a start does, with a program that ends at once, and undone again.
//!
//! A VM that waits for its sandbox does it, so that the real start finds warm what is slow the first time: under
//! emulation all code that has to be translated, everywhere what the kernel sets up when it is first used.

use bailey_types::guest::spec::{Container, Setup};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, read};

use crate::container::{self, Made};
use crate::disk::Disks;
use crate::error::{Context, Error, Result};
use crate::{cgroup, identity};

/// Sets up, makes a container, runs it to its end, and takes all of that away.
///
/// # Errors
/// Whatever fails leaves the VM as it is then: it is of no use any more.
pub(crate) fn rehearse(disks: &mut Disks, setup: &Setup, container: &Container) -> Result<()> {
    identity::assume(setup)?;
    disks.mount_root(&setup.root, &setup.scratch)?;
    cgroup::create()?;
    cgroup::set(&container.limits)?;
    let memory_events = cgroup::open_memory_events()?;
    let (Made { pid, streams }, waiting) = container::create(container)?;
    waiting.start()?;
    let end = waitpid(Pid::from_raw(pid), None).context(|| "waiting for the rehearsal's end".into())?;
    let said = streams.output.as_ref().map_or(Ok(0), |output| read(output, &mut [0; 64]));
    if !matches!((end, said), (WaitStatus::Exited(_, 0), Ok(1..))) {
        return Err(Error::new(
            "rehearsing a start",
            format!("its program ended with {end:?} and said {said:?}"),
        ));
    }
    drop((streams, memory_events));
    cgroup::remove()?;
    disks.unmount_root()
}
