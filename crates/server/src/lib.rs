//! `bailey-server`, the control plane. So far: its [`store`], and in it [`tenants`], [`tokens`] and the [`audit`].
#![forbid(unsafe_code)]

pub mod audit;
pub mod random;
pub mod records;
pub mod store;
pub mod tenants;
pub mod time;
pub mod tokens;
