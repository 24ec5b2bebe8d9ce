//! A copy of the store while it runs: all of it, as of one commit, in a file that can be opened as a store.

use std::path::Path;

use redb::{
    Database, Error as Fault, ReadTransaction, ReadableTable as _, TableDefinition, WriteTransaction,
};

use super::file::{make, of_fault};
use super::tables::{CHANGES, LEASED, LEASES, META, Snapshot, VERSIONS};
use crate::store::error::{OpenError, Result};
use crate::store::value::Revision;

/// Copies everything to a new file.
///
/// While it runs, the store cannot use the room of what is deleted meanwhile.
pub(super) fn copy(snapshot: &Snapshot, path: &Path) -> Result<Revision> {
    make(path, |new| fill(snapshot, new).map_err(|fault| of_fault(path, fault))).map_err(
        |error| match error {
            // Only a new file can be taken for the snapshot.
            OpenError::Locked { path } => OpenError::Exists { path },
            error => error,
        },
    )?;
    Ok(Revision(snapshot.books.revision))
}

fn fill(snapshot: &Snapshot, new: &Database) -> Result<(), Fault> {
    let mut txn = new.begin_write()?;
    txn.set_two_phase_commit(true);
    copy_table(&snapshot.txn, &txn, META)?;
    copy_table(&snapshot.txn, &txn, LEASES)?;
    copy_table(&snapshot.txn, &txn, LEASED)?;
    copy_table(&snapshot.txn, &txn, CHANGES)?;
    copy_table(&snapshot.txn, &txn, VERSIONS)?;
    Ok(txn.commit()?)
}

fn copy_table<K: redb::Key + 'static, V: redb::Value + 'static>(
    from: &ReadTransaction,
    to: &WriteTransaction,
    table: TableDefinition<'_, K, V>,
) -> Result<(), Fault> {
    let old = from.open_table(table)?;
    let mut new = to.open_table(table)?;
    for entry in old.iter()? {
        let (key, value) = entry?;
        new.insert(key.value(), value.value())?;
    }
    Ok(())
}
