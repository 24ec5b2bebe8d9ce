//! A disk that can lose its power: what was not synced may be there afterwards, or not, sector by sector.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

/// What a disk writes at once.
const SECTOR: usize = 512;

#[derive(Debug)]
enum Step {
    Length(usize),
    Sector(usize, Vec<u8>),
}

#[derive(Debug, Default)]
struct State {
    /// What programs see.
    seen: Vec<u8>,
    /// What would be there after a loss of power.
    safe: Vec<u8>,
    /// What lies between the two.
    unsynced: Vec<Step>,
    /// Losses of power. Who began before the last one can do nothing any more.
    losses: u64,
}

/// The disk: its clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct DiskModel(Arc<Mutex<State>>);

impl DiskModel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What redb works on.
    pub(crate) fn backend(&self) -> impl StorageBackend {
        Backend { disk: self.clone(), losses: self.state().losses }
    }

    /// Takes the power away. Each step that was not synced is kept or lost as `keeps` says.
    pub(crate) fn lose_power(&self, mut keeps: impl FnMut() -> bool) {
        let mut state = self.state();
        state.losses += 1;
        let steps = std::mem::take(&mut state.unsynced);
        for step in steps {
            if keeps() {
                step.apply(&mut state.safe);
            }
        }
        state.seen = state.safe.clone();
    }
}

impl Step {
    fn apply(self, bytes: &mut Vec<u8>) {
        match self {
            Step::Length(length) => bytes.resize(length, 0),
            Step::Sector(at, data) => {
                if bytes.len() < at + data.len() {
                    bytes.resize(at + data.len(), 0);
                }
                bytes[at..at + data.len()].copy_from_slice(&data);
            }
        }
    }
}

#[derive(Debug)]
struct Backend {
    disk: DiskModel,
    losses: u64,
}

impl Backend {
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.state();
        if state.losses == self.losses { Ok(state) } else { Err(io::Error::other("the power is gone")) }
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state()?.seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state()?;
        let at = index(offset)?;
        let found = state.seen.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state()?;
        let length = index(len)?;
        state.seen.resize(length, 0);
        state.unsynced.push(Step::Length(length));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state()?;
        let state = &mut *state;
        for step in state.unsynced.drain(..) {
            step.apply(&mut state.safe);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state()?;
        let at = index(offset)?;
        for (number, sector) in data.chunks(SECTOR).enumerate() {
            let place = at + number * SECTOR;
            state.unsynced.push(Step::Sector(place, sector.to_vec()));
            Step::Sector(place, sector.to_vec()).apply(&mut state.seen);
        }
        Ok(())
    }
}
