//! The processor time that a call of `ctr` cost all that took part: `ctr`, containerd, the shim and what it ran.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use bailey_e2e::machine::Machine;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::figures::milliseconds;
use crate::process::{self, Process};

/// Shims live on for a moment after their container.
const AFTERGLOW: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What had been spent before, and who was there.
pub struct Meter {
    before_ms: f64,
    shims: usize,
}

impl Meter {
    /// Begins to count.
    pub fn start(machine: &Machine) -> Result<Self> {
        Ok(Self { before_ms: spent_ms(machine)?, shims: reap() })
    }

    /// Waits for the end of shims that came since, and gives what was spent, in milliseconds. containerd's own part is
    /// counted in steps of ten.
    pub fn stop(self, machine: &Machine) -> Result<f64> {
        let deadline = Instant::now() + AFTERGLOW;
        while reap() > self.shims && Instant::now() < deadline {
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(spent_ms(machine)? - self.before_ms)
    }
}

/// Asks how ended shims ended, which adds their time to this process's children's, and counts those that live.
fn reap() -> usize {
    let (ended, alive): (Vec<Process>, Vec<Process>) =
        process::shims().into_iter().partition(|shim| shim.is_zombie);
    for shim in ended {
        // One that is not this process's own is not its to ask for. If it is gone all the same, its time is lost, and no more.
        let _gone = waitpid(Pid::from_raw(shim.pid), Some(WaitPidFlag::WNOHANG));
    }
    alive.len()
}

fn spent_ms(machine: &Machine) -> Result<f64> {
    let pid = machine.containerd.pid().ok_or_else(|| anyhow!("containerd does not run"))?;
    let containerd =
        Process::read(pid.as_raw()).ok_or_else(|| anyhow!("containerd is gone"))?.with_children_ms;
    Ok(children_ms()? + containerd)
}

/// The processor time of all children of this process that it has waited for.
pub fn children_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("reading processor times")?;
    let time = |value: nix::sys::time::TimeVal| {
        let seconds = Duration::from_secs(u64::try_from(value.tv_sec()).unwrap_or(0));
        seconds + Duration::from_micros(u64::try_from(value.tv_usec()).unwrap_or(0))
    };
    Ok(milliseconds(time(usage.user_time()) + time(usage.system_time())))
}
