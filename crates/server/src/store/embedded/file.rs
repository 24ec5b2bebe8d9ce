//! The file: making it, opening it, what it may look like, and what its errors mean.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statvfs::statvfs;
use redb::backends::InMemoryBackend;
use redb::{
    Builder, Database, DatabaseError, Error as Fault, ReadableDatabase as _, StorageError, TableError,
};

use super::tables::{Books, META, Tables};
use crate::store::error::{Cause, OpenError};

/// The format that is written here, and the newest that can be read.
pub(super) const FORMAT: u64 = 1;
/// What a file of redb begins with.
const MAGIC: &[u8] = b"redb\x1a\x0a\xa9\x0d\x0a";

/// Where the store is kept.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// In a file.
    File(PathBuf),
    /// In memory, for simulations.
    Memory,
    /// On a disk that a test has made up.
    #[cfg(test)]
    Model(super::disk_model::DiskModel),
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File(path) => write!(out, "the store {}", path.display()),
            Place::Memory => out.write_str("the store in memory"),
            #[cfg(test)]
            Place::Model(_) => out.write_str("the store on a model of a disk"),
        }
    }
}

impl Place {
    /// Opens what is there, or makes it. `verify`: all of it is read, and its checksums are compared.
    pub(super) fn open(&self, cache_bytes: usize, verify: bool) -> Result<Database, OpenError> {
        let mut builder = Database::builder();
        builder.set_cache_size(cache_bytes);
        match self {
            Place::File(path) => open_file(&mut builder, path, verify),
            Place::Memory => made_up(builder.create_with_backend(InMemoryBackend::new())),
            #[cfg(test)]
            Place::Model(disk) => made_up(builder.create_with_backend(disk.backend())),
        }
    }

    /// Whether the disk has less than so many bytes free.
    pub(super) fn is_short_of(&self, bytes: u64) -> bool {
        let Place::File(path) = self else { return false };
        // If the system cannot say, the write will.
        statvfs(path).is_ok_and(|disk| disk.blocks_available().saturating_mul(disk.fragment_size()) < bytes)
    }

    /// Lets the system forget what it holds of the file in memory and has not failed to write, so that what is read
    /// next is what the disk has.
    pub(super) fn drop_cache(&self) {
        let Place::File(path) = self else { return };
        if let Ok(file) = File::open(path) {
            let _only_a_precaution = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
}

fn open_file(builder: &mut Builder, path: &Path, verify: bool) -> Result<Database, OpenError> {
    if !path.try_exists().map_err(|error| refused(path, error))? {
        make(path, |database| initialise(database, path))?;
    }
    check_magic(path)?;
    builder.set_check_integrity_on_open(verify);
    let opened = match builder.open(path) {
        // The check wants to write down that it was done. Without room the file opens without it.
        Err(error) if verify && is_full(&error) => builder.set_check_integrity_on_open(false).open(path),
        opened => opened,
    };
    let database = opened.map_err(|error| opening(path, error))?;
    check_format(&database, path)?;
    Ok(database)
}

/// Makes a file at once: under another name until it is whole, and never over one that is there.
pub(super) fn make<T>(
    path: &Path,
    fill: impl FnOnce(&Database) -> Result<T, OpenError>,
) -> Result<T, OpenError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    // Locked as long as it is being made: one that is not was left by a crash, and is made anew.
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&new);
    let file = file.map_err(|error| refused(&new, error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(OpenError::Locked { path: new }),
        Err(fs::TryLockError::Error(error)) => return Err(refused(&new, error)),
    }
    file.set_len(0).and_then(|()| file.unlock()).map_err(|error| refused(&new, error))?;
    let result = fill_and_link(&new, path, fill);
    // Its other name stays, if it got one.
    let _absent = fs::remove_file(&new);
    result
}

fn fill_and_link<T>(
    new: &Path,
    path: &Path,
    fill: impl FnOnce(&Database) -> Result<T, OpenError>,
) -> Result<T, OpenError> {
    let database = Database::builder().create(new).map_err(|error| opening(new, error))?;
    let filled = fill(&database)?;
    database.close().map_err(|error| opening(new, error))?;
    File::open(new).and_then(|file| file.sync_all()).map_err(|error| refused(new, error))?;
    fs::hard_link(new, path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => OpenError::Exists { path: path.to_owned() },
        _ => refused(path, error),
    })?;
    // The name itself must outlive a crash.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| refused(folder, error))?;
    Ok(filled)
}

fn initialise(database: &Database, path: &Path) -> Result<(), OpenError> {
    let write = || -> Result<(), Fault> {
        let txn = database.begin_write()?;
        {
            let mut tables = Tables::open(&txn)?;
            tables.meta.insert("format", FORMAT)?;
            Books::default().save(&mut tables.meta)?;
        }
        Ok(txn.commit()?)
    };
    write().map_err(|fault| of_fault(path, fault))
}

/// A store that is in no file, and new, or opened again by a test.
fn made_up(database: Result<Database, DatabaseError>) -> Result<Database, OpenError> {
    let path = Path::new("(memory)");
    let database = database.map_err(|error| opening(path, error))?;
    let read = database.begin_read().map_err(|error| of_fault(path, error.into()))?;
    let is_new = matches!(read.open_table(META), Err(TableError::TableDoesNotExist(_)));
    drop(read);
    if is_new {
        initialise(&database, path)?;
    }
    Ok(database)
}

fn check_magic(path: &Path) -> Result<(), OpenError> {
    let mut start = [0; MAGIC.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    match read {
        Ok(()) if start == MAGIC => Ok(()),
        Ok(()) => Err(OpenError::Foreign { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(OpenError::Foreign { path: path.to_owned() })
        }
        Err(error) => Err(refused(path, error)),
    }
}

fn check_format(database: &Database, path: &Path) -> Result<(), OpenError> {
    let foreign = || OpenError::Foreign { path: path.to_owned() };
    let read = database.begin_read().map_err(|error| of_fault(path, error.into()))?;
    let meta = match read.open_table(META) {
        Ok(meta) => meta,
        Err(TableError::TableDoesNotExist(_) | TableError::TableTypeMismatch { .. }) => return Err(foreign()),
        Err(error) => return Err(of_fault(path, error.into())),
    };
    let found = meta.get("format").map_err(|error| of_fault(path, error.into()))?;
    match found.map(|found| found.value()) {
        None | Some(0) => Err(foreign()),
        Some(FORMAT) => Ok(()),
        Some(found) => Err(OpenError::NewerFormat { path: path.to_owned(), found, known: FORMAT }),
    }
}

fn refused(path: &Path, error: io::Error) -> OpenError {
    of_fault(path, Fault::Io(error))
}

fn opening(path: &Path, error: DatabaseError) -> OpenError {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            OpenError::Locked { path: path.to_owned() }
        }
        error => of_fault(path, error.into()),
    }
}

/// What an error below means for one who opens the file.
pub(super) fn of_fault(path: &Path, fault: Fault) -> OpenError {
    let path = path.to_owned();
    let full = is_out_of_room(&fault);
    let corrupt = matches!(fault, Fault::Corrupted(_) | Fault::RepairAborted);
    let cause: Cause = Arc::new(fault);
    match (full, corrupt) {
        (true, _) => OpenError::Full { path, cause },
        (_, true) => OpenError::Corrupt { path, cause },
        _ => OpenError::Io { path, cause },
    }
}

/// Whether the disk has no room, or its user no quota.
pub(super) fn is_out_of_room(fault: &Fault) -> bool {
    matches!(fault, Fault::Io(error) if is_room_error(error))
}

fn is_full(error: &DatabaseError) -> bool {
    matches!(error, DatabaseError::Storage(StorageError::Io(error)) if is_room_error(error))
}

fn is_room_error(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
