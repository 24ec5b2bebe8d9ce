//! What makes a clone of a template a machine of its own: randomness, clock, name.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::time::Duration;

use bailey_types::guest::spec::Setup;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sethostname;

use crate::error::{Context, Result};
use crate::sys;

/// Reseeds, sets the clock, takes the name.
///
/// INVARIANT: this comes before anything of the sandbox exists: every clone of a template wakes with the same
/// random state, and whatever is drawn from it before this point is known to all of them. The boot id is safe:
/// the kernel makes it when it is first read, and nothing reads it earlier.
pub(crate) fn assume(setup: &Setup) -> Result<()> {
    let random =
        OpenOptions::new().write(true).open("/dev/urandom").context(|| "opening /dev/urandom".into())?;
    sys::reseed_kernel_rng(random.as_fd(), &setup.entropy)
        .context(|| "reseeding the kernel's randomness".into())?;
    set_clock(setup.realtime_ns)?;
    sethostname(&setup.hostname).context(|| format!("setting the host name {}", setup.hostname))
}

/// Sets the time of day, in nanoseconds since the epoch.
pub(crate) fn set_clock(realtime_ns: u64) -> Result<()> {
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(Duration::from_nanos(realtime_ns)))
        .context(|| "setting the clock".into())
}
