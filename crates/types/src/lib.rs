//! Ids, and the protocols that Bailey's programs speak with each other.
//!
//! Pure values: no I/O, no clock, no runtime. Whatever crosses a wall (guest to host above all) is defined,
//! bounded and parsed here, so that it can be fuzzed without either side running.
#![forbid(unsafe_code)]

pub mod guest;
pub mod ids;
