//! System calls that no safe crate wraps.
#![allow(unsafe_code, reason = "the one place in this crate for raw system calls")]
