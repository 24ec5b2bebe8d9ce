//! Frames, cut anyhow.
#![no_main]
#![forbid(unsafe_code)]

use bailey_fuzz::{frames, seeds};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seeds::write(&seeds::frames(), frames::check),
    |input: &[u8]| {
        frames::check(input);
    }
);
