//! What the store holds: keys, values, revisions, and ranges of keys.

use std::fmt;

use bytes::Bytes;

use super::error::LimitError;

/// Longest key, in bytes. Keys are names, and are held in memory by watchers and leases.
pub const KEY_BYTES_MAX: usize = 1024;
/// Largest value, in bytes. With its key it must fit into one request to an etcd (1.5 MiB by default).
pub const VALUE_BYTES_MAX: usize = 1 << 20;

/// A point in the store's history. Each transaction that changes something makes the next one; 0 is the empty store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub u64);

impl Revision {
    /// The one after this: where to watch from, when everything up to this one is known.
    #[must_use]
    pub fn next(self) -> Revision {
        Revision(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// The id of a lease. The store gives each only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// A key: between 1 and [`KEY_BYTES_MAX`] bytes, of any value.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Bytes);

impl Key {
    /// Checks the length.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Key, LimitError> {
        let bytes = bytes.into();
        match bytes.len() {
            0 => Err(LimitError::EmptyKey),
            length if length > KEY_BYTES_MAX => Err(LimitError::LongKey { length }),
            _ => Ok(Key(bytes)),
        }
    }

    /// Takes what was checked before it was stored.
    pub(crate) fn stored(bytes: Bytes) -> Key {
        Key(bytes)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Key(\"{self}\")")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(out)
    }
}

/// What keys begin with: up to [`KEY_BYTES_MAX`] bytes; with none, all keys.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Prefix(Bytes);

impl Prefix {
    /// Checks the length.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Prefix, LimitError> {
        let bytes = bytes.into();
        if bytes.len() > KEY_BYTES_MAX {
            return Err(LimitError::LongKey { length: bytes.len() });
        }
        Ok(Prefix(bytes))
    }

    /// The prefix of all keys.
    pub fn all() -> Prefix {
        Prefix::default()
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether the key begins so.
    pub fn contains(&self, key: &[u8]) -> bool {
        key.starts_with(&self.0)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Prefix(\"{self}\")")
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(out)
    }
}

/// Keys from one (with it) to another (without it).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    start: Bytes,
    /// None: to the last key of all.
    end: Option<Bytes>,
}

impl Span {
    /// All keys with a prefix.
    pub fn prefix(prefix: &Prefix) -> Span {
        Span { start: prefix.0.clone(), end: after_prefix(prefix.as_bytes()) }
    }

    /// The keys from `start` to before `end`.
    pub fn between(start: &Key, end: &Key) -> Span {
        Span { start: start.0.clone(), end: Some(end.0.clone()) }
    }

    /// Whether the key lies in it.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= &self.start[..] && self.end.as_ref().is_none_or(|end| key < &end[..])
    }

    pub(crate) fn start(&self) -> &Bytes {
        &self.start
    }

    pub(crate) fn end(&self) -> Option<&Bytes> {
        self.end.as_ref()
    }

    /// What of it lies behind a key.
    #[must_use]
    pub(crate) fn after(&self, key: &Key) -> Span {
        let behind = just_after(key.as_bytes());
        Span { start: behind.max(self.start.clone()), end: self.end.clone() }
    }
}

/// The first key that could follow this one.
pub(crate) fn just_after(key: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(key.len() + 1);
    bytes.extend_from_slice(key);
    bytes.push(0);
    bytes.into()
}

/// The first key behind all that begin with the prefix; none if there is none.
fn after_prefix(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}

/// A key with what is stored at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Key,
    /// What is stored.
    pub value: Bytes,
    /// When the key came into being, since it was last deleted.
    pub created: Revision,
    /// When it was last put.
    pub modified: Revision,
    /// How often it has been put since it was created: 1 for a new key.
    pub version: u64,
    /// The lease with which it goes.
    pub lease: Option<LeaseId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_key_is_checked() {
        assert!(matches!(Key::new(Bytes::new()), Err(LimitError::EmptyKey)));
        assert!(Key::new(vec![b'a'; KEY_BYTES_MAX]).is_ok());
        assert!(matches!(
            Key::new(vec![b'a'; KEY_BYTES_MAX + 1]),
            Err(LimitError::LongKey { length }) if length == KEY_BYTES_MAX + 1
        ));
        assert!(Prefix::new(vec![b'a'; KEY_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn a_prefix_ends_before_the_next_key_that_lacks_it() {
        let span = |prefix: &[u8]| Span::prefix(&Prefix::new(prefix.to_vec()).unwrap());
        assert!(span(b"a/").contains(b"a/"));
        assert!(span(b"a/").contains(b"a/\xff\xff"));
        assert!(!span(b"a/").contains(b"a0"));
        assert!(!span(b"a/").contains(b"a"));
        assert!(span(b"a\xff").contains(b"a\xff\xff"));
        assert!(!span(b"a\xff").contains(b"b"));
        assert!(span(b"\xff\xff").contains(b"\xff\xff\xff"));
        assert!(!span(b"\xff\xff").contains(b"\xff\xfe"));
        assert!(span(b"").contains(b"anything"));
    }

    #[test]
    fn behind_a_key_there_is_neither_it_nor_what_is_before() {
        let all = Span::prefix(&Prefix::all());
        let rest = all.after(&Key::new("b").unwrap());
        assert!(!rest.contains(b"a") && !rest.contains(b"b"));
        assert!(rest.contains(b"b\0") && rest.contains(b"c"));
        let rest = Span::prefix(&Prefix::new("c").unwrap()).after(&Key::new("b").unwrap());
        assert!(!rest.contains(b"b\0") && rest.contains(b"c"));
    }
}
