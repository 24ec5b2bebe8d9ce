//! What the benchmarks share: a machine to measure on, numbers, and the processor time that something cost.
//!
//! Each benchmark is a program in `src/bin`, run by `cargo xtask bench NAME`. It runs what it compares in turns, in one
//! run, on a containerd of its own, and leaves nothing behind.
#![forbid(unsafe_code)]

pub mod figures;
pub mod machine;
pub mod meter;
pub mod process;

use anyhow::{Context as _, Result};

/// Tells the person who measures one line.
#[allow(clippy::print_stdout, reason = "a benchmark talks to the person who runs it; this is the only place")]
pub fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

/// The count that is the benchmark's only argument, or what it is without.
pub fn count(default: usize) -> Result<usize> {
    match std::env::args().nth(1) {
        Some(text) => text.parse().with_context(|| format!("{text:?} is no count")),
        None => Ok(default),
    }
}

/// Says on what kind of machine the numbers were measured, and how busy it was.
pub fn say_machine() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("processors", |(_, model)| model);
    let load = read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ");
    say(format_args!("machine: {cpus} × {model}; load average at the start: {load}"));
}
