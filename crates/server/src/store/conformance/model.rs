//! The store as simply as it can be said: every revision is kept whole, in memory. What a store answers is compared
//! with what this one answers.

use std::collections::{BTreeMap, BTreeSet};

use crate::store::{Batch, Event, Key, KeyValue, LeaseId, Op, OpReply, Prefix, Revision, Txn, TxnReply};

type Content = BTreeMap<Key, KeyValue>;

#[derive(Debug)]
pub(super) struct Model {
    /// The content at each revision: its place is its number.
    pub(super) history: Vec<Content>,
    pub(super) compacted: u64,
    pub(super) leases: BTreeSet<LeaseId>,
}

impl Model {
    pub(super) fn new() -> Model {
        Model { history: vec![Content::new()], compacted: 0, leases: BTreeSet::new() }
    }

    pub(super) fn revision(&self) -> Revision {
        Revision(self.history.len() as u64 - 1)
    }

    pub(super) fn content(&self) -> &Content {
        self.history.last().unwrap()
    }

    /// None: it is refused.
    pub(super) fn transact(&mut self, txn: &Txn) -> Option<TxnReply> {
        txn.check().ok()?;
        let before = self.content();
        let succeeded = txn.compare.iter().all(|compare| compare.holds(before.get(&compare.key)));
        let mut content = before.clone();
        let next = self.revision().next();
        let (mut replies, mut is_changed) = (Vec::new(), false);
        for op in if succeeded { &txn.then } else { &txn.otherwise } {
            replies.push(match op {
                Op::Put { key, value, lease } => {
                    if lease.is_some_and(|lease| !self.leases.contains(&lease)) {
                        return None;
                    }
                    let old = before.get(key);
                    let item = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        created: old.map_or(next, |old| old.created),
                        modified: next,
                        version: old.map_or(1, |old| old.version + 1),
                        lease: *lease,
                    };
                    content.insert(key.clone(), item);
                    is_changed = true;
                    OpReply::Put
                }
                Op::Delete(key) => OpReply::Deleted(usize::from(content.remove(key).is_some())),
                Op::DeletePrefix(prefix) => {
                    let count = content.len();
                    content.retain(|key, _| !prefix.contains(key.as_bytes()));
                    OpReply::Deleted(count - content.len())
                }
                Op::Get(key) => OpReply::Got(content.get(key).cloned()),
            });
            is_changed |= matches!(replies.last(), Some(OpReply::Deleted(1..)));
        }
        if is_changed {
            self.history.push(content);
        }
        Some(TxnReply { succeeded, revision: self.revision(), replies })
    }

    pub(super) fn revoke(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let mut content = self.content().clone();
        content.retain(|_, item| item.lease != Some(lease));
        if content.len() != self.content().len() {
            self.history.push(content);
        }
    }

    /// What a watcher from a revision sees: worked out from how the content differs.
    pub(super) fn batches(&self, prefix: &Prefix, from: Revision) -> Vec<Batch> {
        let mut batches = Vec::new();
        for (number, pair) in (1..).zip(self.history.windows(2)) {
            let (old, new) = (&pair[0], &pair[1]);
            let keys: BTreeSet<&Key> = old.keys().chain(new.keys()).collect();
            let changed = keys.into_iter().filter(|key| old.get(*key) != new.get(*key));
            let events = changed.filter(|key| prefix.contains(key.as_bytes()));
            let event =
                |key: &Key| new.get(key).map_or(Event::Deleted(key.clone()), |item| Event::Put(item.clone()));
            let events: Vec<Event> = events.map(event).collect();
            if number >= from.0 && !events.is_empty() {
                batches.push(Batch { revision: Revision(number), events });
            }
        }
        batches
    }
}
