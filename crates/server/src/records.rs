//! Objects of the control plane as the store has them: JSON values, under keys that begin with their kind.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::store::{Compare, Key, KeyValue, LimitError, Prefix, StoreError, Subject};

/// What goes wrong with objects that are stored.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("naming an object in the store")]
    Key(#[from] LimitError),
    #[error("writing an object: it cannot be JSON")]
    Write(#[source] serde_json::Error),
    #[error(
        "reading {key} from the store: it is not what this version writes; restore a backup or ask for help"
    )]
    Read {
        key: String,
        #[source]
        cause: serde_json::Error,
    },
}

pub type Result<T> = std::result::Result<T, RecordError>;

/// The key of parts, which contain no slash themselves.
pub(crate) fn key(parts: &[&str]) -> Result<Key> {
    Ok(Key::new(parts.join("/"))?)
}

/// What all keys below these parts begin with.
pub(crate) fn below(parts: &[&str]) -> Result<Prefix> {
    Ok(Prefix::new(format!("{}/", parts.join("/")))?)
}

pub(crate) fn write(value: &impl Serialize) -> Result<Bytes> {
    serde_json::to_vec(value).map(Bytes::from).map_err(RecordError::Write)
}

pub(crate) fn read<T: DeserializeOwned>(found: &KeyValue) -> Result<T> {
    serde_json::from_slice(&found.value)
        .map_err(|cause| RecordError::Read { key: found.key.to_string(), cause })
}

/// The comparison that a key is there, or is not.
pub(crate) fn exists(key: &Key, exists: bool) -> Compare {
    Compare { key: key.clone(), subject: Subject::Exists(exists) }
}
