//! Spares of our shim, as a list of processes shows them.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::machine::Machine;
use crate::wait;

/// What a spare that waits is called.
const WAITS: &str = "bailey-spare";

const SOON: Duration = Duration::from_secs(60);

/// The spares of a machine that wait.
pub fn waiting(machine: &Machine) -> Result<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("listing processes")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // Processes end while we look.
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        if comm.trim() == WAITS && words.any(|word| word == machine.containerd.namespace().as_bytes()) {
            found.insert(pid);
        }
    }
    Ok(found)
}

/// The one spare, once it waits.
pub fn spare(machine: &Machine) -> Result<i32> {
    wait::until_true("a spare", SOON, || Ok(!waiting(machine)?.is_empty()))?;
    let found = waiting(machine)?;
    ensure!(found.len() == 1, "not one spare, but {found:?}");
    Ok(found.into_iter().next().unwrap_or_default())
}
