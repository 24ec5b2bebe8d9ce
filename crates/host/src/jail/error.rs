//! What can go wrong when a jail is made.

use std::io;

use serde::{Deserialize, Serialize};

use super::path::PathError;

/// An error of the caller's own, kept as the source of [`JailError::BeforeExec`].
pub type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// Why no jailed process runs. Whenever one of these is returned, nothing of the jail is left behind.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The specification contradicts itself.
    #[error("check the jail's specification: {0}")]
    Spec(String),
    /// One step failed; the steps are listed, in order, in `enter.rs`.
    #[error("{step}")]
    Step {
        /// What was being done, with the path or number that it was done to.
        step: String,
        /// What the kernel, or a library, said.
        #[source]
        source: io::Error,
    },
    /// The caller's own work between the clone and the program failed.
    #[error("prepare the host for the jailed process")]
    BeforeExec(#[source] BoxedError),
    /// The helper ended without a word: this program does not call [`super::enter_if_asked`], or was killed.
    #[error("wait for the jail's helper: it ended early with {0}")]
    Died(String),
}

/// Pairs a cause with what was being done.
pub(super) trait StepContext<T> {
    /// Names the step that failed.
    fn step(self, step: impl FnOnce() -> String) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> StepContext<T> for Result<T, E> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, JailError> {
        self.map_err(|source| JailError::Step { step: step(), source: source.into() })
    }
}

impl From<PathError> for JailError {
    fn from(error: PathError) -> Self {
        let step = format!("open {} safely", error.path().display());
        Self::Step { step, source: error.into() }
    }
}

/// An error on its way through the status pipe.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    step: String,
    errno: Option<i32>,
    cause: String,
}

impl From<JailError> for Failure {
    fn from(error: JailError) -> Self {
        match error {
            JailError::Step { step, source } => {
                Self { step, errno: source.raw_os_error(), cause: source.to_string() }
            }
            other => Self { step: "make the jail".to_owned(), errno: None, cause: other.to_string() },
        }
    }
}

impl From<Failure> for JailError {
    fn from(failure: Failure) -> Self {
        let source =
            failure.errno.map_or_else(|| io::Error::other(failure.cause), io::Error::from_raw_os_error);
        Self::Step { step: failure.step, source }
    }
}

/// A path, shown in a step.
pub(super) fn at(what: &str, path: &std::path::Path) -> String {
    format!("{what} {}", path.display())
}

/// As [`at`], for two paths.
pub(super) fn from_to(what: &str, from: &std::path::Path, to: &std::path::Path) -> String {
    format!("{what} {} at {}", from.display(), to.display())
}
