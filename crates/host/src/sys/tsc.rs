//! The processor's time-stamp counter.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long its rate is measured: good to a few parts in ten thousand, which is what a kernel's own calibration has.
const MEASURED: Duration = Duration::from_millis(20);

/// The rate of the time-stamp counter, in kHz. Takes 20 ms.
#[must_use]
pub fn measure_khz() -> u64 {
    let (start, counted) = (Instant::now(), read());
    thread::sleep(MEASURED);
    let (elapsed, ticks) = (start.elapsed(), read() - counted);
    u64::try_from(u128::from(ticks) * 1_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX)
}

fn read() -> u64 {
    // SAFETY: the instruction is part of every x86-64 processor and has no effect on memory.
    unsafe { _rdtsc() }
}
