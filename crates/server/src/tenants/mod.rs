//! Tenants: who shares the platform without sharing anything else.
//!
//! A tenant that is deleted is first closed: from that transaction on nothing new can be made for it, and its tokens are
//! refused. Then whoever holds something of it (hosts, stores) lets go, and at last its name is free again.

use std::sync::Arc;

use bailey_types::ids::TenantName;
use serde::{Deserialize, Serialize};

use crate::records::{self, RecordError, below, exists, key};
use crate::store::{Compare, Op, Range, Relation, Store, StoreError, Subject, Txn};
use crate::time::{Timestamp, WallClock};

const KIND: &str = "tenant";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Active,
    /// It is being deleted: nothing new is made for it.
    Closing,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub name: TenantName,
    pub created: Timestamp,
    pub state: State,
}

#[derive(Debug, thiserror::Error)]
pub enum TenantError {
    #[error("making the tenant {0}: there is one of this name already; choose another")]
    Exists(TenantName),
    #[error("there is no tenant {0}")]
    NotFound(TenantName),
    #[error("the tenant {0} is being deleted; wait until it is gone")]
    Closing(TenantName),
    #[error("forgetting the tenant {0}: it is still active; close it first")]
    Active(TenantName),
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl From<StoreError> for TenantError {
    fn from(error: StoreError) -> TenantError {
        TenantError::Record(error.into())
    }
}

pub type Result<T> = std::result::Result<T, TenantError>;

pub struct Tenants {
    store: Arc<dyn Store>,
    clock: Arc<dyn WallClock>,
}

impl Tenants {
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn WallClock>) -> Tenants {
        Tenants { store, clock }
    }

    /// Makes a tenant. `audit` is done with it, or not at all.
    ///
    /// # Errors
    /// When there is one of this name, also one that is being deleted; or it cannot be stored.
    pub async fn create(&self, name: &TenantName, audit: Op) -> Result<Tenant> {
        let tenant = Tenant { name: name.clone(), created: self.clock.now(), state: State::Active };
        let key = key(&[KIND, name.as_str()])?;
        let put = Op::Put { key: key.clone(), value: records::write(&tenant)?, lease: None };
        let txn = Txn { compare: vec![exists(&key, false)], then: vec![put, audit], otherwise: Vec::new() };
        if self.store.transact(txn).await?.succeeded {
            Ok(tenant)
        } else {
            Err(TenantError::Exists(name.clone()))
        }
    }

    /// One tenant.
    ///
    /// # Errors
    /// When there is none of this name, or the store cannot be read.
    pub async fn get(&self, name: &TenantName) -> Result<Tenant> {
        let found = self.store.get(&key(&[KIND, name.as_str()])?).await?.item;
        Ok(records::read(&found.ok_or_else(|| TenantError::NotFound(name.clone()))?)?)
    }

    /// All tenants, by their names.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list(&self) -> Result<Vec<Tenant>> {
        let mut tenants = Vec::new();
        let mut page = Some(Range::prefix(&below(&[KIND])?));
        while let Some(range) = page {
            let reply = self.store.range(&range).await?;
            for item in &reply.items {
                tenants.push(records::read(item)?);
            }
            page = range.next(&reply);
        }
        Ok(tenants)
    }

    /// The comparison that a tenant is there as it was read, for transactions that make something for it: it fails if the
    /// tenant was closed meanwhile.
    ///
    /// # Errors
    /// When there is no such tenant, or it is being deleted; or the store cannot be read.
    pub async fn active(&self, name: &TenantName) -> Result<Compare> {
        let key = key(&[KIND, name.as_str()])?;
        let found = self.store.get(&key).await?.item.ok_or_else(|| TenantError::NotFound(name.clone()))?;
        match records::read::<Tenant>(&found)?.state {
            State::Active => Ok(Compare { key, subject: Subject::Modified(Relation::Equal, found.modified) }),
            State::Closing => Err(TenantError::Closing(name.clone())),
        }
    }

    /// Begins to delete a tenant. That it was begun before is no error.
    ///
    /// # Errors
    /// When there is none, or it cannot be stored.
    pub async fn close(&self, name: &TenantName, audit: Op) -> Result<()> {
        let key = key(&[KIND, name.as_str()])?;
        let tenant = Tenant { state: State::Closing, ..self.get(name).await? };
        let put = Op::Put { key: key.clone(), value: records::write(&tenant)?, lease: None };
        let txn = Txn { compare: vec![exists(&key, true)], then: vec![put, audit], otherwise: Vec::new() };
        if self.store.transact(txn).await?.succeeded {
            Ok(())
        } else {
            Err(TenantError::NotFound(name.clone()))
        }
    }

    /// Ends the deletion of a tenant of which nothing is left: its name is free.
    ///
    /// # Errors
    /// When there is none, or it is still active; or it cannot be stored.
    pub async fn forget(&self, name: &TenantName, audit: Op) -> Result<()> {
        let key = key(&[KIND, name.as_str()])?;
        let found = self.store.get(&key).await?.item.ok_or_else(|| TenantError::NotFound(name.clone()))?;
        if records::read::<Tenant>(&found)?.state == State::Active {
            return Err(TenantError::Active(name.clone()));
        }
        // Nobody opens a tenant again: that it is there is all that has to hold.
        let txn = Txn {
            compare: vec![exists(&key, true)],
            then: vec![Op::Delete(key), audit],
            otherwise: Vec::new(),
        };
        if self.store.transact(txn).await?.succeeded {
            Ok(())
        } else {
            Err(TenantError::NotFound(name.clone()))
        }
    }
}

#[cfg(test)]
mod tests;
