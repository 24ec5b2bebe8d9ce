//! Watching: what happened, revision by revision.

use async_trait::async_trait;

use super::error::Result;
use super::value::{Key, KeyValue, Revision};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A key was put. It was new if its version is 1.
    Put(KeyValue),
    /// A key was deleted, by a transaction or with its lease.
    Deleted(Key),
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &Key {
        match self {
            Event::Put(item) => &item.key,
            Event::Deleted(key) => key,
        }
    }
}

/// All changes of one revision that a watcher asked for, in the order of their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The revision.
    pub revision: Revision,
    /// The changes; at least one.
    pub events: Vec<Event>,
}

/// What [`Store::watch`](super::Store::watch) gives: batches in the order of their revisions, each once, none left out.
#[async_trait]
pub trait Watch: Send {
    /// Waits for the next batch. Dropping the future loses nothing: the next call gives what this one would have given.
    ///
    /// After an error the watch has ended, and every call gives that error again. `Compacted` is the one to expect:
    /// what came next was compacted before it was read.
    async fn next(&mut self) -> Result<Batch>;
}
