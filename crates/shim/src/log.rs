//! The shim's log: lines that containerd takes from the bundle's `log` pipe into its own.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::clock;

/// Writes to containerd's pipe if it is there, in the form that its other shims use.
pub(crate) fn to_containerd(debug: bool) {
    // Without a reader there is nowhere to write to, and opening would wait for one.
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let Ok(pipe) = OpenOptions::new().write(true).custom_flags(flags).open("log") else { return };
    let most = if debug { Level::DEBUG } else { Level::INFO };
    // There is one subscriber in a process, and this is called once.
    let _first = tracing::subscriber::set_global_default(Lines { out: Mutex::new(pipe), most });
}

/// Writes to standard error, for the programs that no containerd listens to.
pub(crate) fn to_stderr() {
    let Ok(out) = OpenOptions::new().write(true).open("/dev/stderr") else { return };
    // There is one subscriber in a process, and this is called once.
    let _first = tracing::subscriber::set_global_default(Lines { out: Mutex::new(out), most: Level::INFO });
}

struct Lines {
    out: Mutex<std::fs::File>,
    most: Level,
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= &self.most
    }

    fn event(&self, event: &Event<'_>) {
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let now = clock::since_epoch();
        let mut line = format!("time={}.{:03} level={level}", now.as_secs(), now.subsec_millis());
        event.record(&mut Fields(&mut line));
        line.push('\n');
        if let Ok(mut out) = self.out.lock() {
            // A full or closed pipe loses lines: a log must not stop what it tells of.
            let _lost = out.write_all(line.as_bytes());
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        let text = format!("{value:?}");
        // Writing to a string does not fail.
        let _written = if field.name() == "message" {
            write!(self.0, " {name}={:?}", text)
        } else {
            write!(self.0, " {name}={text}")
        };
    }
}
