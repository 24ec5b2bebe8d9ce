//! What a token looks like: `bly_`, its id, its secret, and a checksum, so that a scanner knows one when it sees one.

use std::fmt;

use bailey_types::ids::TokenId;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::random::{Entropy, base32, characters};

const PREFIX: &str = "bly";
/// Characters of the secret itself: 256 bits, and a few for the last one.
const SECRET: usize = 52;
/// Characters of the checksum.
const CHECK: usize = 4;

/// A whole token, shown once. It does not show itself in debug output, and is wiped from memory.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Makes one.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub(super) fn make(id: &TokenId, entropy: &dyn Entropy) -> std::io::Result<Secret> {
        let secret = Zeroizing::new(characters(entropy, SECRET)?);
        let body = Zeroizing::new(format!("{PREFIX}_{id}_{}", *secret));
        Ok(Secret(Zeroizing::new(format!("{}{}", *body, check(&body)))))
    }

    /// The token as its owner keeps it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret(…)")
    }
}

/// A token as somebody presented it: its form is right, which says nothing about who that is.
pub(super) struct Presented {
    pub(super) id: TokenId,
    pub(super) digest: Stored,
}

/// What is kept of a token: a hash. The secret has 256 random bits, so a plain one is enough.
#[derive(Clone)]
pub(super) struct Stored(pub(super) [u8; 32]);

impl Stored {
    pub(super) fn of(token: &str) -> Stored {
        Stored(Sha256::digest(token).into())
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub(super) fn is(&self, other: &Stored) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// Reads a token; none if it cannot be one of ours.
pub(super) fn parse(text: &str) -> Option<Presented> {
    let (body, found) = text.split_at_checked(text.len().checked_sub(CHECK)?)?;
    let mut parts = body.split('_');
    let (prefix, id, secret) = (parts.next()?, parts.next()?, parts.next()?);
    if prefix != PREFIX || secret.len() != SECRET || parts.next().is_some() || found != check(body) {
        return None;
    }
    Some(Presented { id: id.parse().ok()?, digest: Stored::of(text) })
}

fn check(body: &str) -> String {
    let mut text = base32().encode(&Sha256::digest(body));
    text.truncate(CHECK);
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::SystemEntropy;

    fn secret() -> Secret {
        Secret::make(&"abcdefgh2345".parse().unwrap(), &SystemEntropy).unwrap()
    }

    #[test]
    fn what_was_made_is_understood() {
        let secret = secret();
        let presented = parse(secret.expose()).unwrap();
        assert_eq!(presented.id.as_str(), "abcdefgh2345");
        assert!(presented.digest.is(&Stored::of(secret.expose())));
        assert_ne!(secret.expose(), super::tests::secret().expose());
    }

    #[test]
    fn it_does_not_show_itself() {
        assert_eq!(format!("{:?}", secret()), "Secret(…)");
    }

    proptest! {
        #[test]
        fn one_changed_character_makes_it_another(at in 0usize..73, by in "[a-z2-7_]") {
            let secret = secret();
            let mut changed = secret.expose().to_owned();
            prop_assume!(at < changed.len() && changed[at..=at] != by);
            changed.replace_range(at..=at, &by);
            // The checksum finds nearly all of them; the hash finds the rest.
            if let Some(presented) = parse(&changed) {
                prop_assert!(!presented.digest.is(&Stored::of(secret.expose())));
            }
        }

        #[test]
        fn any_text_is_read_without_harm(text in "\\PC{0,100}") {
            prop_assert!(parse(&text).is_none());
        }
    }
}
