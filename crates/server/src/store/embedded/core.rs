//! The open file, shared by all who read and the one who writes; and what happens when it fails.
//!
//! ```text
//!   Open --no room on the disk--> Failed --next use: opened again--> Open
//!     |                             |
//!     '---any other error-----------+--> Broken: until the program is started again
//!   (any) --close--> Closed
//! ```
//!
//! After any error redb refuses to go on with a file that it has open, and rightly: what was written may not be
//! there. When the disk was only full, the file is opened again, which brings it back to its last commit. After other
//! errors of a disk nobody knows what it still has, and going on could lose what was acknowledged.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use redb::{Database, Error as Fault, ReadableDatabase as _, ReadableTable as _};

use super::Options;
use super::file::{Place, is_out_of_room};
use super::hub::Hub;
use super::leases::Book;
use super::tables::{LEASES, Snapshot};
use crate::store::clock::Clock;
use crate::store::error::{Cause, ErrorKind, OpenError, Result, StoreError};
use crate::store::value::LeaseId;

enum State {
    Open(Database),
    /// The disk was full. Holds what the system said.
    Failed(Cause),
    Broken(Cause),
    Closed,
}

/// How the state changed: who saw an older number saw an older file.
struct Opened {
    state: State,
    generation: u64,
}

pub(super) struct Core {
    pub(super) place: Place,
    pub(super) options: Options,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) hub: Hub,
    pub(super) book: Book,
    opened: RwLock<Opened>,
    /// The first error since the file was opened: all later ones only say that there was one.
    fault: Mutex<Option<Arc<Fault>>>,
}

impl Core {
    pub(super) fn open(place: Place, options: Options, clock: Arc<dyn Clock>) -> Result<Core, OpenError> {
        let database = place.open(options.cache_bytes, options.verify)?;
        let stored = look(&database).map_err(|fault| match &place {
            Place::File(path) => super::file::of_fault(path, fault),
            _ => super::file::of_fault("(memory)".as_ref(), fault),
        })?;
        let core = Core {
            hub: Hub::new(stored.revision, options.recent_revisions),
            book: Book::default(),
            opened: RwLock::new(Opened { state: State::Open(database), generation: 0 }),
            fault: Mutex::new(None),
            place,
            options,
            clock,
        };
        core.book.agree_with(&stored.leases, core.clock.now());
        Ok(core)
    }

    /// Runs what waits for the disk: beside the runtime, unless there is no disk.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Core>,
        doing: &'static str,
        work: impl FnOnce(&Core) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if matches!(self.place, Place::Memory) {
            return work(self);
        }
        let core = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&core)).await {
            Ok(result) => result,
            Err(error) => Err(self.unavailable(doing, "try again", Some(Arc::new(error)))),
        }
    }

    /// Reads from a snapshot. If the file had failed, it is opened again.
    pub(super) fn read<T>(
        &self,
        doing: &'static str,
        read: impl Fn(&Snapshot) -> Result<Result<T>, Fault>,
    ) -> Result<T> {
        let mut tries = 0;
        loop {
            tries += 1;
            let generation = {
                let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
                if let State::Open(database) = &opened.state {
                    let result = database.begin_read().map_err(Fault::from).and_then(Snapshot::new);
                    match result.and_then(|snapshot| read(&snapshot)) {
                        Ok(result) => return result,
                        Err(fault) => self.note(fault),
                    }
                }
                opened.generation
            };
            self.open_again(doing, generation)?;
            if tries > 1 {
                return Err(self.unavailable(doing, "try again", None));
            }
        }
    }

    /// Lets the writer write. After an error the file is opened again, so that the error can say what became of it.
    pub(super) fn write<T>(
        &self,
        doing: &'static str,
        write: impl FnOnce(&Database) -> Result<T, Fault>,
    ) -> Result<T> {
        let (is_open, generation) = {
            let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
            (matches!(opened.state, State::Open(_)), opened.generation)
        };
        if !is_open {
            self.open_again(doing, generation)?;
        }
        let before = self.hub.published();
        let (generation, is_full) = {
            let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
            let State::Open(database) = &opened.state else {
                return Err(self.unavailable(doing, "try again", None));
            };
            match write(database) {
                Ok(written) => return Ok(written),
                Err(fault) => {
                    let is_full = is_out_of_room(&fault);
                    self.note(fault);
                    (opened.generation, is_full)
                }
            }
        };
        let cause = self.first_fault();
        self.open_again(doing, generation)?;
        if is_full && self.hub.published() == before {
            return Err(StoreError::Full { doing, place: self.place.to_string(), cause });
        }
        Err(self.unavailable(doing, "whether this was done is not known: read, and try again", cause))
    }

    /// Ends all use of the file.
    pub(super) fn close(&self, doing: &'static str) -> Result<()> {
        self.hub.close(self.closed("watching"));
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut opened.state, State::Closed);
        if let State::Open(database) = before {
            let closed = database.close();
            closed.map_err(|error| {
                self.unavailable(
                    doing,
                    "nothing is lost; opening it takes longer next time",
                    Some(Arc::new(error)),
                )
            })?;
        }
        Ok(())
    }

    pub(super) fn unavailable(
        &self,
        doing: &'static str,
        remedy: &'static str,
        cause: Option<Cause>,
    ) -> StoreError {
        StoreError::Unavailable { doing, place: self.place.to_string(), remedy, cause }
    }

    pub(super) fn closed(&self, doing: &'static str) -> StoreError {
        self.unavailable(doing, "it was closed: open it again", None)
    }

    fn note(&self, fault: Fault) {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| Arc::new(fault));
    }

    fn first_fault(&self) -> Option<Cause> {
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        fault.as_ref().map(|fault| Arc::clone(fault) as Cause)
    }

    /// Opens the file again, unless somebody has done so since the caller saw it, or it must not be.
    fn open_again(&self, doing: &'static str, seen: u64) -> Result<()> {
        let mut opened = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        if opened.generation != seen {
            return Ok(());
        }
        let before = std::mem::replace(&mut opened.state, State::Closed);
        let cause = match before {
            State::Closed => return Err(self.closed(doing)),
            State::Broken(cause) => {
                opened.state = State::Broken(Arc::clone(&cause));
                return Err(self.broken(doing, cause));
            }
            State::Failed(cause) => cause,
            State::Open(database) => {
                // It has failed already, and says so again.
                let _said_before = database.close();
                let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let fault = fault.unwrap_or_else(|| Arc::new(Fault::PreviousIo));
                if !is_out_of_room(&fault) {
                    opened.state = State::Broken(Arc::clone(&fault) as Cause);
                    return Err(self.broken(doing, fault));
                }
                fault
            }
        };
        self.place.drop_cache();
        let again = self.place.open(self.options.cache_bytes, false);
        let again = again.and_then(|database| match look(&database) {
            Ok(stored) => Ok((database, stored)),
            Err(fault) => Err(super::file::of_fault("".as_ref(), fault)),
        });
        match again {
            Ok((database, stored)) => {
                *opened = Opened { state: State::Open(database), generation: seen + 1 };
                *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
                self.hub.resume(stored.revision);
                self.book.agree_with(&stored.leases, self.clock.now());
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Full => {
                opened.state = State::Failed(Arc::clone(&cause));
                let remedy = "its disk is full: make room, then try again";
                Err(self.unavailable(doing, remedy, Some(cause)))
            }
            Err(error) => {
                let cause: Cause = Arc::new(error);
                opened.state = State::Broken(Arc::clone(&cause));
                Err(self.broken(doing, cause))
            }
        }
    }

    fn broken(&self, doing: &'static str, cause: Cause) -> StoreError {
        let damaged = cause.downcast_ref::<Fault>().is_some_and(|fault| matches!(fault, Fault::Corrupted(_)));
        if damaged {
            return StoreError::Corrupt { doing, place: self.place.to_string(), cause: Some(cause) };
        }
        self.unavailable(doing, "check its disk, then start this program again", Some(cause))
    }
}

/// What a store must know of its file before it can serve.
struct Stored {
    revision: u64,
    leases: HashMap<LeaseId, Duration>,
}

fn look(database: &Database) -> Result<Stored, Fault> {
    let snapshot = Snapshot::new(database.begin_read()?)?;
    let mut leases = HashMap::new();
    for entry in snapshot.txn.open_table(LEASES)?.iter()? {
        let (id, ttl) = entry?;
        leases.insert(LeaseId(id.value()), Duration::from_millis(ttl.value()));
    }
    Ok(Stored { revision: snapshot.books.revision, leases })
}
