//! A containerd to measure with: the tests' own, with settings that only benchmarks want.

use std::fs;
use std::io::Write as _;

use anyhow::{Context as _, Result};
use bailey_e2e::images::Image;
use bailey_e2e::machine::Machine;
use nix::sys::signal::Signal;

/// Lets our shim say in containerd's log how long the steps of a start took.
pub fn log_steps(machine: &mut Machine) -> Result<()> {
    let path = machine.containerd.folder().join("config.toml");
    let text = fs::read_to_string(&path).context("reading containerd's settings")?;
    fs::write(&path, text.replace(r#"level = "info""#, r#"level = "debug""#))
        .context("writing containerd's settings")?;
    machine.containerd.restart(Signal::SIGTERM)
}

/// Lets the benchmark's namespace use the container class.
pub fn allow_container_class(machine: &Machine) -> Result<()> {
    let mut settings = fs::File::options()
        .append(true)
        .open(machine.containerd.shim_config())
        .context("opening the shim's settings")?;
    writeln!(settings, "container_class_namespaces = [{:?}]", machine.containerd.namespace())
        .context("writing the shim's settings")
}

/// The words of `ctr run` up to the container's own arguments.
pub fn run_words(runtime: &[&str], flags: &[&str], image: &Image, id: &str) -> Vec<String> {
    let words = ["run", "--snapshotter", "overlayfs", "--runtime"].iter().chain(runtime).chain(flags);
    words.copied().chain([image.reference.as_str(), id]).map(str::to_owned).collect()
}

/// The whole of containerd's log.
pub fn log(machine: &Machine) -> Result<String> {
    let log = fs::read(machine.containerd.log_path()).context("reading containerd's log")?;
    Ok(String::from_utf8_lossy(&log).into_owned())
}
