//! Control messages of a guest.
#![no_main]
#![forbid(unsafe_code)]

use bailey_fuzz::{messages, seeds};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seeds::write(&seeds::from_guest(), messages::from_guest),
    |input: &[u8]| {
        messages::from_guest(input);
    }
);
