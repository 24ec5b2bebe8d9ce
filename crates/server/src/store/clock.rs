//! The time that leases are counted in: handed in from above, so that a test or a simulation can move it.

use std::ops::Add;
use std::time::Duration;

use async_trait::async_trait;

/// A moment on one [`Clock`]: the time since that clock's start. Never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// The moment so long after the clock's start.
    pub fn after_start(time: Duration) -> Moment {
        Moment(time)
    }

    /// How long after an earlier one this is; nothing if it is not later.
    pub fn since(self, earlier: Moment) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, time: Duration) -> Moment {
        Moment(self.0.saturating_add(time))
    }
}

/// Tells the time, and waits for it.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Moment;

    /// Returns once it is `moment` or later.
    async fn sleep_until(&self, moment: Moment);
}

/// The clock of the tokio runtime: the real one, or the paused one of a test or simulation.
#[derive(Debug)]
pub struct TokioClock {
    start: tokio::time::Instant,
}

impl TokioClock {
    /// A clock that starts now.
    #[allow(clippy::new_without_default, reason = "what a clock shows depends on when it was made")]
    pub fn new() -> TokioClock {
        TokioClock { start: tokio::time::Instant::now() }
    }
}

#[async_trait]
impl Clock for TokioClock {
    fn now(&self) -> Moment {
        Moment(self.start.elapsed())
    }

    async fn sleep_until(&self, moment: Moment) {
        tokio::time::sleep_until(self.start + moment.0).await;
    }
}
