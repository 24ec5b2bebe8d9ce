//! The revisioned store: where the control plane keeps what it must not forget.
//!
//! It follows etcd's model. Every transaction that changes something makes one new [`Revision`] of the whole store; old
//! revisions can be read until they are compacted; a watcher sees each change from any revision that is still there,
//! in order, without a gap; a lease takes its keys away when nobody keeps it alive.
//!
//! This module owns the interface and the values in it. It must never depend on an implementation: whoever uses the
//! store takes a `dyn Store`. [`embedded`] keeps it in one file. `conformance` is the suite that every implementation
//! passes. docs/store.md says what is guaranteed.

pub mod clock;
#[cfg(test)]
mod conformance;
pub mod embedded;
mod error;
mod txn;
mod value;
mod watch;

use std::time::Duration;

use async_trait::async_trait;

pub use error::{Cause, ErrorKind, LimitError, OpenError, Result, StoreError};
pub use txn::{
    Compare, Op, OpReply, Relation, Subject, TXN_BYTES_MAX, TXN_CHANGES_MAX, TXN_PARTS_MAX, Txn, TxnReply,
};
pub use value::{KEY_BYTES_MAX, Key, KeyValue, LeaseId, Prefix, Revision, Span, VALUE_BYTES_MAX};
pub use watch::{Batch, Event, Watch};

/// Most keys in one page. More may be asked for, and then there is [`RangeReply::more`].
pub const PAGE_KEYS_MAX: usize = 10_000;
/// A page ends with the value that brings it to so many bytes.
pub const PAGE_BYTES_MAX: usize = 4 << 20;
/// Shortest time to live of a lease: below, a busy network alone would end it.
pub const LEASE_TTL_MIN: Duration = Duration::from_secs(1);
/// Longest time to live of a lease: what shall stay longer needs no lease.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Most keys of one lease: they all go in one revision.
pub const LEASE_KEYS_MAX: usize = 10_000;

/// Which keys to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// From where to where.
    pub span: Span,
    /// Only keys behind this one: the last key of the page before.
    pub after: Option<Key>,
    /// Most keys to give; at least 1.
    pub limit: usize,
    /// As of which revision; without, the newest. For the second page: that of the first.
    pub at: Option<Revision>,
}

impl Range {
    /// The first page of the keys with a prefix, as they are now.
    pub fn prefix(prefix: &Prefix) -> Range {
        Range { span: Span::prefix(prefix), after: None, limit: PAGE_KEYS_MAX, at: None }
    }

    /// The page behind this one, at the same revision; none if there is no more.
    #[must_use]
    pub fn next(&self, reply: &RangeReply) -> Option<Range> {
        let last = reply.items.last().filter(|_| reply.more)?;
        Some(Range { after: Some(last.key.clone()), at: Some(reply.revision), ..self.clone() })
    }
}

/// A page of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeReply {
    /// As of which revision this is. Watching from the next one misses nothing.
    pub revision: Revision,
    /// The keys, in order.
    pub items: Vec<KeyValue>,
    /// Whether there are more behind the last one.
    pub more: bool,
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetReply {
    /// As of which revision this is. Watching from the next one misses nothing.
    pub revision: Revision,
    /// What is stored there.
    pub item: Option<KeyValue>,
}

/// A lease, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseStatus {
    /// The time to live with which it was granted.
    pub granted: Duration,
    /// What is left of it.
    pub remaining: Duration,
    /// The keys that go with it, in order.
    pub keys: Vec<Key>,
}

/// A revisioned store of keys and values.
///
/// What a call has answered is durable, and every later call sees it. A call that fails with `Unavailable`, or whose
/// future is dropped, may have been done or not: put a comparison into the transaction where that matters.
#[async_trait]
pub trait Store: Send + Sync {
    /// Reads one key.
    async fn get(&self, key: &Key) -> Result<GetReply>;

    /// Reads a page of keys, now or as of an old revision.
    async fn range(&self, range: &Range) -> Result<RangeReply>;

    /// Compares, and does one of two lists of operations, at once. All changes get one revision.
    async fn transact(&self, txn: Txn) -> Result<TxnReply>;

    /// Watches the keys with a prefix: first what has happened since `from` (with it), then what happens.
    /// `from` may lie in the future.
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Box<dyn Watch>>;

    /// Forgets what was before a revision: from then on, only this one and later ones can be read, and only later ones
    /// be watched from. That it was already compacted so far is no error.
    async fn compact(&self, revision: Revision) -> Result<()>;

    /// Grants a lease, which ends after this time unless it is kept alive.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Lets a lease's time begin anew, and says how long it is.
    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration>;

    /// Ends a lease: its keys are deleted, all in one revision.
    async fn revoke(&self, lease: LeaseId) -> Result<()>;

    /// Says how long a lease has still to live, and what goes with it.
    async fn time_to_live(&self, lease: LeaseId) -> Result<LeaseStatus>;
}
