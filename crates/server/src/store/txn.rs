//! Transactions: comparisons, and the operations that are done if they hold, or if not.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::error::LimitError;
use super::value::{Key, KeyValue, LeaseId, Prefix, Revision, VALUE_BYTES_MAX};

/// Most comparisons, and most operations of each of the two lists: etcd's default.
pub const TXN_PARTS_MAX: usize = 128;
/// Most bytes of keys and values: with what is around them, they fit into one request to an etcd.
pub const TXN_BYTES_MAX: usize = (1 << 20) + (1 << 18);
/// Most keys that one transaction changes, which is more than its operations when it deletes prefixes. All of them are
/// held in memory, and reach each watcher as one batch.
pub const TXN_CHANGES_MAX: usize = 100_000;

/// How two values are compared: what is stored stands left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// `=`
    Equal,
    /// `≠`
    NotEqual,
    /// `<`
    Less,
    /// `>`
    Greater,
}

impl Relation {
    fn holds<T: Ord + ?Sized>(self, stored: &T, given: &T) -> bool {
        match self {
            Relation::Equal => stored == given,
            Relation::NotEqual => stored != given,
            Relation::Less => stored < given,
            Relation::Greater => stored > given,
        }
    }
}

/// What of a key is compared. A key that is not there has version 0, revisions 0 and no lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// How often it was put since it was created.
    Version(Relation, u64),
    /// When it was created.
    Created(Relation, Revision),
    /// When it was last put.
    Modified(Relation, Revision),
    /// What is stored. Never holds for a key that is not there.
    Value(Relation, Bytes),
    /// Whether it is there.
    Exists(bool),
    /// Whether it has this lease, or none.
    Lease(Option<LeaseId>),
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key.
    pub key: Key,
    /// What of it, and with what.
    pub subject: Subject,
}

impl Compare {
    /// Whether it holds for what is stored at its key.
    pub fn holds(&self, stored: Option<&KeyValue>) -> bool {
        match &self.subject {
            Subject::Version(relation, given) => {
                relation.holds(&stored.map_or(0, |found| found.version), given)
            }
            Subject::Created(relation, given) => {
                relation.holds(&stored.map_or(Revision(0), |found| found.created), given)
            }
            Subject::Modified(relation, given) => {
                relation.holds(&stored.map_or(Revision(0), |found| found.modified), given)
            }
            Subject::Value(relation, given) => {
                stored.is_some_and(|found| relation.holds(&found.value[..], &given[..]))
            }
            Subject::Exists(given) => stored.is_some() == *given,
            Subject::Lease(given) => stored.and_then(|found| found.lease) == *given,
        }
    }
}

/// One operation. Later ones of a transaction see what earlier ones did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Stores a value. Without a lease, the key stays until it is deleted.
    Put {
        /// Where.
        key: Key,
        /// What.
        value: Bytes,
        /// With which lease it goes.
        lease: Option<LeaseId>,
    },
    /// Deletes a key. That there is none is no error.
    Delete(Key),
    /// Deletes all keys with a prefix.
    DeletePrefix(Prefix),
    /// Reads a key.
    Get(Key),
}

/// What an operation answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpReply {
    /// It is stored.
    Put,
    /// So many keys were deleted.
    Deleted(usize),
    /// What is stored.
    Got(Option<KeyValue>),
}

/// Comparisons, and operations that are done at once, or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// All of them must hold.
    pub compare: Vec<Compare>,
    /// Done if they do.
    pub then: Vec<Op>,
    /// Done if they do not.
    pub otherwise: Vec<Op>,
}

impl Txn {
    /// A transaction that stores one value in any case.
    pub fn put(key: Key, value: impl Into<Bytes>) -> Txn {
        Txn { then: vec![Op::Put { key, value: value.into(), lease: None }], ..Txn::default() }
    }

    /// A transaction that deletes one key in any case.
    pub fn delete(key: Key) -> Txn {
        Txn { then: vec![Op::Delete(key)], ..Txn::default() }
    }

    /// Checks the limits, and that no list changes a key twice. Every implementation calls it first.
    pub fn check(&self) -> Result<(), LimitError> {
        let parts = [self.compare.len(), self.then.len(), self.otherwise.len()];
        if let Some(count) = parts.into_iter().find(|count| *count > TXN_PARTS_MAX) {
            return Err(LimitError::LongTxn { count });
        }
        let length = self.bytes();
        if length > TXN_BYTES_MAX {
            return Err(LimitError::LargeTxn { length });
        }
        check_ops(&self.then)?;
        check_ops(&self.otherwise)
    }

    /// Whether one of its lists stores something.
    pub(crate) fn puts(&self) -> bool {
        self.then.iter().chain(&self.otherwise).any(|op| matches!(op, Op::Put { .. }))
    }

    /// The bytes of all keys and values.
    pub(crate) fn bytes(&self) -> usize {
        let of_compare = |compare: &Compare| {
            compare.key.as_bytes().len()
                + if let Subject::Value(_, value) = &compare.subject { value.len() } else { 0 }
        };
        let of_op = |op: &Op| match op {
            Op::Put { key, value, .. } => key.as_bytes().len() + value.len(),
            Op::Delete(key) | Op::Get(key) => key.as_bytes().len(),
            Op::DeletePrefix(prefix) => prefix.as_bytes().len(),
        };
        let compares: usize = self.compare.iter().map(of_compare).sum();
        compares + self.then.iter().chain(&self.otherwise).map(of_op).sum::<usize>()
    }
}

/// Checks each value, and that no key is put twice, or put and deleted: at one revision a key is one thing.
fn check_ops(ops: &[Op]) -> Result<(), LimitError> {
    let mut put = BTreeSet::new();
    for op in ops {
        if let Op::Put { key, value, .. } = op {
            if value.len() > VALUE_BYTES_MAX {
                return Err(LimitError::LargeValue { key: key.clone(), length: value.len() });
            }
            if !put.insert(key) {
                return Err(LimitError::Twice { key: key.clone() });
            }
        }
    }
    for op in ops {
        let twice = match op {
            Op::Delete(key) => put.get(key),
            Op::DeletePrefix(prefix) => put.iter().find(|key| prefix.contains(key.as_bytes())),
            Op::Put { .. } | Op::Get(_) => None,
        };
        if let Some(key) = twice {
            return Err(LimitError::Twice { key: (*key).clone() });
        }
    }
    Ok(())
}

/// What a transaction answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnReply {
    /// Whether all comparisons held.
    pub succeeded: bool,
    /// The revision that it made; if it changed nothing, the one that it saw.
    pub revision: Revision,
    /// An answer for each operation that was done.
    pub replies: Vec<OpReply>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key::new(text.to_owned()).unwrap()
    }

    fn put(name: &str) -> Op {
        Op::Put { key: key(name), value: Bytes::new(), lease: None }
    }

    #[test]
    fn one_key_is_changed_once() {
        let check = |then: Vec<Op>| Txn { then, ..Txn::default() }.check();
        let prefix = Op::DeletePrefix(Prefix::new("a").unwrap());
        assert!(check(vec![put("a"), put("b"), Op::Delete(key("c")), Op::Get(key("a"))]).is_ok());
        assert!(check(vec![prefix.clone(), Op::Delete(key("a")), prefix.clone()]).is_ok());
        for ops in [
            vec![put("a"), put("a")],
            vec![put("ab"), Op::Delete(key("ab"))],
            vec![Op::Delete(key("ab")), put("ab")],
            vec![prefix.clone(), put("ab")],
        ] {
            assert!(matches!(check(ops), Err(LimitError::Twice { .. })));
        }
        let both = Txn { then: vec![put("a")], otherwise: vec![Op::Delete(key("a"))], ..Txn::default() };
        assert!(both.check().is_ok());
    }

    #[test]
    fn each_limit_is_checked() {
        let value = |length: usize| Txn::put(key("a"), vec![0; length]).check();
        assert!(value(VALUE_BYTES_MAX).is_ok());
        assert!(matches!(value(VALUE_BYTES_MAX + 1), Err(LimitError::LargeValue { .. })));
        assert!(matches!(value(TXN_BYTES_MAX), Err(LimitError::LargeTxn { .. })));
        let many = vec![Op::Get(key("a")); TXN_PARTS_MAX + 1];
        let long = Txn { otherwise: many, ..Txn::default() };
        assert!(matches!(long.check(), Err(LimitError::LongTxn { .. })));
    }

    #[test]
    fn a_key_that_is_not_there_compares_as_nothing() {
        let holds = |subject| Compare { key: key("a"), subject }.holds(None);
        assert!(holds(Subject::Version(Relation::Equal, 0)));
        assert!(holds(Subject::Created(Relation::Less, Revision(1))));
        assert!(holds(Subject::Modified(Relation::NotEqual, Revision(1))));
        assert!(holds(Subject::Exists(false)));
        assert!(holds(Subject::Lease(None)));
        assert!(!holds(Subject::Version(Relation::Greater, 0)));
        assert!(!holds(Subject::Value(Relation::NotEqual, Bytes::from_static(b"x"))));
    }
}
