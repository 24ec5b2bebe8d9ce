//! Control messages, of either direction.

use std::fmt::Debug;

use bailey_types::guest::message::{FromGuest, MessageError, ToGuest, decode, encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a host reads from a guest.
pub fn from_guest(input: &[u8]) -> bool {
    check::<FromGuest>(input)
}

/// What a guest reads from its host.
pub fn to_guest(input: &[u8]) -> bool {
    check::<ToGuest>(input)
}

/// Bytes are one message or an error. A message needs its last byte, is written again in no more bytes than it came
/// in, and read again as the same; with a byte after it, it is none.
fn check<M: Serialize + DeserializeOwned + PartialEq + Debug>(input: &[u8]) -> bool {
    let message: M = match decode(input) {
        Ok(message) => message,
        Err(MessageError::Trailing(rest)) => {
            assert!((1..input.len()).contains(&rest), "{rest} bytes too many of {}", input.len());
            return false;
        }
        Err(MessageError::Malformed(_)) => return false,
    };
    let shorter = input.split_last().map(|(_, shorter)| decode::<M>(shorter));
    assert!(
        matches!(shorter, Some(Err(MessageError::Malformed(_)))),
        "{message:?} does not need its last byte"
    );
    let mut again = encode(&message);
    assert!(
        again.len() <= input.len(),
        "{} bytes of {message:?}, which came in {}",
        again.len(),
        input.len()
    );
    assert_eq!(decode::<M>(&again).ok().as_ref(), Some(&message), "what was written is not read as the same");
    again.push(0);
    assert!(matches!(decode::<M>(&again), Err(MessageError::Trailing(1))), "a byte after {message:?}");
    true
}
