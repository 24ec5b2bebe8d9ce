//! A watcher: reads history from the file until it has caught up, then what the hub has in memory. It takes what it
//! has not read yet from there at its own pace; nobody waits for it.

use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use redb::Error as Fault;

use super::core::Core;
use super::hub::{Next, Slot};
use super::tables::{CHANGES, Snapshot, VERSIONS, find};
use crate::store::error::{Result, StoreError};
use crate::store::value::{Key, Prefix, Revision};
use crate::store::watch::{Batch, Event, Watch};

/// Most changes that are looked at in one reading of history. A revision is never cut in two.
const PIECE: usize = 4_096;
/// A reading ends with the revision that brings it to so many bytes of values.
const PIECE_BYTES: usize = 4 << 20;

pub(super) struct Watcher {
    core: Arc<Core>,
    prefix: Prefix,
    slot: Arc<Slot>,
    /// All before this has been read.
    position: u64,
    /// Up to here there may be something to read.
    upto: u64,
    ready: VecDeque<Batch>,
    ended: Option<StoreError>,
}

impl Watcher {
    pub(super) async fn start(core: &Arc<Core>, prefix: &Prefix, from: Revision) -> Result<Watcher> {
        let (slot, upto) = core.hub.join(prefix);
        let watcher = Watcher {
            core: Arc::clone(core),
            prefix: prefix.clone(),
            slot,
            // There is no revision 0 to watch.
            position: from.0.max(1),
            upto,
            ready: VecDeque::new(),
            ended: None,
        };
        let first = watcher.position;
        core.run(DOING, move |core| core.read(DOING, |snapshot| Ok(check(snapshot, first)))).await?;
        Ok(watcher)
    }

    /// Gets batches ready, or waits. Its own fields say at each wait how far it is, so it may be dropped there.
    async fn advance(&mut self) -> Result<()> {
        if self.position > self.upto {
            match self.core.hub.next(&self.slot, self.position) {
                Next::Read { from, to } => (self.position, self.upto) = (from, to),
                Next::Wait => self.slot.wake.notified().await,
                Next::End(error) => return Err(error),
            }
            return Ok(());
        }
        if let Some(batches) = self.core.hub.recent(&self.prefix, self.position, self.upto) {
            self.ready.extend(batches);
            self.position = self.upto + 1;
            return Ok(());
        }
        let (prefix, from, to) = (self.prefix.clone(), self.position, self.upto);
        let read = move |core: &Core| core.read(DOING, |snapshot| history(snapshot, &prefix, from, to));
        let (batches, next) = self.core.run(DOING, read).await?;
        self.ready.extend(batches);
        self.position = next;
        Ok(())
    }
}

const DOING: &str = "watching";

#[async_trait]
impl Watch for Watcher {
    async fn next(&mut self) -> Result<Batch> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            if let Some(error) = &self.ended {
                return Err(error.clone());
            }
            if let Err(error) = self.advance().await {
                self.ended = Some(error);
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.core.hub.leave(&self.prefix, &self.slot);
    }
}

fn check(snapshot: &Snapshot, from: u64) -> Result<()> {
    let compacted = snapshot.books.compacted;
    if from > compacted {
        return Ok(());
    }
    Err(StoreError::Compacted { doing: DOING, asked: Revision(from), oldest: Revision(compacted).next() })
}

/// The batches of a prefix between two revisions, and from where to read on.
fn history(
    snapshot: &Snapshot,
    prefix: &Prefix,
    from: u64,
    to: u64,
) -> Result<Result<(Vec<Batch>, u64)>, Fault> {
    if let Err(error) = check(snapshot, from) {
        return Ok(Err(error));
    }
    let changes = snapshot.txn.open_table(CHANGES)?;
    let versions = snapshot.txn.open_table(VERSIONS)?;
    let mut batches: Vec<Batch> = Vec::new();
    let (mut count, mut bytes, mut last) = (0, 0, from);
    for entry in changes.range((from, &[][..])..(to.saturating_add(1), &[][..]))? {
        let (place, _) = entry?;
        let (revision, key) = place.value();
        if revision != last && (count >= PIECE || bytes >= PIECE_BYTES) {
            return Ok(Ok((batches, revision)));
        }
        (last, count) = (revision, count + 1);
        if !prefix.contains(key) {
            continue;
        }
        let key = Key::stored(Bytes::copy_from_slice(key));
        let event = match find(&versions, &key, Revision(revision))? {
            Some(item) => {
                bytes += item.value.len();
                Event::Put(item)
            }
            None => Event::Deleted(key),
        };
        match batches.last_mut().filter(|batch| batch.revision.0 == revision) {
            Some(batch) => batch.events.push(event),
            None => batches.push(Batch { revision: Revision(revision), events: vec![event] }),
        }
    }
    Ok(Ok((batches, to + 1)))
}
