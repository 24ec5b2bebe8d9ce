//! What the end-to-end tests share: a private containerd, images made from Debian packages, `ctr`.
//!
//! A test makes a [`Machine`](machine::Machine), which is a containerd of its own with everything in one temporary
//! folder, runs containers in it through the stock `ctr`, and ends it, which checks that nothing was left behind.
#![forbid(unsafe_code)]

pub mod containerd;
pub mod ctr;
pub mod host;
pub mod images;
pub mod leftovers;
pub mod machine;
pub mod on_host;
pub mod probe;
pub mod process;
pub mod settings;
pub mod spares;
pub mod wait;
