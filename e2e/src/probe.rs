//! The probe: a static program that runs inside sandboxes and tries system calls.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use crate::process::text_of;
use crate::settings;

const BUILD_LIMIT: Duration = Duration::from_secs(900);
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What the program is called.
pub const NAME: &str = "bailey-probe";

/// Builds the probe, linked statically, in a target folder of its own so that its flags disturb no other build; where
/// programs are given that were built elsewhere, it is one of them.
pub fn build() -> Result<PathBuf> {
    if let Some(given) = settings::given_bin_dir() {
        return Ok(given.join(NAME));
    }
    let bin_dir = settings::cargo_bin_dir()?;
    let target = bin_dir.parent().ok_or_else(|| anyhow!("{} is in no folder", bin_dir.display()))?;
    let target = target.join("probe");
    let mut cargo = Command::new(settings::cargo());
    cargo.args(["build", "--quiet", "--locked", "--package", "bailey-e2e", "--bin", NAME]);
    cargo.args(["--target", TARGET, "--target-dir"]).arg(&target);
    cargo.current_dir(settings::repository()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    text_of(&mut cargo, BUILD_LIMIT).context("building the probe")?;
    Ok(target.join(TARGET).join("debug").join(NAME))
}
