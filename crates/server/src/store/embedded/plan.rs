//! From a transaction to the changes that it makes. Reads only: what is refused here has left no trace in the batch
//! of writes of which it is a part.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::ControlFlow;

use redb::{Error as Fault, ReadableTable};

use super::tables::{Books, Tables, find, leased, scan};
use crate::store::LEASE_KEYS_MAX;
use crate::store::error::{LimitError, StoreError};
use crate::store::txn::{Op, OpReply, TXN_CHANGES_MAX, Txn, TxnReply};
use crate::store::value::{Key, KeyValue, LeaseId, Prefix, Revision, Span};
use crate::store::watch::{Batch, Event};

/// What becomes of one key.
struct Change {
    /// None: it is deleted.
    item: Option<KeyValue>,
    /// The lease that it had.
    lease_before: Option<LeaseId>,
}

/// All changes of one revision.
pub(super) struct Changes {
    revision: Revision,
    by_key: BTreeMap<Key, Change>,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The deletion of all keys of a lease.
    pub(super) fn revoke(tables: &Tables<'_>, books: &Books, lease: LeaseId) -> Result<Changes, Fault> {
        let change = || Change { item: None, lease_before: Some(lease) };
        let keys = leased(&tables.leased, lease, usize::MAX)?;
        let by_key = keys.into_iter().map(|key| (key, change())).collect();
        Ok(Changes { revision: Revision(books.revision).next(), by_key })
    }

    /// Writes them.
    pub(super) fn apply(&self, tables: &mut Tables<'_>) -> Result<(), Fault> {
        for (key, change) in &self.by_key {
            let lease = change.item.as_ref().and_then(|item| item.lease);
            tables.put(self.revision, key, change.item.as_ref())?;
            if lease == change.lease_before {
                continue;
            }
            if let Some(before) = change.lease_before {
                tables.leased.remove((before.0, key.as_bytes()))?;
            }
            if let Some(lease) = lease {
                tables.leased.insert((lease.0, key.as_bytes()), ())?;
            }
        }
        Ok(())
    }

    /// What watchers are told.
    pub(super) fn into_batch(self) -> Batch {
        let event = |(key, change): (Key, Change)| change.item.map_or(Event::Deleted(key), Event::Put);
        Batch { revision: self.revision, events: self.by_key.into_iter().map(event).collect() }
    }
}

/// Works out what a transaction answers and changes. The outer error is the file's, the inner one the caller's.
pub(super) fn transaction(
    tables: &Tables<'_>,
    books: &Books,
    txn: Txn,
) -> Result<Result<(TxnReply, Changes), StoreError>, Fault> {
    let now = Revision(books.revision);
    let mut succeeded = true;
    for compare in &txn.compare {
        succeeded &= compare.holds(find(&tables.versions, &compare.key, now)?.as_ref());
    }
    let changes = Changes { revision: now.next(), by_key: BTreeMap::new() };
    let mut plan = Plan { tables, now, changes, leased: BTreeMap::new() };
    let mut replies = Vec::new();
    for op in if succeeded { txn.then } else { txn.otherwise } {
        match plan.operation(op)? {
            Ok(reply) => replies.push(reply),
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    let changes = plan.changes;
    let revision = if changes.is_empty() { now } else { changes.revision };
    Ok(Ok((TxnReply { succeeded, revision, replies }, changes)))
}

struct Plan<'a, 'txn> {
    tables: &'a Tables<'txn>,
    /// The revision before this one.
    now: Revision,
    changes: Changes,
    /// How many keys the leases have that it uses; those that it takes away from them still count.
    leased: BTreeMap<LeaseId, usize>,
}

impl Plan<'_, '_> {
    fn operation(&mut self, op: Op) -> Result<Result<OpReply, StoreError>, Fault> {
        match op {
            Op::Put { key, value, lease } => {
                let before = find(&self.tables.versions, &key, self.now)?;
                let lease_before = before.as_ref().and_then(|before| before.lease);
                if let Some(lease) = lease
                    && let Some(refusal) = self.cannot_lease(lease, lease_before == Some(lease))?
                {
                    return Ok(Err(refusal));
                }
                let item = KeyValue {
                    value,
                    created: before.as_ref().map_or(self.changes.revision, |before| before.created),
                    modified: self.changes.revision,
                    version: before.as_ref().map_or(0, |before| before.version) + 1,
                    lease,
                    key: key.clone(),
                };
                self.changes.by_key.insert(key, Change { item: Some(item), lease_before });
                Ok(Ok(OpReply::Put))
            }
            Op::Delete(key) => {
                if self.changes.by_key.contains_key(&key) {
                    return Ok(Ok(OpReply::Deleted(0)));
                }
                let Some(before) = find(&self.tables.versions, &key, self.now)? else {
                    return Ok(Ok(OpReply::Deleted(0)));
                };
                self.changes.by_key.insert(key, Change { item: None, lease_before: before.lease });
                Ok(Ok(OpReply::Deleted(1)))
            }
            Op::DeletePrefix(prefix) => self.delete_prefix(&prefix),
            Op::Get(key) => {
                let item = match self.changes.by_key.get(&key) {
                    Some(change) => change.item.clone(),
                    None => find(&self.tables.versions, &key, self.now)?,
                };
                Ok(Ok(OpReply::Got(item)))
            }
        }
    }

    /// The transaction's check has made sure that nothing of this prefix is put by it.
    fn delete_prefix(&mut self, prefix: &Prefix) -> Result<Result<OpReply, StoreError>, Fault> {
        let by_key = &mut self.changes.by_key;
        let mut deleted = 0;
        scan(&self.tables.versions, &Span::prefix(prefix), self.now, |stored| {
            by_key.entry(stored.to_key()).or_insert_with(|| {
                deleted += 1;
                Change { item: None, lease_before: stored.lease }
            });
            if by_key.len() > TXN_CHANGES_MAX { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if by_key.len() > TXN_CHANGES_MAX {
            return Ok(Err(LimitError::ManyChanges.into()));
        }
        Ok(Ok(OpReply::Deleted(deleted)))
    }

    /// Why a key cannot go with this lease.
    fn cannot_lease(&mut self, lease: LeaseId, is_already: bool) -> Result<Option<StoreError>, Fault> {
        if self.tables.leases.get(lease.0)?.is_none() {
            return Ok(Some(StoreError::LeaseNotFound { doing: "storing a key", lease }));
        }
        if is_already {
            return Ok(None);
        }
        let count = match self.leased.entry(lease) {
            Entry::Occupied(count) => count.into_mut(),
            Entry::Vacant(unknown) => {
                unknown.insert(leased(&self.tables.leased, lease, LEASE_KEYS_MAX)?.len())
            }
        };
        if *count >= LEASE_KEYS_MAX {
            return Ok(Some(LimitError::ManyLeased { lease, most: LEASE_KEYS_MAX }.into()));
        }
        *count += 1;
        Ok(None)
    }
}
