//! The tables of the file, and how to find things in them.
//!
//! `versions` holds each version of each key until it is compacted, the newest first; `changes` says which keys changed
//! at a revision. Both are written together, and only [`put`] and the compaction write them.

use std::ops::ControlFlow;

use bytes::Bytes;
use redb::{Error as Fault, ReadTransaction, ReadableTable, Table, TableDefinition, WriteTransaction};

use crate::store::value::{Key, KeyValue, LeaseId, Revision, Span, just_after};

/// (key, revision counted down) → a version of the key, see [`encode`].
pub(super) const VERSIONS: TableDefinition<'_, (&[u8], u64), &[u8]> = TableDefinition::new("versions");
/// (revision, key): the key changed then.
pub(super) const CHANGES: TableDefinition<'_, (u64, &[u8]), ()> = TableDefinition::new("changes");
/// Lease → its time to live in milliseconds.
pub(super) const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
/// (lease, key): the key goes with the lease.
pub(super) const LEASED: TableDefinition<'_, (u64, &[u8]), ()> = TableDefinition::new("leased");
/// The format, and the [`Books`].
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// How many versions of a key are passed one by one, before the search goes on by a jump.
const STEPS_MAX: u32 = 8;

const DELETED: u8 = 0;
const PUT: u8 = 1;
/// A version's kind, when the key was created, how often it was put, and its lease.
const HEAD_BYTES: usize = 1 + 8 + 8 + 8;

/// What is counted: where history is, and ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Books {
    /// The newest revision.
    pub(super) revision: u64,
    /// What was before this one cannot be read any more.
    pub(super) compacted: u64,
    /// Up to here, what cannot be read any more has been removed.
    pub(super) scrubbed: u64,
    /// The last lease that was granted.
    pub(super) lease: u64,
}

impl Books {
    pub(super) fn load(meta: &impl ReadableTable<&'static str, u64>) -> Result<Books, Fault> {
        let number = |name: &'static str| Ok::<_, Fault>(meta.get(name)?.map_or(0, |found| found.value()));
        Ok(Books {
            revision: number("revision")?,
            compacted: number("compacted")?,
            scrubbed: number("scrubbed")?,
            lease: number("lease")?,
        })
    }

    pub(super) fn save(&self, meta: &mut Table<'_, &'static str, u64>) -> Result<(), Fault> {
        meta.insert("revision", self.revision)?;
        meta.insert("compacted", self.compacted)?;
        meta.insert("scrubbed", self.scrubbed)?;
        meta.insert("lease", self.lease)?;
        Ok(())
    }
}

/// The file as of one commit.
pub(super) struct Snapshot {
    pub(super) txn: ReadTransaction,
    pub(super) books: Books,
}

impl Snapshot {
    pub(super) fn new(txn: ReadTransaction) -> Result<Snapshot, Fault> {
        let books = Books::load(&txn.open_table(META)?)?;
        Ok(Snapshot { txn, books })
    }
}

/// The tables in a write.
pub(super) struct Tables<'txn> {
    pub(super) versions: Table<'txn, (&'static [u8], u64), &'static [u8]>,
    pub(super) changes: Table<'txn, (u64, &'static [u8]), ()>,
    pub(super) leases: Table<'txn, u64, u64>,
    pub(super) leased: Table<'txn, (u64, &'static [u8]), ()>,
    pub(super) meta: Table<'txn, &'static str, u64>,
}

impl<'txn> Tables<'txn> {
    pub(super) fn open(txn: &'txn WriteTransaction) -> Result<Tables<'txn>, Fault> {
        Ok(Tables {
            versions: txn.open_table(VERSIONS)?,
            changes: txn.open_table(CHANGES)?,
            leases: txn.open_table(LEASES)?,
            leased: txn.open_table(LEASED)?,
            meta: txn.open_table(META)?,
        })
    }

    /// Adds a version of a key: a value, or that it was deleted.
    pub(super) fn put(
        &mut self,
        revision: Revision,
        key: &Key,
        item: Option<&KeyValue>,
    ) -> Result<(), Fault> {
        let version = encode(item);
        self.versions.insert((key.as_bytes(), down(revision.0)), &version[..])?;
        self.changes.insert((revision.0, key.as_bytes()), ())?;
        Ok(())
    }
}

/// A revision as it stands in `versions`: the newest version of a key comes first.
pub(super) fn down(revision: u64) -> u64 {
    u64::MAX - revision
}

fn encode(item: Option<&KeyValue>) -> Vec<u8> {
    let Some(item) = item else { return vec![DELETED] };
    let mut bytes = Vec::with_capacity(HEAD_BYTES + item.value.len());
    bytes.push(PUT);
    for number in [item.created.0, item.version, item.lease.map_or(0, |lease| lease.0)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&item.value);
    bytes
}

/// A version of a key, still in the file's page.
pub(super) struct Stored<'a> {
    key: &'a [u8],
    modified: u64,
    created: u64,
    version: u64,
    pub(super) lease: Option<LeaseId>,
    value: &'a [u8],
}

impl Stored<'_> {
    /// Takes it out of the page.
    pub(super) fn to_item(&self) -> KeyValue {
        KeyValue {
            key: self.to_key(),
            value: Bytes::copy_from_slice(self.value),
            created: Revision(self.created),
            modified: Revision(self.modified),
            version: self.version,
            lease: self.lease,
        }
    }

    pub(super) fn to_key(&self) -> Key {
        Key::stored(Bytes::copy_from_slice(self.key))
    }
}

/// Reads a version; none if the key was deleted then.
fn decode<'a>(key: &'a [u8], modified: u64, bytes: &'a [u8]) -> Result<Option<Stored<'a>>, Fault> {
    let damaged = || Fault::Corrupted(format!("a version of key \"{}\" cannot be read", key.escape_ascii()));
    match bytes.split_first() {
        Some((&DELETED, [])) => Ok(None),
        Some((&PUT, rest)) => {
            let (head, value) = rest.split_at_checked(HEAD_BYTES - 1).ok_or_else(damaged)?;
            let mut numbers = head.chunks_exact(8).map(|chunk| chunk.try_into().map(u64::from_le_bytes));
            let mut number = || numbers.next().and_then(Result::ok).ok_or_else(damaged);
            let (created, version, lease) = (number()?, number()?, number()?);
            let lease = (lease != 0).then_some(LeaseId(lease));
            Ok(Some(Stored { key, modified, created, version, lease, value }))
        }
        _ => Err(damaged()),
    }
}

/// Finds a key as of a revision.
pub(super) fn find(
    versions: &impl ReadableTable<(&'static [u8], u64), &'static [u8]>,
    key: &Key,
    at: Revision,
) -> Result<Option<KeyValue>, Fault> {
    let key = key.as_bytes();
    let Some(entry) = versions.range((key, down(at.0))..=(key, u64::MAX))?.next() else { return Ok(None) };
    let (place, version) = entry?;
    let stored = decode(key, down(place.value().1), version.value())?;
    Ok(stored.map(|stored| stored.to_item()))
}

/// Visits the keys of a span as of a revision, in order, until the visitor has enough.
pub(super) fn scan(
    versions: &impl ReadableTable<(&'static [u8], u64), &'static [u8]>,
    span: &Span,
    at: Revision,
    mut visit: impl FnMut(Stored<'_>) -> ControlFlow<()>,
) -> Result<(), Fault> {
    let mut from = (span.start().clone(), 0);
    'jumps: loop {
        // The key whose version was found: older ones are passed over.
        let mut found: Option<Bytes> = None;
        let mut steps = 0;
        for entry in versions.range((&from.0[..], from.1)..)? {
            let (place, version) = entry?;
            let (key, counted) = place.value();
            if span.end().is_some_and(|end| key >= &end[..]) {
                return Ok(());
            }
            let is_old = found.as_ref().is_some_and(|found| found == key);
            let is_new = down(counted) > at.0;
            if is_old || is_new {
                steps += 1;
                if steps > STEPS_MAX {
                    from =
                        if is_old { (just_after(key), 0) } else { (Bytes::copy_from_slice(key), down(at.0)) };
                    continue 'jumps;
                }
                continue;
            }
            steps = 0;
            found = Some(Bytes::copy_from_slice(key));
            if let Some(stored) = decode(key, down(counted), version.value())?
                && visit(stored).is_break()
            {
                return Ok(());
            }
        }
        return Ok(());
    }
}

/// The keys that go with a lease, up to a number of them.
pub(super) fn leased(
    leased: &impl ReadableTable<(u64, &'static [u8]), ()>,
    lease: LeaseId,
    most: usize,
) -> Result<Vec<Key>, Fault> {
    let mut keys = Vec::new();
    for entry in leased.range((lease.0, &[][..])..)?.take(most) {
        let (place, _) = entry?;
        let (of, key) = place.value();
        if of != lease.0 {
            break;
        }
        keys.push(Key::stored(Bytes::copy_from_slice(key)));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_comes_back_as_it_was() {
        let item = KeyValue {
            key: Key::new("k").unwrap(),
            value: Bytes::from_static(b"some value"),
            created: Revision(3),
            modified: Revision(9),
            version: 4,
            lease: Some(LeaseId(7)),
        };
        let bytes = encode(Some(&item));
        assert_eq!(decode(b"k", 9, &bytes).unwrap().unwrap().to_item(), item);
        assert!(decode(b"k", 9, &encode(None)).unwrap().is_none());
    }

    #[test]
    fn what_is_no_version_is_damage() {
        for bytes in [&b""[..], b"\x02", b"\x00x", b"\x01short"] {
            assert!(matches!(decode(b"k", 1, bytes), Err(Fault::Corrupted(_))), "{bytes:?}");
        }
    }
}
