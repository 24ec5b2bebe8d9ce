//! Tokens: what a caller proves itself with. Shown once, stored as a hash, good for a time and for some things.

mod secret;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bailey_types::ids::{TenantName, TokenId};
use serde::{Deserialize, Serialize};

pub use self::secret::Secret;
use self::secret::Stored;
use crate::random::{Entropy, characters};
use crate::records::{self, RecordError, below, exists, key};
use crate::store::{Compare, Op, Range, Store, Txn};
use crate::time::{Timestamp, WallClock};

/// How long a token is good for when nobody says.
pub const LIFE_DEFAULT: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// The longest that one may be good for.
pub const LIFE_MAX: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// The shortest.
pub const LIFE_MIN: Duration = Duration::from_secs(60);
/// Longest label, in bytes.
pub const LABEL_MAX: usize = 200;
/// Most tokens that one owner may have at a time.
pub const PER_OWNER_MAX: usize = 1000;

/// What a token may be used for. Which actions each of them covers, the policies say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Seeing what there is.
    Read,
    /// Running, stopping and changing workloads and images.
    Write,
    /// Making and revoking tokens, and what else belongs to the owner as a whole.
    Manage,
}

/// Whose token it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Whoever runs the platform.
    Operator,
    Tenant(TenantName),
}

impl Owner {
    /// The part of a key. No tenant can be called as the operator is: that name is reserved.
    fn as_key(&self) -> &str {
        match self {
            Owner::Operator => "operator",
            Owner::Tenant(name) => name.as_str(),
        }
    }
}

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub id: TokenId,
    pub owner: Owner,
    /// What people call it.
    pub label: String,
    pub scopes: BTreeSet<Scope>,
    pub created: Timestamp,
    pub expires: Timestamp,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct NewToken {
    pub owner: Owner,
    pub label: String,
    pub scopes: BTreeSet<Scope>,
    /// How long it shall be good for.
    pub life: Duration,
}

/// As it is stored.
#[derive(Serialize, Deserialize)]
struct Record {
    token: Token,
    /// SHA-256 of the whole token.
    digest: [u8; 32],
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("making a token: the label has {0} bytes, the most is {LABEL_MAX}; use a shorter one")]
    LongLabel(usize),
    #[error("making a token: it would be good for nothing; name at least one scope (read, write, manage)")]
    NoScope,
    #[error("making a token: {} seconds is no life for one; ask for a minute to 366 days", .0.as_secs())]
    Life(Duration),
    #[error("making a token: its owner has {PER_OWNER_MAX} already; revoke some first")]
    TooMany,
    #[error("making a token: something has changed while it was made; try again")]
    Changed,
    #[error("there is no token {0} here")]
    NotFound(TokenId),
    #[error("making a token: the system gave no randomness")]
    Entropy(#[source] std::io::Error),
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl From<crate::store::StoreError> for TokenError {
    fn from(error: crate::store::StoreError) -> TokenError {
        TokenError::Record(error.into())
    }
}

/// Why a token that was presented is none. Callers are told nothing of this: all of it is one answer to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It does not look like one.
    Form,
    /// There is none of this id, or it was revoked.
    Unknown,
    /// There is one of this id, with another secret.
    Forged,
    Expired,
}

pub struct Tokens {
    store: Arc<dyn Store>,
    clock: Arc<dyn WallClock>,
    entropy: Arc<dyn Entropy>,
}

const KIND: &str = "token";
const BY_OWNER: &str = "token-of";

impl Tokens {
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn WallClock>, entropy: Arc<dyn Entropy>) -> Tokens {
        Tokens { store, clock, entropy }
    }

    /// Makes a token, and gives its secret, which nobody can read later. `conditions` must hold (that its tenant is
    /// active), and `audit` is done with it, or not at all; it is made for the token.
    ///
    /// # Errors
    /// When what is asked for makes no sense or is too much, or cannot be stored.
    pub async fn make(
        &self,
        new: NewToken,
        conditions: Vec<Compare>,
        audit: impl FnOnce(&Token) -> records::Result<Op>,
    ) -> Result<(Token, Secret), TokenError> {
        check(&new)?;
        if self.list(&new.owner).await?.len() >= PER_OWNER_MAX {
            return Err(TokenError::TooMany);
        }
        let id = characters(&*self.entropy, TokenId::LENGTH).map_err(TokenError::Entropy)?;
        let id: TokenId = id.parse().map_err(|error| TokenError::Entropy(std::io::Error::other(error)))?;
        let secret = Secret::make(&id, &*self.entropy).map_err(TokenError::Entropy)?;
        let NewToken { owner, label, scopes, life } = new;
        let created = self.clock.now();
        let token = Token { id, owner, label, scopes, created, expires: created.plus(life) };
        let record = Record { token: token.clone(), digest: Stored::of(secret.expose()).0 };
        let (key, index) = keys(&token)?;
        let put = |key, value| Op::Put { key, value, lease: None };
        let mut compare = conditions;
        compare.push(exists(&key, false));
        let then = vec![put(key, records::write(&record)?), put(index, records::write(&())?), audit(&token)?];
        // That an id is drawn twice happens one in 2^60 times: then nothing is made, either.
        let done = self.store.transact(Txn { compare, then, otherwise: Vec::new() }).await?.succeeded;
        if done { Ok((token, secret)) } else { Err(TokenError::Changed) }
    }

    /// Finds out whose token this is.
    ///
    /// # Errors
    /// When the store cannot be read. That it is nobody's is in the answer.
    pub async fn check(&self, presented: &str) -> Result<std::result::Result<Token, Refusal>, TokenError> {
        let Some(presented) = secret::parse(presented) else { return Ok(Err(Refusal::Form)) };
        let found = self.store.get(&key(&[KIND, presented.id.as_str()])?).await?.item;
        let record: Option<Record> = found.as_ref().map(records::read).transpose()?;
        // What is not there is compared, too: how long an answer takes tells nothing.
        let digest = Stored(record.as_ref().map_or([0; 32], |record| record.digest));
        let is_same = presented.digest.is(&digest);
        Ok(match record {
            None => Err(Refusal::Unknown),
            Some(_) if !is_same => Err(Refusal::Forged),
            Some(Record { token, .. }) if token.expires <= self.clock.now() => Err(Refusal::Expired),
            Some(Record { token, .. }) => Ok(token),
        })
    }

    /// All tokens of an owner, by their ids, those that have expired with them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list(&self, owner: &Owner) -> Result<Vec<Token>, TokenError> {
        let mut tokens = Vec::new();
        let mut page = Some(Range::prefix(&below(&[BY_OWNER, owner.as_key()])?));
        while let Some(range) = page {
            let reply = self.store.range(&range).await?;
            for item in &reply.items {
                let id = item.key.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
                let id = String::from_utf8_lossy(id);
                // It may have been revoked since.
                if let Some(found) = self.store.get(&key(&[KIND, &id])?).await?.item {
                    tokens.push(records::read::<Record>(&found)?.token);
                }
            }
            page = range.next(&reply);
        }
        Ok(tokens)
    }

    /// Revokes a token of an owner: it is refused from now on. `audit` is done with it, or not at all.
    ///
    /// # Errors
    /// When this owner has no such token, whoever else may have one; or it cannot be stored.
    pub async fn revoke(&self, owner: &Owner, id: &TokenId, audit: Op) -> Result<(), TokenError> {
        let (token, index) = (key(&[KIND, id.as_str()])?, key(&[BY_OWNER, owner.as_key(), id.as_str()])?);
        let txn = Txn {
            compare: vec![exists(&index, true)],
            then: vec![Op::Delete(token), Op::Delete(index), audit],
            otherwise: Vec::new(),
        };
        if self.store.transact(txn).await?.succeeded { Ok(()) } else { Err(TokenError::NotFound(id.clone())) }
    }
}

fn keys(token: &Token) -> records::Result<(crate::store::Key, crate::store::Key)> {
    let id = token.id.as_str();
    Ok((key(&[KIND, id])?, key(&[BY_OWNER, token.owner.as_key(), id])?))
}

fn check(new: &NewToken) -> Result<(), TokenError> {
    if new.label.len() > LABEL_MAX {
        return Err(TokenError::LongLabel(new.label.len()));
    }
    if new.scopes.is_empty() {
        return Err(TokenError::NoScope);
    }
    if !(LIFE_MIN..=LIFE_MAX).contains(&new.life) {
        return Err(TokenError::Life(new.life));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
