//! containerd's task API for one sandbox.

mod endpoint;
mod events;
mod exits;
mod io;
mod logger;
mod process;
mod service;
mod stats;

pub(crate) use self::endpoint::Endpoint;
pub(crate) use self::events::Publisher;
pub(crate) use self::service::Service;
