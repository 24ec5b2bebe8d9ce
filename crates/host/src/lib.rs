//! The privileged kernel work that Bailey does on a host: cgroups, the jail around a VMM, namespaces.
//!
//! Owns every system call that needs root. Knows no tenant, no API and no VMM by name: callers say what they
//! want in plain values. `unsafe` lives in [`sys`] alone.

pub mod block;
pub mod cgroup;
pub mod jail;
pub mod sys;
