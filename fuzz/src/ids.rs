//! Ids, as callers write them.

use std::fmt::Display;
use std::str::FromStr;

use bailey_types::ids::{IdError, RequestId, TenantName, TokenId};

/// The longest sentence about a text that is none: it repeats only so much of it.
const TOLD_MAX: usize = 1000;

/// A text is an id as it stands, of characters that are harmless wherever it goes, or a short error.
pub fn check(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    let name = one::<TenantName>(text, "-", 2..=40);
    let token = one::<TokenId>(text, "", 12..=12);
    let request = one::<RequestId>(text, "", 20..=20);
    name || token || request
}

fn one<T: FromStr<Err = IdError> + Display>(
    text: &str,
    besides: &str,
    length: std::ops::RangeInclusive<usize>,
) -> bool {
    match text.parse::<T>() {
        Ok(id) => {
            assert_eq!(id.to_string(), text, "an id is not what was written");
            let harmless = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || besides.contains(c);
            assert!(text.chars().all(harmless) && length.contains(&text.len()), "{text:?} is an id");
            true
        }
        Err(error) => {
            let told = error.to_string().len();
            assert!(told <= TOLD_MAX, "{told} bytes to say that a text is no id");
            false
        }
    }
}
