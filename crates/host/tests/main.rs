//! Tests of the jail. They need root, and say so when they do not have it.
#![allow(clippy::unwrap_used, reason = "where a test cannot be set up, it fails")]

mod jail;
