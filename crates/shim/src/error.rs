//! One error for the shim: what was being done, what is wrong, what to do, and what kind it is for the caller.

use std::error::Error as StdError;
use std::fmt::{self, Display};

/// What a caller of the task API can tell apart, as gRPC codes do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Invalid,
    NotFound,
    AlreadyExists,
    State,
    Unavailable,
    Internal,
}

#[derive(Debug)]
pub(crate) struct Error {
    kind: Kind,
    text: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: Kind, text: impl Into<String>) -> Error {
        Error { kind, text: text.into(), source: None }
    }

    pub(crate) fn internal(text: impl Into<String>) -> Error {
        Error::new(Kind::Internal, text)
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Error {
        Error::new(Kind::Invalid, text)
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The error and its causes, joined by colons: each says only its own part.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.text.clone();
        let mut source = StdError::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

impl Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

/// Says what was being done when something failed.
pub(crate) trait Context<T> {
    /// As an internal failure.
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
    /// As a failure of this kind.
    fn context_as(self, kind: Kind, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.context_as(Kind::Internal, doing)
    }

    fn context_as(self, kind: Kind, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::new(kind, doing()).because(cause))
    }
}
