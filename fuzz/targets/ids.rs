//! Ids, as callers write them.
#![no_main]
#![forbid(unsafe_code)]

use bailey_fuzz::{ids, seeds};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seeds::write(&seeds::ids(), ids::check),
    |input: &[u8]| {
        ids::check(input);
    }
);
