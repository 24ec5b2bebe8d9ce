//! The probe: a static program that runs inside sandboxes and tries system calls.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use crate::process::text_of;
use crate::settings;

const BUILD_LIMIT: Duration = Duration::from_secs(900);
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the probe, linked statically, in a target folder of its own so that its flags disturb no other build.
pub fn build() -> Result<PathBuf> {
    let bin_dir = settings::cargo_bin_dir()?;
    let target = bin_dir.parent().ok_or_else(|| anyhow!("{} is in no folder", bin_dir.display()))?;
    let target = target.join("probe");
    let mut cargo = Command::new(settings::cargo());
    cargo.args(["build", "--quiet", "--locked", "--package", "bailey-e2e", "--bin", "bailey-probe"]);
    cargo.args(["--target", TARGET, "--target-dir"]).arg(&target);
    cargo.current_dir(settings::repository()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    text_of(&mut cargo, BUILD_LIMIT).context("building the probe")?;
    Ok(target.join(TARGET).join("debug/bailey-probe"))
}
