//! The one who writes: takes what waits in the queue, and commits it together.
//!
//! A commit waits for the disk; all that has come meanwhile goes with the next one. So the more write at once, the
//! more share one wait. It is a task that hands each batch to the runtime's blocking threads, and not a thread of its
//! own, so that a runtime with a paused clock knows that there is work, and does not move its time on.

use std::sync::Arc;
use std::time::Duration;

use redb::{Database, Error as Fault};
use tokio::sync::{mpsc, oneshot};

use super::compaction;
use super::core::Core;
use super::plan::{self, Changes};
use super::tables::{Books, Tables};
use crate::store::error::{Result, StoreError};
use crate::store::txn::{Txn, TxnReply};
use crate::store::value::{LeaseId, Revision};
use crate::store::watch::Batch;

/// Most requests that wait. Who comes then waits before the queue.
pub(super) const QUEUE_MAX: usize = 1_024;
/// Most requests that are committed together.
const BATCH_MAX: usize = 512;
/// No more requests are added to a batch that has so many bytes: they are held in memory until they are committed.
const BATCH_BYTES_MAX: usize = 8 << 20;

/// Where a request is answered.
type Reply = oneshot::Sender<Result<Outcome>>;

/// What the writer is asked for.
pub(super) enum Request {
    Transact(Txn),
    Grant(Duration),
    Revoke(LeaseId),
    Compact(Revision),
    Close,
}

/// What came of a request.
pub(super) enum Outcome {
    Transacted(TxnReply),
    Granted(LeaseId),
    Done,
}

/// A request, and who waits for what comes of it. Who asked may be gone by then.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) reply: Reply,
}

impl Job {
    fn bytes(&self) -> usize {
        if let Request::Transact(txn) = &self.request { txn.bytes() } else { 0 }
    }

    /// Whether it can make the store larger. What only deletes is let through while room is short.
    fn needs_room(&self) -> bool {
        match &self.request {
            Request::Transact(txn) => txn.puts(),
            Request::Grant(_) => true,
            Request::Revoke(_) | Request::Compact(_) | Request::Close => false,
        }
    }
}

/// What others are told once a batch is committed.
#[derive(Default)]
struct News {
    batches: Vec<Batch>,
    granted: Vec<(LeaseId, Duration)>,
    revoked: Vec<LeaseId>,
    compacted: Option<Revision>,
    /// There is more to remove of what was compacted.
    more_to_remove: bool,
}

/// Writes until the store is closed, or nobody is left who could ask.
pub(super) async fn run(core: Arc<Core>, mut queue: mpsc::Receiver<Job>) {
    // After a restart, what was compacted may not all have been removed.
    let mut more_to_remove = true;
    loop {
        let first = if more_to_remove {
            queue.try_recv().ok()
        } else {
            match queue.recv().await {
                Some(job) => Some(job),
                None => break,
            }
        };
        let (jobs, close) = take_batch(&mut queue, first);
        let done = core.run("writing", move |core| Ok(commit(core, jobs))).await;
        // If the batch panicked, whoever waited for it is told by the end of its channel.
        more_to_remove = done.unwrap_or(false);
        if let Some(reply) = close {
            queue.close();
            let closed = core.run("closing the store", |core| core.close("closing the store")).await;
            drop(reply.send(closed.map(|()| Outcome::Done)));
            while let Some(job) = queue.recv().await {
                drop(job.reply.send(Err(core.closed("writing"))));
            }
            return;
        }
        if more_to_remove && queue.is_closed() && queue.is_empty() {
            break;
        }
    }
    // Nobody is left who could be told.
    let _unheard = core.run("closing the store", |core| core.close("closing the store")).await;
}

/// Takes what waits, up to a batch's bounds, or up to the wish to close.
fn take_batch(queue: &mut mpsc::Receiver<Job>, first: Option<Job>) -> (Vec<Job>, Option<Reply>) {
    let mut jobs = Vec::new();
    let mut bytes = 0;
    let mut next = first;
    while let Some(job) = next {
        if matches!(job.request, Request::Close) {
            return (jobs, Some(job.reply));
        }
        bytes += job.bytes();
        jobs.push(job);
        if jobs.len() >= BATCH_MAX || bytes >= BATCH_BYTES_MAX {
            break;
        }
        next = queue.try_recv().ok();
    }
    (jobs, None)
}

/// Commits requests together and answers them. Says whether there is more to remove of what was compacted.
fn commit(core: &Core, jobs: Vec<Job>) -> bool {
    let jobs = refuse_without_room(core, jobs);
    let (requests, replies): (Vec<Request>, Vec<Reply>) =
        jobs.into_iter().map(|job| (job.request, job.reply)).unzip();
    match core.write("writing", |database| write(database, requests)) {
        Ok((outcomes, news)) => {
            let now = core.clock.now();
            for (lease, ttl) in news.granted {
                core.book.enter(lease, ttl, now);
            }
            for lease in news.revoked {
                core.book.strike(lease);
            }
            core.hub.publish(news.batches);
            if let Some(revision) = news.compacted {
                core.hub.compact(revision.0);
            }
            for (reply, outcome) in replies.into_iter().zip(outcomes) {
                drop(reply.send(outcome));
            }
            news.more_to_remove
        }
        Err(error) => {
            for reply in replies {
                drop(reply.send(Err(error.clone())));
            }
            false
        }
    }
}

/// Refuses what would make the store larger when the disk is nearly full, before the disk does: a refusal leaves the
/// file open, and room for what deletes.
fn refuse_without_room(core: &Core, jobs: Vec<Job>) -> Vec<Job> {
    if !jobs.iter().any(Job::needs_room) || !core.place.is_short_of(core.options.reserve_bytes) {
        return jobs;
    }
    let (refused, rest): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(Job::needs_room);
    for job in refused {
        let error = StoreError::Full { doing: "writing", place: core.place.to_string(), cause: None };
        drop(job.reply.send(Err(error)));
    }
    rest
}

/// Commits requests. An error leaves none of them done.
fn write(database: &Database, requests: Vec<Request>) -> Result<(Vec<Result<Outcome>>, News), Fault> {
    let mut txn = database.begin_write()?;
    // What tenants send is in the file: a commit must not be taken for whole by its checksums alone, which are no
    // match for one who makes them up.
    txn.set_two_phase_commit(true);
    let mut news = News::default();
    let mut outcomes = Vec::with_capacity(requests.len());
    let changed = {
        let mut tables = Tables::open(&txn)?;
        let before = Books::load(&tables.meta)?;
        let mut books = before;
        for request in requests {
            outcomes.push(apply(request, &mut tables, &mut books, &mut news)?);
        }
        if compaction::is_due(&books) {
            compaction::remove_some(&mut tables, &mut books)?;
        }
        news.more_to_remove = compaction::is_due(&books);
        let changed = books != before || !news.revoked.is_empty();
        if changed {
            books.save(&mut tables.meta)?;
        }
        changed
    };
    if changed {
        txn.commit()?;
    } else {
        txn.abort()?;
    }
    Ok((outcomes, news))
}

/// Does one request. The outer error is the file's, the inner one the caller's.
fn apply(
    request: Request,
    tables: &mut Tables<'_>,
    books: &mut Books,
    news: &mut News,
) -> Result<Result<Outcome>, Fault> {
    match request {
        Request::Transact(txn) => match plan::transaction(tables, books, txn)? {
            Ok((reply, changes)) => {
                add(changes, tables, books, news)?;
                Ok(Ok(Outcome::Transacted(reply)))
            }
            Err(refusal) => Ok(Err(refusal)),
        },
        Request::Grant(ttl) => {
            books.lease += 1;
            let lease = LeaseId(books.lease);
            tables.leases.insert(lease.0, u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))?;
            news.granted.push((lease, ttl));
            Ok(Ok(Outcome::Granted(lease)))
        }
        Request::Revoke(lease) => {
            if tables.leases.remove(lease.0)?.is_none() {
                return Ok(Err(StoreError::LeaseNotFound { doing: "ending a lease", lease }));
            }
            let changes = Changes::revoke(tables, books, lease)?;
            add(changes, tables, books, news)?;
            news.revoked.push(lease);
            Ok(Ok(Outcome::Done))
        }
        Request::Compact(revision) => {
            let current = Revision(books.revision);
            if revision > current {
                return Ok(Err(StoreError::Future { doing: "compacting", asked: revision, current }));
            }
            if revision.0 > books.compacted {
                books.compacted = revision.0;
                news.compacted = Some(revision);
            }
            Ok(Ok(Outcome::Done))
        }
        // Taken out of the batch before.
        Request::Close => Ok(Ok(Outcome::Done)),
    }
}

/// Writes a revision, if there is something in it.
fn add(changes: Changes, tables: &mut Tables<'_>, books: &mut Books, news: &mut News) -> Result<(), Fault> {
    if !changes.is_empty() {
        changes.apply(tables)?;
        books.revision += 1;
        news.batches.push(changes.into_batch());
    }
    Ok(())
}
