//! Control messages of a host.
#![no_main]
#![forbid(unsafe_code)]

use bailey_fuzz::{messages, seeds};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seeds::write(&seeds::to_guest(), messages::to_guest),
    |input: &[u8]| {
        messages::to_guest(input);
    }
);
