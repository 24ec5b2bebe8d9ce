//! System calls that no safe crate wraps.
//!
//! Owns every `unsafe` block of this crate; each holds one operation. Must never decide anything: a function here
//! turns Rust values into one call and its result into an [`std::io::Result`].
#![allow(unsafe_code, reason = "the one place in this crate for raw system calls")]

pub mod mount;
pub mod privilege;
pub mod process;
pub mod tsc;

use std::io;

/// Turns the return value of a raw call into a result, taking the cause from `errno`.
fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
