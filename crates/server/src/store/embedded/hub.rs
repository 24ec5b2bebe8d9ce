//! Who watches what, and the revisions of late, which most watchers need and none should read from the file.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::store::error::StoreError;
use crate::store::value::Prefix;
use crate::store::watch::{Batch, Event};

/// Most revisions that are kept in memory.
const RECENT_MAX: usize = 8_192;
/// Most bytes of them: who is further behind reads from the file.
const RECENT_BYTES_MAX: usize = 16 << 20;

/// A watcher's place: the hub notes there from where on it has something to read.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// Nothing before this revision, and since the watcher last asked, is for it.
    pending: Mutex<Option<u64>>,
    pub(super) wake: Notify,
}

impl Slot {
    fn note(&self, revision: u64) {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(revision);
        self.wake.notify_one();
    }
}

/// What a watcher is to do next.
pub(super) enum Next {
    /// Wait until it is woken.
    Wait,
    /// Read these revisions.
    Read { from: u64, to: u64 },
    /// End.
    End(StoreError),
}

#[derive(Debug)]
struct State {
    /// The newest revision that watchers may know of.
    published: u64,
    /// All of the revisions from `recent_from` to `published`.
    recent: VecDeque<(Arc<Batch>, usize)>,
    recent_from: u64,
    recent_bytes: usize,
    slots: HashMap<Bytes, Vec<Arc<Slot>>>,
    /// How many prefixes there are of each length: a key is looked up by each of them.
    lengths: BTreeMap<usize, usize>,
    closed: Option<StoreError>,
}

#[derive(Debug)]
pub(super) struct Hub {
    limit: usize,
    state: Mutex<State>,
}

impl Hub {
    /// A hub of a store at this revision. `limit` is the most revisions to keep; less than usual in tests.
    pub(super) fn new(revision: u64, limit: Option<usize>) -> Hub {
        let state = State {
            published: revision,
            recent: VecDeque::new(),
            recent_from: revision + 1,
            recent_bytes: 0,
            slots: HashMap::new(),
            lengths: BTreeMap::new(),
            closed: None,
        };
        Hub { limit: limit.unwrap_or(RECENT_MAX), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest revision that watchers may know of.
    pub(super) fn published(&self) -> u64 {
        self.state().published
    }

    /// Adds a watcher; what was published up to now it has to read by itself: up to the revision returned.
    pub(super) fn join(&self, prefix: &Prefix) -> (Arc<Slot>, u64) {
        let slot = Arc::new(Slot::default());
        let mut state = self.state();
        let prefix = Bytes::copy_from_slice(prefix.as_bytes());
        let length = prefix.len();
        let slots = state.slots.entry(prefix).or_default();
        slots.push(Arc::clone(&slot));
        if slots.len() == 1 {
            *state.lengths.entry(length).or_default() += 1;
        }
        (slot, state.published)
    }

    /// Removes a watcher.
    pub(super) fn leave(&self, prefix: &Prefix, slot: &Arc<Slot>) {
        let mut state = self.state();
        let Some(slots) = state.slots.get_mut(prefix.as_bytes()) else { return };
        slots.retain(|one| !Arc::ptr_eq(one, slot));
        if !slots.is_empty() {
            return;
        }
        state.slots.remove(prefix.as_bytes());
        let length = prefix.as_bytes().len();
        if let Some(count) = state.lengths.get_mut(&length) {
            *count -= 1;
            if *count == 0 {
                state.lengths.remove(&length);
            }
        }
    }

    /// Tells what was committed, in order, and wakes those whom it concerns.
    pub(super) fn publish(&self, batches: Vec<Batch>) {
        let mut state = self.state();
        for batch in batches {
            let revision = batch.revision.0;
            for event in &batch.events {
                state.wake(event.key().as_bytes(), revision);
            }
            let bytes = batch.events.iter().map(bytes_of).sum();
            state.published = revision;
            state.recent_bytes += bytes;
            state.recent.push_back((Arc::new(batch), bytes));
        }
        while state.recent.len() > self.limit || state.recent_bytes > RECENT_BYTES_MAX {
            state.forget_oldest();
        }
    }

    /// Takes the file's word for what the newest revision is, after its last commit failed halfway.
    pub(super) fn resume(&self, revision: u64) {
        let mut state = self.state();
        if revision <= state.published {
            return;
        }
        let first = state.published + 1;
        state.published = revision;
        state.recent.clear();
        state.recent_bytes = 0;
        state.recent_from = revision + 1;
        for slot in state.slots.values().flatten() {
            slot.note(first);
        }
    }

    /// Forgets revisions that are compacted.
    pub(super) fn compact(&self, revision: u64) {
        let mut state = self.state();
        while state.recent.front().is_some_and(|(batch, _)| batch.revision.0 <= revision) {
            state.forget_oldest();
        }
        state.recent_from = state.recent_from.max(revision + 1);
    }

    /// Ends all watchers.
    pub(super) fn close(&self, error: StoreError) {
        let mut state = self.state();
        state.closed = Some(error);
        for slot in state.slots.values().flatten() {
            slot.wake.notify_one();
        }
    }

    /// What a watcher is to do that has read all before `position`.
    pub(super) fn next(&self, slot: &Slot, position: u64) -> Next {
        let state = self.state();
        if let Some(error) = &state.closed {
            return Next::End(error.clone());
        }
        match slot.pending.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(pending) if position.max(pending) <= state.published => {
                Next::Read { from: position.max(pending), to: state.published }
            }
            _ => Next::Wait,
        }
    }

    /// The batches of these revisions as far as they concern the prefix; none if they are not in memory any more.
    pub(super) fn recent(&self, prefix: &Prefix, from: u64, to: u64) -> Option<Vec<Batch>> {
        let batches: Vec<Arc<Batch>> = {
            let state = self.state();
            if from < state.recent_from {
                return None;
            }
            let first = state.recent.partition_point(|(batch, _)| batch.revision.0 < from);
            let batches = state.recent.iter().skip(first).map(|(batch, _)| batch);
            batches.take_while(|batch| batch.revision.0 <= to).cloned().collect()
        };
        Some(batches.iter().filter_map(|batch| filtered(batch, prefix)).collect())
    }
}

impl State {
    fn wake(&self, key: &[u8], revision: u64) {
        for length in self.lengths.keys().take_while(|length| **length <= key.len()) {
            for slot in self.slots.get(&key[..*length]).into_iter().flatten() {
                slot.note(revision);
            }
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((batch, bytes)) = self.recent.pop_front() {
            self.recent_from = batch.revision.0 + 1;
            self.recent_bytes -= bytes;
        }
    }
}

/// What of a batch concerns a prefix.
fn filtered(batch: &Batch, prefix: &Prefix) -> Option<Batch> {
    let events = batch.events.iter().filter(|event| prefix.contains(event.key().as_bytes()));
    let events: Vec<Event> = events.cloned().collect();
    (!events.is_empty()).then_some(Batch { revision: batch.revision, events })
}

fn bytes_of(event: &Event) -> usize {
    match event {
        Event::Put(item) => item.key.as_bytes().len() + item.value.len(),
        Event::Deleted(key) => key.as_bytes().len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::value::{Key, Revision};

    fn batch(revision: u64, key: &'static str) -> Batch {
        Batch { revision: Revision(revision), events: vec![Event::Deleted(Key::new(key).unwrap())] }
    }

    #[test]
    fn only_whom_it_concerns_is_woken_and_from_where_it_does() {
        let hub = Hub::new(0, None);
        let (a, b) = (Prefix::new("a/").unwrap(), Prefix::new("b/").unwrap());
        let (slot_a, _) = hub.join(&a);
        let (slot_b, _) = hub.join(&b);
        hub.publish(vec![batch(1, "a/1"), batch(2, "b/1"), batch(3, "b/2")]);
        assert!(matches!(hub.next(&slot_a, 1), Next::Read { from: 1, to: 3 }));
        assert!(matches!(hub.next(&slot_b, 1), Next::Read { from: 2, to: 3 }));
        assert!(matches!(hub.next(&slot_b, 4), Next::Wait));
        assert_eq!(hub.recent(&b, 1, 3).unwrap().len(), 2);
    }

    #[test]
    fn what_nobody_watches_leaves_nothing() {
        let hub = Hub::new(0, None);
        let prefix = Prefix::new("a").unwrap();
        let (one, _) = hub.join(&prefix);
        let (two, _) = hub.join(&prefix);
        hub.leave(&prefix, &one);
        assert_eq!(hub.state().lengths.len(), 1);
        hub.leave(&prefix, &two);
        assert!(hub.state().lengths.is_empty() && hub.state().slots.is_empty());
    }

    #[test]
    fn what_is_not_in_memory_any_more_is_not_made_up() {
        let hub = Hub::new(5, Some(2));
        hub.publish((6..10).map(|revision| batch(revision, "a")).collect());
        assert!(hub.recent(&Prefix::all(), 7, 9).is_none());
        assert_eq!(hub.recent(&Prefix::all(), 8, 9).unwrap().len(), 2);
        hub.compact(8);
        assert!(hub.recent(&Prefix::all(), 8, 9).is_none());
        assert_eq!(hub.recent(&Prefix::all(), 9, 9).unwrap().len(), 1);
    }
}
