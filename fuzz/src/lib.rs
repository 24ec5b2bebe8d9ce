//! What Bailey promises of its parsers, whatever bytes they are given: one check for each program in `targets`.
//!
//! A check takes an input of libFuzzer's and panics where a promise is broken. It gives back whether the parser
//! accepted something, so that [`seeds`] can tell that a seed still is what it was made to be.
#![forbid(unsafe_code)]

pub mod frames;
pub mod ids;
pub mod messages;
pub mod seeds;
