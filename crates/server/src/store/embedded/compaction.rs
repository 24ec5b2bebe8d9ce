//! Removes what can no longer be read, a piece at a time, so that no write waits long for it.

use redb::{Error as Fault, ReadableTable};

use super::tables::{Books, Tables, down};

/// Most changes that are looked at between two commits.
const PIECE: usize = 2_000;

/// Whether there is something to remove.
pub(super) fn is_due(books: &Books) -> bool {
    books.scrubbed < books.compacted
}

/// Removes the next piece, and says in the books how far it came.
///
/// Each change that is compacted replaced the version before it, which nobody can read any more; a deletion is not
/// even needed itself. So the work is by the number of changes, not by what is stored.
pub(super) fn remove_some(tables: &mut Tables<'_>, books: &mut Books) -> Result<(), Fault> {
    let mut piece = Vec::new();
    for entry in tables.changes.range((0, &[][..])..(books.compacted.saturating_add(1), &[][..]))?.take(PIECE)
    {
        let (place, _) = entry?;
        let (revision, key) = place.value();
        piece.push((revision, key.to_vec()));
    }
    for (revision, key) in &piece {
        let key = &key[..];
        let older =
            tables.versions.range((key, down(*revision) + 1)..=(key, u64::MAX))?.next().transpose()?;
        let older = older.map(|(place, _)| place.value().1);
        if let Some(older) = older {
            tables.versions.remove((key, older))?;
        }
        let is_deletion =
            tables.versions.get((key, down(*revision)))?.is_some_and(|found| found.value().len() == 1);
        if is_deletion {
            tables.versions.remove((key, down(*revision)))?;
        }
        tables.changes.remove((*revision, key))?;
    }
    // Within a revision that is not done, the next piece finds only what is left of it.
    let is_last = piece.len() < PIECE;
    books.scrubbed = if is_last {
        books.compacted
    } else {
        piece.last().map_or(books.scrubbed, |(revision, _)| revision - 1)
    };
    Ok(())
}
