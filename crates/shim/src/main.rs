//! `containerd-shim-bailey-v1`: runs each container in a microVM of its own.
//!
//! containerd calls it as `… start` and `… delete` beside a bundle; `start` leaves one process that serves the task
//! API for that one sandbox. Two more ways in are for the shim alone: the jail's steps, and a template's keeper.
#![forbid(unsafe_code)]

mod app;
mod args;
mod bundle;
mod clock;
mod commands;
mod config;
mod error;
mod guest;
mod image;
mod kvm;
mod log;
mod random;
mod sandbox;
mod scratch;
mod size;
mod task;
mod template;
mod vm;
mod vmm;

use std::io::Write;
use std::process::ExitCode;

use crate::args::{Action, Args};

fn main() -> ExitCode {
    // First of all, while there is one thread: this process may be a jail's, or the one above Firecracker.
    bailey_host::jail::enter_if_asked();
    vmm::firecracker::parent::enter_if_asked();
    let result = Args::parse(std::env::args_os().skip(1)).and_then(|args| match args.action {
        Action::Start => commands::start(&args),
        Action::Delete => commands::delete(&args),
        Action::Serve => app::serve(&args),
        Action::KeepTemplate => template::keep(&args),
        Action::Spare => template::wait(&args),
        Action::DropTemplates => template::drop_all(&args),
        Action::Collect => commands::collect(),
        Action::DropImages => commands::drop_images(&args),
        Action::Info => commands::info(),
        Action::Version => commands::version(),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what a shim says on its standard error.
            let _nowhere_else = writeln!(std::io::stderr(), "{}", error.chain());
            ExitCode::FAILURE
        }
    }
}
