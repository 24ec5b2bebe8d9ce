//! Whether KVM truly runs a guest here. `/dev/kvm` alone says nothing: on some hosts it opens and no kernel runs.

use std::fs;
use std::path::Path;

/// What is known without trying. Only a host whose processor has hardware virtualisation can have a true KVM.
pub(crate) fn possible() -> bool {
    let Ok(text) = fs::read_to_string("/proc/cpuinfo") else { return false };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    let virtualisation =
        flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx"));
    virtualisation && Path::new("/dev/kvm").exists()
}

/// What a trial found, kept until the machine boots anew.
pub(crate) fn remembered(state: &Path) -> Option<bool> {
    let text = fs::read_to_string(state.join("kvm")).ok()?;
    let (boot, works) = text.trim().split_once(' ')?;
    (boot == boot_id()?).then_some(works == "works")
}

/// Keeps what a trial found. Failing to only means another trial.
pub(crate) fn remember(state: &Path, works: bool) {
    if let Some(boot) = boot_id() {
        let word = if works { "works" } else { "fails" };
        if let Err(error) = fs::write(state.join("kvm"), format!("{boot} {word}\n")) {
            tracing::warn!("keeping whether KVM works: {error}");
        }
    }
}

fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}
