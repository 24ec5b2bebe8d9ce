//! `bailey-guest`: pid 1 of every microVM.
//!
//! One thread, one event loop: it answers the host, starts and reaps the container's processes, and carries their
//! streams. It holds no secret of the host's, and nothing outside of the VM depends on its being honest.

mod agent;
mod boot;
mod cgroup;
mod channel;
mod container;
mod disk;
mod error;
mod identity;
mod process;
mod rehearsal;
mod streams;
mod sys;

use std::fs::OpenOptions;
use std::io::Write;
use std::process::exit;

use nix::sys::reboot::{RebootMode, reboot};

fn main() {
    if std::process::id() != 1 {
        say("bailey-guest is the first process of a microVM and does nothing elsewhere");
        exit(2);
    }
    let result = boot::make_root()
        .and_then(|()| boot::load_modules())
        .and_then(|()| boot::enter_root())
        .and_then(|()| agent::Agent::new())
        .and_then(|mut agent| agent.run());
    // The last line on the console is what the host shows when a guest ends by itself.
    if let Err(error) = result {
        say(&format!("bailey-guest: {error}"));
    }
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    say(&format!("bailey-guest: rebooting: {error}"));
}

/// Writes a line to the console.
fn say(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        // There is nowhere left to say that this failed.
        let _lost = writeln!(console, "{line}");
    }
}
