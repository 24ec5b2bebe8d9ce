//! `bailey-server`, the control plane. So far there is its [`store`].
#![forbid(unsafe_code)]

pub mod store;
