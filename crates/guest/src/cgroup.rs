//! The container's cgroup inside the VM (version 2, always: the guest kernel is ours).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bailey_types::guest::message::Stats;
use bailey_types::guest::spec::Limits;

use crate::error::{Context, Result};

const TOP: &str = "/sys/fs/cgroup";
const CONTAINER: &str = "/sys/fs/cgroup/container";

/// Makes the container's cgroup. It has no limits yet.
pub(crate) fn create() -> Result<()> {
    let controllers = fs::read_to_string(Path::new(TOP).join("cgroup.controllers"))
        .context(|| "reading the guest's cgroup controllers".into())?;
    for name in ["cpu", "memory", "pids", "io", "cpuset"] {
        if controllers.split_whitespace().any(|there| there == name) {
            write("", "cgroup.subtree_control", &format!("+{name}"))?;
        }
    }
    fs::create_dir(CONTAINER).context(|| "making the container's cgroup".into())
}

/// Removes the container's cgroup, in which nothing may be any more.
pub(crate) fn remove() -> Result<()> {
    fs::remove_dir(CONTAINER).context(|| "removing the container's cgroup".into())
}

/// A descriptor of the cgroup, for processes that are born in it.
pub(crate) fn open() -> Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(CONTAINER)
        .context(|| "opening the container's cgroup".into())
}

/// Its `memory.events`, which becomes ready (by priority) when a counter rises.
pub(crate) fn open_memory_events() -> Result<File> {
    File::open(Path::new(CONTAINER).join("memory.events")).context(|| "opening memory.events".into())
}

/// Sets the limits that are given, and leaves the others.
pub(crate) fn set(limits: &Limits) -> Result<()> {
    if let Some(bytes) = limits.memory_bytes {
        write("container", "memory.max", &bytes.to_string())?;
        // A guest has no swap; a kernel built without it has no such file.
        let _absent_without_swap = fs::write(Path::new(CONTAINER).join("memory.swap.max"), "0");
    }
    if let Some(pids) = limits.pids {
        write("container", "pids.max", &pids.to_string())?;
    }
    if let Some(quota) = limits.cpu_quota_us {
        write("container", "cpu.max", &format!("{quota} {}", limits.cpu_period_us.unwrap_or(100_000)))?;
    }
    if let Some(weight) = limits.cpu_weight {
        write("container", "cpu.weight", &weight.to_string())?;
    }
    Ok(())
}

fn write(group: &str, file: &str, value: &str) -> Result<()> {
    let path = Path::new(TOP).join(group).join(file);
    fs::write(&path, value).context(|| format!("setting {file} of the container to {value}"))
}

/// How often the kernel has killed for want of memory. Reads the file that is watched: only reading it through
/// that descriptor ends its being ready.
pub(crate) fn oom_kills(memory_events: &File) -> u64 {
    let mut text = [0; 1024];
    let count = memory_events.read_at(&mut text, 0).unwrap_or(0);
    field(&String::from_utf8_lossy(&text[..count]), "oom_kill")
}

/// The processes of the container, numbered as the VM's first pid namespace does.
pub(crate) fn pids() -> Result<Vec<u32>> {
    let text = fs::read_to_string(Path::new(CONTAINER).join("cgroup.procs"))
        .context(|| "listing the container's processes".into())?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Kills every process of the container.
pub(crate) fn kill() -> io::Result<()> {
    fs::write(Path::new(CONTAINER).join("cgroup.kill"), "1")
}

/// What the container has used.
pub(crate) fn stats() -> Stats {
    let (cpu, memory, events) = (read("cpu.stat"), read("memory.stat"), read("memory.events"));
    let number = |file: &str| read(file).trim().parse().unwrap_or(0);
    let io = read("io.stat");
    let io_sum = |key: &str| {
        let fields = io.split_whitespace().filter_map(|field| field.strip_prefix(key)?.strip_prefix('='));
        fields.filter_map(|value| value.parse::<u64>().ok()).sum()
    };
    Stats {
        cpu_usage_us: field(&cpu, "usage_usec"),
        cpu_user_us: field(&cpu, "user_usec"),
        cpu_system_us: field(&cpu, "system_usec"),
        cpu_periods: field(&cpu, "nr_periods"),
        cpu_throttled_periods: field(&cpu, "nr_throttled"),
        cpu_throttled_us: field(&cpu, "throttled_usec"),
        memory_bytes: number("memory.current"),
        memory_limit_bytes: number("memory.max"),
        memory_peak_bytes: number("memory.peak"),
        memory_anon_bytes: field(&memory, "anon"),
        memory_file_bytes: field(&memory, "file"),
        memory_inactive_file_bytes: field(&memory, "inactive_file"),
        memory_oom: field(&events, "oom"),
        memory_oom_kill: field(&events, "oom_kill"),
        pids: number("pids.current"),
        pids_limit: number("pids.max"),
        io_read_bytes: io_sum("rbytes"),
        io_write_bytes: io_sum("wbytes"),
        io_reads: io_sum("rios"),
        io_writes: io_sum("wios"),
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(CONTAINER).join(file)).unwrap_or_default()
}

fn field(text: &str, name: &str) -> u64 {
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    fields.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}
