//! When leases end. Deadlines are in memory only: after a restart each lease has its full time again.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use super::core::Core;
use super::writer::{Job, Request};
use crate::store::clock::Moment;
use crate::store::error::ErrorKind;
use crate::store::value::LeaseId;

/// How long to wait before ending a lease is tried again, when the store could not.
const RETRY: Duration = Duration::from_secs(1);

struct Lease {
    ttl: Duration,
    deadline: Moment,
}

#[derive(Default)]
struct Leases {
    by_id: HashMap<LeaseId, Lease>,
    /// The next to end stands first. A lease whose end is under way is not here.
    by_deadline: BTreeSet<(Moment, LeaseId)>,
}

/// All leases with their deadlines.
#[derive(Default)]
pub(super) struct Book {
    leases: Mutex<Leases>,
    changed: Notify,
}

impl Book {
    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a lease that was granted.
    pub(super) fn enter(&self, id: LeaseId, ttl: Duration, now: Moment) {
        let mut leases = self.leases();
        leases.by_id.insert(id, Lease { ttl, deadline: now + ttl });
        leases.by_deadline.insert((now + ttl, id));
        self.changed.notify_one();
    }

    /// Strikes out a lease that was revoked.
    pub(super) fn strike(&self, id: LeaseId) {
        let mut leases = self.leases();
        if let Some(lease) = leases.by_id.remove(&id) {
            leases.by_deadline.remove(&(lease.deadline, id));
        }
    }

    /// Makes the book agree with what is stored: what is new has its full time.
    pub(super) fn agree_with(&self, stored: &HashMap<LeaseId, Duration>, now: Moment) {
        let known: Vec<LeaseId> = self.leases().by_id.keys().copied().collect();
        for id in known.iter().filter(|id| !stored.contains_key(id)) {
            self.strike(*id);
        }
        for (id, ttl) in stored.iter().filter(|(id, _)| !known.contains(id)) {
            self.enter(*id, *ttl, now);
        }
    }

    /// Lets a lease's time begin anew. None if it is over.
    pub(super) fn keep_alive(&self, id: LeaseId, now: Moment) -> Option<Duration> {
        let mut leases = self.leases();
        let lease = leases.by_id.get_mut(&id).filter(|lease| lease.deadline > now)?;
        let (before, ttl) = (lease.deadline, lease.ttl);
        lease.deadline = now + ttl;
        leases.by_deadline.remove(&(before, id));
        leases.by_deadline.insert((now + ttl, id));
        Some(ttl)
    }

    /// A lease's time to live, and what is left of it. None if it is over.
    pub(super) fn remaining(&self, id: LeaseId, now: Moment) -> Option<(Duration, Duration)> {
        let leases = self.leases();
        let lease = leases.by_id.get(&id).filter(|lease| lease.deadline > now)?;
        Some((lease.ttl, lease.deadline.since(now)))
    }

    fn earliest(&self) -> Option<Moment> {
        self.leases().by_deadline.first().map(|(deadline, _)| *deadline)
    }

    /// Takes out the leases whose end has come.
    fn take_ended(&self, now: Moment) -> Vec<LeaseId> {
        let mut leases = self.leases();
        let mut ended = Vec::new();
        while let Some((_, id)) = leases.by_deadline.first().filter(|(deadline, _)| *deadline <= now).copied()
        {
            leases.by_deadline.pop_first();
            ended.push(id);
        }
        ended
    }

    /// Puts a lease back that could not be ended. It stays over; only its end is tried again.
    fn try_again(&self, id: LeaseId, at: Moment) {
        let mut leases = self.leases();
        if leases.by_id.contains_key(&id) {
            leases.by_deadline.insert((at, id));
        }
    }
}

/// Ends leases when their time has come, until the store is gone.
pub(super) async fn keep(core: Arc<Core>, queue: mpsc::WeakSender<Job>) {
    loop {
        let changed = core.book.changed.notified();
        match core.book.earliest() {
            None => changed.await,
            Some(deadline) => tokio::select! {
                () = core.clock.sleep_until(deadline) => {}
                () = changed => {}
            },
        }
        let ended = core.book.take_ended(core.clock.now());
        let Some(queue) = queue.upgrade() else { return };
        let mut replies = Vec::new();
        for lease in ended {
            let (reply, answer) = oneshot::channel();
            if queue.send(Job { request: Request::Revoke(lease), reply }).await.is_err() {
                return;
            }
            replies.push((lease, answer));
        }
        for (lease, answer) in replies {
            match answer.await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.kind() == ErrorKind::LeaseNotFound => core.book.strike(lease),
                Ok(Err(_)) => core.book.try_again(lease, core.clock.now() + RETRY),
                Err(_) => return,
            }
        }
    }
}
