//! The embedded store: one process, one file, on redb.
//!
//! One task writes, and commits together what waits for it (`writer`); everybody reads from snapshots. Each version of
//! each key is kept until it is compacted (`tables`). `core` owns the open file and knows what to do when it fails.

mod compaction;
mod core;
#[cfg(test)]
mod disk_model;
mod file;
mod hub;
mod leases;
mod plan;
mod snapshot;
mod tables;
#[cfg(test)]
mod tests;
mod watcher;
mod writer;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redb::Error as Fault;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use self::core::Core;
use self::file::Place;
use self::tables::{LEASED, Snapshot, VERSIONS, find, scan};
use self::watcher::Watcher;
use self::writer::{Job, Outcome, Request};
use super::clock::Clock;
use super::error::{LimitError, OpenError, Result, StoreError};
use super::txn::{Txn, TxnReply};
use super::value::{Key, LeaseId, Prefix, Revision};
use super::watch::Watch;
use super::{
    GetReply, LEASE_TTL_MAX, LEASE_TTL_MIN, LeaseStatus, PAGE_BYTES_MAX, PAGE_KEYS_MAX, Range, RangeReply,
    Store,
};

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most memory for pages of the file, in bytes.
    pub cache_bytes: usize,
    /// When the disk has less than this free, in bytes, what makes the store larger is refused.
    pub reserve_bytes: u64,
    /// Whether the whole file is read, and its checksums compared, before it is used.
    pub verify: bool,
    /// Most revisions that are kept in memory for watchers; the usual number without.
    pub recent_revisions: Option<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options { cache_bytes: 128 << 20, reserve_bytes: 64 << 20, verify: true, recent_revisions: None }
    }
}

/// A store in one file, or in memory.
pub struct EmbeddedStore {
    core: Arc<Core>,
    queue: mpsc::Sender<Job>,
    keeper: JoinHandle<()>,
}

impl EmbeddedStore {
    /// Opens the store in a file, or makes one there. Must be called in a tokio runtime.
    pub async fn open(
        path: &Path,
        options: Options,
        clock: Arc<dyn Clock>,
    ) -> Result<EmbeddedStore, OpenError> {
        EmbeddedStore::start(Place::File(path.to_owned()), options, clock).await
    }

    /// Makes a store in memory, which is gone when it is dropped: for tests and simulations. All its work is done where
    /// it is asked for, and nothing in it depends on real time.
    pub async fn in_memory(clock: Arc<dyn Clock>) -> Result<EmbeddedStore, OpenError> {
        EmbeddedStore::start(Place::Memory, Options { verify: false, ..Options::default() }, clock).await
    }

    async fn start(
        place: Place,
        options: Options,
        clock: Arc<dyn Clock>,
    ) -> Result<EmbeddedStore, OpenError> {
        let path = if let Place::File(path) = &place { path.clone() } else { "(memory)".into() };
        let core = if matches!(place, Place::Memory) {
            Core::open(place, options, clock)?
        } else {
            // Reading a whole file takes its time.
            let open = tokio::task::spawn_blocking(move || Core::open(place, options, clock));
            open.await.map_err(|error| OpenError::Corrupt { path, cause: Arc::new(error) })??
        };
        let core = Arc::new(core);
        let (queue, jobs) = mpsc::channel(writer::QUEUE_MAX);
        tokio::spawn(writer::run(Arc::clone(&core), jobs));
        let keeper = tokio::spawn(leases::keep(Arc::clone(&core), queue.downgrade()));
        Ok(EmbeddedStore { core, queue, keeper })
    }

    /// Copies the whole store to a new file, as of one moment, while it goes on. The copy can be opened as a store.
    /// Returns the revision that it has.
    pub async fn snapshot_to(&self, path: &Path) -> Result<Revision> {
        let path = path.to_owned();
        self.read("taking a snapshot", move |snapshot| Ok(snapshot::copy(snapshot, &path))).await
    }

    /// Commits what is under way, ends all watches, and lets go of the file: after this it can be opened again.
    pub async fn close(&self) -> Result<()> {
        self.keeper.abort();
        self.ask("closing the store", Request::Close).await.map(drop)
    }

    async fn read<T: Send + 'static>(
        &self,
        doing: &'static str,
        read: impl Fn(&Snapshot) -> Result<Result<T>, Fault> + Send + 'static,
    ) -> Result<T> {
        self.core.run(doing, move |core| core.read(doing, read)).await
    }

    async fn ask(&self, doing: &'static str, request: Request) -> Result<Outcome> {
        let (reply, answer) = oneshot::channel();
        if self.queue.send(Job { request, reply }).await.is_err() {
            return Err(self.core.closed(doing));
        }
        match answer.await {
            Ok(result) => result,
            Err(_) => Err(self.core.unavailable(doing, "the write broke off: read, and try again", None)),
        }
    }
}

impl Drop for EmbeddedStore {
    /// The writer ends by itself when nobody can ask it any more.
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &Key) -> Result<GetReply> {
        let key = key.clone();
        let read = move |snapshot: &Snapshot| {
            let revision = Revision(snapshot.books.revision);
            let item = find(&snapshot.txn.open_table(VERSIONS)?, &key, revision)?;
            Ok(Ok(GetReply { revision, item }))
        };
        self.read("reading a key", read).await
    }

    async fn range(&self, range: &Range) -> Result<RangeReply> {
        if range.limit == 0 {
            return Err(LimitError::NoLimit.into());
        }
        let range = range.clone();
        self.read("reading a range", move |snapshot| page(snapshot, &range)).await
    }

    async fn transact(&self, txn: Txn) -> Result<TxnReply> {
        txn.check()?;
        let doing = "applying a transaction";
        match self.ask(doing, Request::Transact(txn)).await? {
            Outcome::Transacted(reply) => Ok(reply),
            Outcome::Granted(_) | Outcome::Done => Err(self.core.closed(doing)),
        }
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Box<dyn Watch>> {
        Ok(Box::new(Watcher::start(&self.core, prefix, from).await?))
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        self.ask("compacting", Request::Compact(revision)).await.map(drop)
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId> {
        if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&ttl) {
            return Err(LimitError::LeaseTime { asked_ms: ttl.as_millis() }.into());
        }
        let doing = "granting a lease";
        match self.ask(doing, Request::Grant(ttl)).await? {
            Outcome::Granted(lease) => Ok(lease),
            Outcome::Transacted(_) | Outcome::Done => Err(self.core.closed(doing)),
        }
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration> {
        let kept = self.core.book.keep_alive(lease, self.core.clock.now());
        kept.ok_or(StoreError::LeaseNotFound { doing: "keeping a lease alive", lease })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<()> {
        self.ask("ending a lease", Request::Revoke(lease)).await.map(drop)
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<LeaseStatus> {
        let doing = "asking for a lease's time";
        let remaining = self.core.book.remaining(lease, self.core.clock.now());
        let (granted, remaining) = remaining.ok_or(StoreError::LeaseNotFound { doing, lease })?;
        let read = move |snapshot: &Snapshot| {
            Ok(Ok(tables::leased(&snapshot.txn.open_table(LEASED)?, lease, usize::MAX)?))
        };
        Ok(LeaseStatus { granted, remaining, keys: self.read(doing, read).await? })
    }
}

/// Reads a page.
fn page(snapshot: &Snapshot, range: &Range) -> Result<Result<RangeReply>, Fault> {
    let doing = "reading a range";
    let (current, compacted) = (Revision(snapshot.books.revision), Revision(snapshot.books.compacted));
    let revision = range.at.unwrap_or(current);
    if revision > current {
        return Ok(Err(StoreError::Future { doing, asked: revision, current }));
    }
    if revision < compacted {
        return Ok(Err(StoreError::Compacted { doing, asked: revision, oldest: compacted }));
    }
    let limit = range.limit.min(PAGE_KEYS_MAX);
    let span = range.after.as_ref().map_or_else(|| range.span.clone(), |key| range.span.after(key));
    let (mut items, mut bytes, mut more) = (Vec::new(), 0, false);
    scan(&snapshot.txn.open_table(VERSIONS)?, &span, revision, |stored| {
        if items.len() >= limit || bytes >= PAGE_BYTES_MAX {
            more = true;
            return ControlFlow::Break(());
        }
        let item = stored.to_item();
        bytes += item.value.len();
        items.push(item);
        ControlFlow::Continue(())
    })?;
    Ok(Ok(RangeReply { revision, items, more }))
}
