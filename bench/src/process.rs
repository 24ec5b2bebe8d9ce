//! Processes, as `/proc` tells of them.

use std::fs;

use anyhow::{Context as _, Result};

/// Clock ticks per second in `/proc`; the same on every Linux of this architecture.
const TICKS: f64 = 100.0;

/// One process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// What the kernel calls it.
    pub name: String,
    /// Whether it has ended and nobody has asked how.
    pub is_zombie: bool,
    /// Processor time of its own, in milliseconds.
    pub own_ms: f64,
    /// Processor time of it and of those children that it has waited for, in milliseconds.
    pub with_children_ms: f64,
}

impl Process {
    /// Reads one; none if it is gone.
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (head, rest) = stat.rsplit_once(") ")?;
        let name = head.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = rest.split(' ').collect();
        let ms = |index: usize| {
            let ticks: f64 = fields.get(index).and_then(|field| field.parse().ok()).unwrap_or(0.0);
            ticks / TICKS * 1e3
        };
        let own_ms = ms(11) + ms(12);
        let with_children_ms = own_ms + ms(13) + ms(14);
        let parent = fields.get(1)?.parse().ok()?;
        Some(Self { pid, parent, name, is_zombie: fields.first() == Some(&"Z"), own_ms, with_children_ms })
    }
}

/// All processes of the machine.
pub fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()));
    pids.filter_map(Process::read).collect()
}

/// What the kernel calls shims and keepers: by their file, or by the link that they start themselves by.
const SHIMS: [&str; 2] = ["containerd-shim", "exe"];

/// The shims and keepers that were started for this program's containerd: they become its children, but for a keeper
/// that is its shim's for as long as that lives.
pub fn shims() -> Vec<Process> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let named = all().into_iter().filter(|one| SHIMS.iter().any(|name| one.name.starts_with(name)));
    let (children, others): (Vec<_>, Vec<_>) = named.partition(|one| one.parent == own);
    let below = others.into_iter().filter(|one| children.iter().any(|child| child.pid == one.parent));
    let below: Vec<_> = below.collect();
    children.into_iter().chain(below).collect()
}

/// Memory of a process, in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Its pages, and its part of those that it shares.
    pub proportional: f64,
    /// Pages that nobody else has.
    pub private: f64,
}

impl Memory {
    /// Reads that of one process.
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
        };
        let private = field("Private_Clean:") + field("Private_Dirty:");
        Ok(Self { proportional: field("Pss:"), private })
    }

    /// Both of many.
    pub fn sum(parts: &[Self]) -> Self {
        parts.iter().fold(Self::default(), |sum, part| Self {
            proportional: sum.proportional + part.proportional,
            private: sum.private + part.private,
        })
    }
}
