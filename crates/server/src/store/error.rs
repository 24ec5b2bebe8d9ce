//! What can go wrong, by subject: limits that a request breaks, opening a store, and using one.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::Arc;

use super::txn::{TXN_BYTES_MAX, TXN_CHANGES_MAX, TXN_PARTS_MAX};
use super::value::{KEY_BYTES_MAX, Key, LeaseId, Revision, VALUE_BYTES_MAX};

/// What kind of thing went wrong. Callers decide by it; it stays the same when a message changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself makes no sense.
    Invalid,
    /// Something in the request is over a limit.
    TooLarge,
    /// That part of history is no longer there.
    Compacted,
    /// That revision is not there yet.
    Future,
    /// There is no such lease, or it has expired.
    LeaseNotFound,
    /// There is no room on the disk. Nothing of the request was done.
    Full,
    /// The store cannot be used now. A write may have been done, or not.
    Unavailable,
    /// What is stored does not make sense.
    Corrupt,
    /// Another process has the file open.
    Locked,
    /// A newer version has written the file.
    NewerFormat,
    /// The file must not exist, and does.
    Exists,
}

/// A request over a limit, or one that contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// No bytes.
    #[error("reading a key: it is empty; name at least one byte")]
    EmptyKey,
    /// Too many bytes.
    #[error("reading a key or prefix: it has {length} bytes, the most is {KEY_BYTES_MAX}; use a shorter one")]
    LongKey {
        /// Its length.
        length: usize,
    },
    /// A value with too many bytes.
    #[error(
        "checking a transaction: the value for {key} has {length} bytes, the most is {VALUE_BYTES_MAX}; \
         store it in parts, or elsewhere"
    )]
    LargeValue {
        /// Where it was to go.
        key: Key,
        /// Its length.
        length: usize,
    },
    /// All keys and values together are too many bytes.
    #[error(
        "checking a transaction: its keys and values have {length} bytes, the most is {TXN_BYTES_MAX}; \
         use several transactions"
    )]
    LargeTxn {
        /// The bytes of all keys and values.
        length: usize,
    },
    /// Too many comparisons or operations.
    #[error(
        "checking a transaction: one of its lists has {count} parts, the most is {TXN_PARTS_MAX}; \
         use several transactions"
    )]
    LongTxn {
        /// How many there are.
        count: usize,
    },
    /// A deletion of too many keys.
    #[error(
        "applying a transaction: it would change more than {TXN_CHANGES_MAX} keys; delete by longer prefixes, \
         in several transactions"
    )]
    ManyChanges,
    /// One key would be changed twice at the same revision.
    #[error("checking a transaction: it changes {key} twice; leave the last change only")]
    Twice {
        /// The key.
        key: Key,
    },
    /// A page without room.
    #[error("checking a range: its limit is 0; ask for at least one key")]
    NoLimit,
    /// A time to live that no lease can have.
    #[error("granting a lease: {asked_ms} ms is no time to live; ask for 1 second to 30 days")]
    LeaseTime {
        /// What was asked for.
        asked_ms: u128,
    },
    /// A lease with too many keys.
    #[error(
        "applying a transaction: lease {lease} would have more than {most} keys; grant another lease for the others"
    )]
    ManyLeased {
        /// The lease.
        lease: LeaseId,
        /// The most.
        most: usize,
    },
}

impl LimitError {
    /// What kind this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            LimitError::EmptyKey
            | LimitError::Twice { .. }
            | LimitError::NoLimit
            | LimitError::LeaseTime { .. } => ErrorKind::Invalid,
            LimitError::LongKey { .. }
            | LimitError::LargeValue { .. }
            | LimitError::LargeTxn { .. }
            | LimitError::LongTxn { .. }
            | LimitError::ManyChanges
            | LimitError::ManyLeased { .. } => ErrorKind::TooLarge,
        }
    }
}

/// An error below the store, of which every one who waited for the same write gets a copy.
pub type Cause = Arc<dyn StdError + Send + Sync>;

/// A store that could not be opened, or copied.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// It is in use.
    #[error(
        "opening the store {path}: another process has it open; stop that process, or name another file",
        path = path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// It is too new.
    #[error(
        "opening the store {path}: it has format {found}, and this program knows no newer one than {known}; \
         run the program that wrote it, or restore a snapshot of before the upgrade",
        path = path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The newest format that is known here.
        known: u64,
    },
    /// It is something else.
    #[error(
        "opening the store {path}: it is no store, or was never finished; name another file, or restore a snapshot",
        path = path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It is damaged.
    #[error("opening the store {path}: what it holds is damaged; restore a snapshot", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        #[source]
        cause: Cause,
    },
    /// Its disk is full.
    #[error("opening the store {path}: its disk is full; make room, and start again", path = path.display())]
    Full {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: Cause,
    },
    /// The system refused.
    #[error("opening the store {path}: the system refused; check its folder and disk", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: Cause,
    },
    /// A snapshot's file is there already.
    #[error("taking a snapshot to {path}: the file exists; remove it, or name another one", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

impl OpenError {
    /// What kind this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            OpenError::Locked { .. } => ErrorKind::Locked,
            OpenError::NewerFormat { .. } => ErrorKind::NewerFormat,
            OpenError::Foreign { .. } | OpenError::Corrupt { .. } => ErrorKind::Corrupt,
            OpenError::Full { .. } => ErrorKind::Full,
            OpenError::Io { .. } => ErrorKind::Unavailable,
            OpenError::Exists { .. } => ErrorKind::Exists,
        }
    }
}

/// An operation on the store that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The request is over a limit, or contradicts itself.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A snapshot could not be made, or the store not be opened again.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// History begins later.
    #[error(
        "{doing} at revision {asked}: history before {oldest} has been compacted; read what is there now, \
         and go on from the revision of that answer"
    )]
    Compacted {
        /// What was being done.
        doing: &'static str,
        /// The revision that was asked for.
        asked: Revision,
        /// The oldest that is still there.
        oldest: Revision,
    },
    /// History has not come so far.
    #[error("{doing} at revision {asked}: the store is at {current}; ask for that one or an older one")]
    Future {
        /// What was being done.
        doing: &'static str,
        /// The revision that was asked for.
        asked: Revision,
        /// The newest there is.
        current: Revision,
    },
    /// There is no such lease.
    #[error("{doing} with lease {lease}: there is none, or it has expired; grant a new one")]
    LeaseNotFound {
        /// What was being done.
        doing: &'static str,
        /// The lease.
        lease: LeaseId,
    },
    /// The disk has no room.
    #[error("{doing}: the disk of {place} is full, nothing was written; make room, then try again")]
    Full {
        /// What was being done.
        doing: &'static str,
        /// The file.
        place: String,
        /// What the system said; none if it was not tried.
        #[source]
        cause: Option<Cause>,
    },
    /// The store cannot be used.
    #[error("{doing}: {place} cannot be used; {remedy}")]
    Unavailable {
        /// What was being done.
        doing: &'static str,
        /// The file.
        place: String,
        /// What to do.
        remedy: &'static str,
        /// What the system said.
        #[source]
        cause: Option<Cause>,
    },
    /// What is stored makes no sense.
    #[error("{doing}: what {place} holds is damaged; stop this program, and restore a snapshot")]
    Corrupt {
        /// What was being done.
        doing: &'static str,
        /// The file.
        place: String,
        /// What was found.
        #[source]
        cause: Option<Cause>,
    },
}

impl StoreError {
    /// What kind this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            StoreError::Limit(error) => error.kind(),
            StoreError::Open(error) => error.kind(),
            StoreError::Compacted { .. } => ErrorKind::Compacted,
            StoreError::Future { .. } => ErrorKind::Future,
            StoreError::LeaseNotFound { .. } => ErrorKind::LeaseNotFound,
            StoreError::Full { .. } => ErrorKind::Full,
            StoreError::Unavailable { .. } => ErrorKind::Unavailable,
            StoreError::Corrupt { .. } => ErrorKind::Corrupt,
        }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(&self) -> bool {
        match self.kind() {
            ErrorKind::Full | ErrorKind::Unavailable | ErrorKind::Locked | ErrorKind::Future => true,
            ErrorKind::Invalid
            | ErrorKind::TooLarge
            | ErrorKind::Compacted
            | ErrorKind::LeaseNotFound
            | ErrorKind::Corrupt
            | ErrorKind::NewerFormat
            | ErrorKind::Exists => false,
        }
    }
}

/// What an operation on the store gives.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;
