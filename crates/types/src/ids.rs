//! Ids: a type for each kind, checked where it comes in, so that no name reaches a path, a key or a label unchecked.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a text is no id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    #[error("the {kind} {text:?} is not {rule}")]
    Form { kind: &'static str, text: String, rule: &'static str },
    #[error("the {kind} {text:?} is reserved for the platform itself")]
    Reserved { kind: &'static str, text: String },
}

/// Longest part of a wrong text that an error repeats, in characters.
const SHOWN_MAX: usize = 80;

fn form(kind: &'static str, text: &str, rule: &'static str) -> IdError {
    IdError::Form { kind, text: text.chars().take(SHOWN_MAX).collect(), rule }
}

/// Makes an id type of a checked text: it is parsed, printed and (de)serialised as that text.
macro_rules! text_id {
    ($name:ident) => {
        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

/// A tenant's name: a DNS label of 2 to 40 characters that begins with a letter. It is a part of containerd's
/// namespaces, of paths and of host names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantName(String);

/// Names that would be taken for the platform's own parts.
const RESERVED: [&str; 6] = ["admin", "bailey", "default", "operator", "platform", "system"];

impl FromStr for TenantName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<TenantName, IdError> {
        let kind = "tenant's name";
        let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let bytes = text.as_bytes();
        let ends_well = bytes.first().is_some_and(u8::is_ascii_lowercase) && bytes.last() != Some(&b'-');
        if !(2..=40).contains(&bytes.len()) || !ends_well || !bytes.iter().all(inner) {
            let rule =
                "2 to 40 lower-case letters, digits and hyphens, with a letter first and no hyphen last";
            return Err(form(kind, text, rule));
        }
        if RESERVED.contains(&text) {
            return Err(IdError::Reserved { kind, text: text.to_owned() });
        }
        Ok(TenantName(text.to_owned()))
    }
}

text_id!(TenantName);

/// The public part of a token: what lists show and what it is revoked by. Made by the platform alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenId(String);

impl TokenId {
    /// Characters of an id: 60 bits, in lower-case base 32.
    pub const LENGTH: usize = 12;
}

impl FromStr for TokenId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<TokenId, IdError> {
        if text.len() == TokenId::LENGTH && is_base32(text) {
            return Ok(TokenId(text.to_owned()));
        }
        Err(form("token's id", text, "12 characters of a to z and 2 to 7"))
    }
}

text_id!(TokenId);

/// One request to the platform: what the caller is told, the logs repeat, and the audit keeps.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestId(String);

impl RequestId {
    /// Characters of an id: 100 bits, in lower-case base 32.
    pub const LENGTH: usize = 20;
}

impl FromStr for RequestId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<RequestId, IdError> {
        if text.len() == RequestId::LENGTH && is_base32(text) {
            return Ok(RequestId(text.to_owned()));
        }
        Err(form("request's id", text, "20 characters of a to z and 2 to 7"))
    }
}

text_id!(RequestId);

/// RFC 4648's alphabet, in lower case.
fn is_base32(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_lowercase() || (b'2'..=b'7').contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tenants_name_is_a_dns_label_and_not_ours() {
        for good in ["a1", "acme", "acme-2", "a-b-c", &"a".repeat(40)] {
            assert_eq!(good.parse::<TenantName>().unwrap().as_str(), good);
        }
        let long = "a".repeat(41);
        for bad in
            ["", "a", "1a", "-a", "a-", "A1", "a_b", "a.b", "a/b", "..", "a b", "ä1", "a\0", "a\n", &long]
        {
            assert!(matches!(bad.parse::<TenantName>(), Err(IdError::Form { .. })), "{bad:?}");
        }
        assert!(matches!("system".parse::<TenantName>(), Err(IdError::Reserved { .. })));
    }

    #[test]
    fn an_error_repeats_only_so_much() {
        let error = "A".repeat(10_000).parse::<TenantName>().unwrap_err();
        assert!(error.to_string().len() < 300);
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_safe_in_paths_and_labels(text in "\\PC{0,50}") {
            if let Ok(name) = text.parse::<TenantName>() {
                prop_assert!(!name.as_str().contains(['/', '.', '\0', ' ', ':']));
                prop_assert_eq!(name.to_string(), text);
            }
        }

        #[test]
        fn ids_survive_json(text in "[a-z2-7]{12}") {
            let id: TokenId = text.parse().unwrap();
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(&json, &format!("\"{text}\""));
            prop_assert_eq!(serde_json::from_str::<TokenId>(&json).unwrap(), id);
        }
    }
}
