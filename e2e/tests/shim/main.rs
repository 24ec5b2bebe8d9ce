//! The shim's tests: containerd's own command line drives sandboxes, as anybody's would.
//!
//! They need root. `BAILEY_E2E_RUNTIME=io.containerd.runc.v2` runs them with another runtime, which checks the tests;
//! the other variables are in `bailey_e2e::settings`.
#![forbid(unsafe_code)]

mod bad_input;
mod class;
mod files;
mod host;
mod images;
mod life;
mod limits;
mod neighbours;
mod production;
mod run;
mod services;
mod spares;
mod templates;
mod walls;
