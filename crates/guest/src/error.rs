//! One error for this program: what was being done, and why it failed. It ends as a sentence for the host.

use std::fmt::{self, Display};

use bailey_types::guest::message::{ErrorKind, GuestError};

#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    doing: String,
    cause: String,
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure of the guest's own.
    pub fn new(doing: impl Into<String>, cause: impl Display) -> Error {
        Error { kind: ErrorKind::Internal, doing: doing.into(), cause: cause.to_string() }
    }

    /// A request that cannot be met as it stands.
    pub fn invalid(doing: impl Into<String>, cause: impl Display) -> Error {
        Error { kind: ErrorKind::Invalid, ..Error::new(doing, cause) }
    }

    /// A thing that is not there.
    pub fn not_found(doing: impl Into<String>, cause: impl Display) -> Error {
        Error { kind: ErrorKind::NotFound, ..Error::new(doing, cause) }
    }

    /// A request that comes at the wrong time.
    pub fn state(doing: impl Into<String>, cause: impl Display) -> Error {
        Error { kind: ErrorKind::State, ..Error::new(doing, cause) }
    }
}

impl Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.doing, self.cause)
    }
}

impl From<Error> for GuestError {
    fn from(error: Error) -> GuestError {
        GuestError { kind: error.kind, text: error.to_string() }
    }
}

/// Says what was being done when something failed.
pub(crate) trait Context<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::new(doing(), cause))
    }
}
