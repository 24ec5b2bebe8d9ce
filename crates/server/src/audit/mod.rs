//! The audit: who did what, when, from where, and how it ended. Append-only, and chained by hashes, so that a record
//! that was changed, taken out or put in later is found.
//!
//! A record comes in two steps. It is written in the same transaction as what it tells of ([`Audit::op`]), so that
//! neither is there without the other. Then [`Audit::seal`] moves it to the end of the chain, in the order of the
//! store's revisions. Between the two, a few milliseconds, it is durable but not chained.
//!
//! Each link's hash is SHA-256 over the hash before it, its number, and the record's bytes as they are stored. Whoever
//! can write to the store could write a whole new chain: the head's hash has to be kept elsewhere, too, to find that.

use std::sync::Arc;

use bailey_types::ids::{RequestId, TenantName};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::records::{self, RecordError, below, key};
use crate::store::{Compare, Key, KeyValue, Op, Prefix, Range, Relation, Revision, Store, Subject, Txn};
use crate::time::Timestamp;

const OPEN: &str = "audit-open";
const CHAIN: &str = "audit-chain";
const HEAD: &str = "audit-head";

/// Records that are sealed at once: each is one deletion and one put, beside the head's.
const BATCH: usize = 60;

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Done,
    /// The caller may not, or is nobody.
    Denied,
    /// It was not possible; with the stable code of the error.
    Failed(String),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub request: RequestId,
    pub at: Timestamp,
    /// Who: a token by its id, a program by its identity, or nobody.
    pub actor: String,
    /// What, as the policies name it.
    pub action: String,
    /// To what.
    pub object: String,
    /// Whose business it is; none is the operator's alone.
    pub tenant: Option<TenantName>,
    /// The network address of the caller.
    pub from: String,
    pub outcome: Outcome,
}

/// A record in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub number: u64,
    pub event: Event,
    pub hash: Hash,
}

/// SHA-256, in hexadecimal where people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hash(pub [u8; 32]);

impl std::fmt::Display for Hash {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

/// The end of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// How many links there are; they are numbered from 1.
    pub links: u64,
    pub hash: Hash,
}

impl Head {
    const EMPTY: Head = Head { links: 0, hash: Hash([0; 32]) };

    fn next(self, record: &str) -> Head {
        let links = self.links + 1;
        let mut hash = Sha256::new();
        hash.update(self.hash.0);
        hash.update(links.to_be_bytes());
        hash.update(record.as_bytes());
        Head { links, hash: Hash(hash.finalize().into()) }
    }
}

/// A link as it is stored. The record is text, so that its bytes stay what was hashed.
#[derive(Serialize, Deserialize)]
struct Stored {
    record: String,
    hash: Hash,
}

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(
        "checking the audit: record {number} is not there; the log was changed, or a backup is older than its head"
    )]
    Missing { number: u64 },
    #[error("checking the audit: record {number} is not what its hash says; the log was changed")]
    Changed { number: u64 },
    #[error("checking the audit: there are records behind the last one, {links}; the log was changed")]
    Beyond { links: u64 },
    #[error("checking the audit: its end is {found}, not {expected}; the log was changed or replaced")]
    OtherHead { found: Hash, expected: Hash },
    #[error("sealing audit records: another process does it, too; only the leading server may")]
    NotAlone,
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl From<crate::store::StoreError> for AuditError {
    fn from(error: crate::store::StoreError) -> AuditError {
        AuditError::Record(error.into())
    }
}

pub type Result<T> = std::result::Result<T, AuditError>;

pub struct Audit {
    store: Arc<dyn Store>,
}

impl Audit {
    pub fn new(store: Arc<dyn Store>) -> Audit {
        Audit { store }
    }

    /// The operation that records an event, for the transaction of what it tells of.
    ///
    /// # Errors
    /// When the event cannot be written.
    pub fn op(event: &Event) -> Result<Op> {
        let key = key(&[OPEN, event.request.as_str()])?;
        Ok(Op::Put { key, value: records::write(event)?, lease: None })
    }

    /// Records an event that changes nothing else, such as a refusal.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn note(&self, event: &Event) -> Result<()> {
        self.store.transact(Txn { then: vec![Audit::op(event)?], ..Txn::default() }).await?;
        Ok(())
    }

    /// The end of the chain, to be kept elsewhere.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn head(&self) -> Result<Head> {
        Ok(self.read_head().await?.0)
    }

    async fn read_head(&self) -> Result<(Head, Revision)> {
        let found = self.store.get(&key(&[HEAD])?).await?.item;
        let head = found.as_ref().map_or(Ok(Head::EMPTY), records::read)?;
        Ok((head, found.map_or(Revision(0), |found| found.modified)))
    }

    /// Chains all records that are open, and says how many they were.
    ///
    /// # Errors
    /// When another process chains, too, or the store fails. What was chained before stays so.
    pub async fn seal(&self) -> Result<u64> {
        let mut sealed = 0;
        loop {
            let mut open = self.open().await?;
            if open.is_empty() {
                return Ok(sealed);
            }
            open.sort_by(|one, other| (one.modified, &one.key).cmp(&(other.modified, &other.key)));
            for batch in open.chunks(BATCH) {
                self.chain(batch).await?;
                sealed += batch.len() as u64;
            }
        }
    }

    /// A page of open records, of one revision of the store: what is older than the newest of them is among them.
    async fn open(&self) -> Result<Vec<KeyValue>> {
        let mut open = Vec::new();
        let mut page = Some(Range::prefix(&below(&[OPEN])?));
        while let Some(range) = page {
            let reply = self.store.range(&range).await?;
            page = range.next(&reply);
            open.extend(reply.items);
        }
        Ok(open)
    }

    async fn chain(&self, batch: &[KeyValue]) -> Result<()> {
        let (mut head, modified) = self.read_head().await?;
        let head_key = key(&[HEAD])?;
        let mut then = Vec::with_capacity(2 * batch.len() + 1);
        for open in batch {
            let record = String::from_utf8_lossy(&open.value).into_owned();
            head = head.next(&record);
            let value = records::write(&Stored { record, hash: head.hash })?;
            then.push(Op::Put { key: link_key(head.links)?, value, lease: None });
            then.push(Op::Delete(open.key.clone()));
        }
        then.push(Op::Put { key: head_key.clone(), value: records::write(&head)?, lease: None });
        // INVARIANT: a record is chained once: it is still open, and nobody else has chained since the head was read.
        let mut compare =
            vec![Compare { key: head_key, subject: Subject::Modified(Relation::Equal, modified) }];
        compare.extend(batch.iter().map(|open| records::exists(&open.key, true)));
        let done = self.store.transact(Txn { compare, then, otherwise: Vec::new() }).await?.succeeded;
        if done { Ok(()) } else { Err(AuditError::NotAlone) }
    }

    /// Links from a number on, at most so many; all of them, or those of one tenant's business.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list(&self, from: u64, limit: usize, tenant: Option<&TenantName>) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        let mut page = Some(self.from(from)?);
        while let Some(range) = page {
            let reply = self.store.range(&range).await?;
            for item in &reply.items {
                let (number, stored) = parse(item)?;
                let event: Event = serde_json::from_str(&stored.record)
                    .map_err(|cause| RecordError::Read { key: item.key.to_string(), cause })?;
                if tenant.is_none() || event.tenant.as_ref() == tenant {
                    links.push(Link { number, event, hash: stored.hash });
                }
                if links.len() >= limit {
                    return Ok(links);
                }
            }
            page = range.next(&reply);
        }
        Ok(links)
    }

    fn from(&self, number: u64) -> Result<Range> {
        let after = number.checked_sub(1).filter(|before| *before > 0).map(link_key).transpose()?;
        Ok(Range { after, ..Range::prefix(&below(&[CHAIN])?) })
    }

    /// Checks the whole chain against its head, and the head against one that was kept elsewhere, if there is one.
    ///
    /// # Errors
    /// The first thing that is not as it was.
    pub async fn verify(&self, kept: Option<Head>) -> Result<Head> {
        let mut head = Head::EMPTY;
        let mut page = Some(Range::prefix(&below(&[CHAIN])?));
        let mut read_at = None;
        while let Some(range) = page {
            let reply = self.store.range(&range).await?;
            read_at.get_or_insert(reply.revision);
            for item in &reply.items {
                head = check_link(head, item, kept)?;
            }
            page = range.next(&reply);
        }
        // Of the same moment: links may have come since.
        let claimed = Range { at: read_at, ..Range::prefix(&Prefix::new(HEAD).map_err(RecordError::Key)?) };
        let claimed = self.store.range(&claimed).await?;
        let claimed = claimed.items.first().map_or(Ok(Head::EMPTY), records::read)?;
        let least = claimed.links.max(kept.map_or(0, |kept| kept.links));
        if head.links < least {
            return Err(AuditError::Missing { number: head.links + 1 });
        }
        if head.links > claimed.links {
            return Err(AuditError::Beyond { links: claimed.links });
        }
        if head.hash != claimed.hash {
            return Err(AuditError::OtherHead { found: claimed.hash, expected: head.hash });
        }
        Ok(head)
    }
}

/// Checks the link that follows `head`, and gives the new head.
fn check_link(head: Head, item: &KeyValue, kept: Option<Head>) -> Result<Head> {
    let (number, stored) = parse(item)?;
    let expected = head.links + 1;
    if number != expected {
        return Err(AuditError::Missing { number: expected });
    }
    let head = head.next(&stored.record);
    if head.hash != stored.hash {
        return Err(AuditError::Changed { number });
    }
    match kept.filter(|kept| kept.links == number && kept.hash != head.hash) {
        Some(kept) => Err(AuditError::OtherHead { found: head.hash, expected: kept.hash }),
        None => Ok(head),
    }
}

/// Numbers have 20 digits, so that the store's order is theirs.
fn link_key(number: u64) -> records::Result<Key> {
    key(&[CHAIN, &format!("{number:020}")])
}

fn parse(item: &KeyValue) -> Result<(u64, Stored)> {
    let stored = records::read(item)?;
    let digits = item.key.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let number = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    // What has no number is none of ours.
    number.map(|number| (number, stored)).ok_or(AuditError::Changed { number: 0 })
}

#[cfg(test)]
mod tests;
