//! The jail around a VMM: what a guest finds when it has taken over the process that runs it.
//!
//! Owns the order in which a process loses its privileges (`enter.rs`), the read-only root that it is left with
//! ([`base`]), the filters of its system calls ([`seccomp`]) and the user ids that jails are given ([`uid`]). Knows
//! no VMM beyond the tables of system calls that [`Profile`] names: what runs is a program with arguments and open
//! descriptors.
//!
//! Must never start a process with less than was asked: a layer that the host lacks is either an error or is named
//! in the [`Report`], and each step that fails ends the child before the program has run one instruction.
//!
//! Why two programs' worth of steps: [`spawn`] clones a process with many threads, where the child may do nothing
//! but system calls; so the child executes this same program again, and [`enter_if_asked`], called first in its
//! `main`, does the rest in a process with one thread.

pub mod apparmor;
pub mod base;
mod enter;
mod error;
mod landlock;
pub mod path;
mod privilege;
mod root;
pub mod seccomp;
mod spawn;
mod spec;
pub mod uid;

pub use enter::enter_if_asked;
pub use error::{BoxedError, JailError};
pub use spawn::{Jailed, spawn};
pub use spec::{FileMount, JailSpec, Layers, Profile, Reopen, Report, Rlimits, SeccompLayer};
