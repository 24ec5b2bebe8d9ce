//! A containerd to measure with: the tests' own, with settings that only benchmarks want.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bailey_e2e::images::{Image, Recipe};
use bailey_e2e::machine::Machine;
use bailey_e2e::wait;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::figures::parse_duration;

/// Log lines come a moment after what they tell.
const LOG_LIMIT: Duration = Duration::from_secs(10);

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

/// A root folder that any user may read, for containers that are made from a specification.
pub fn root_folder(machine: &Machine, recipe: &Recipe) -> Result<PathBuf> {
    let folder = machine.containerd.folder();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o711)).context("opening the machine's folder")?;
    let root = folder.join("plain-root");
    fs::create_dir_all(&root).context("making a root folder")?;
    recipe.unpack_lowest(&root)?;
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).context("opening a root folder")?;
    Ok(root)
}

/// Writes a specification with users of its own, and gives its path. Older versions of `ctr` cannot ask another
/// runtime than runc's own for such users.
pub fn specification(
    machine: &Machine,
    root: &Path,
    id: &str,
    annotation: Option<(&str, &str)>,
) -> Result<PathBuf> {
    let text = machine.ctr(&["oci", "spec"])?.success()?.text();
    let mut spec: Value = serde_json::from_str(&text).context("reading the specification")?;
    let users = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["root"]["path"] = json!(root);
    spec["process"]["args"] = json!(["/bin/true"]);
    spec["process"]["cwd"] = json!("/");
    spec["process"]["terminal"] = json!(false);
    spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", machine.containerd.namespace()));
    spec["linux"]["uidMappings"] = users.clone();
    spec["linux"]["gidMappings"] = users;
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    if let Some((name, value)) = annotation {
        spec["annotations"] = json!({name: value});
    }
    let path = machine.containerd.folder().join(format!("{id}.json"));
    fs::write(&path, spec.to_string()).context("writing the specification")?;
    Ok(path)
}

/// The words of `ctr run` up to the container's own arguments.
pub fn run_words(runtime: &[&str], flags: &[&str], image: &Image, id: &str) -> Vec<String> {
    let words = ["run", "--snapshotter", "overlayfs", "--runtime"].iter().chain(runtime).chain(flags);
    words.copied().chain([image.reference.as_str(), id]).map(str::to_owned).collect()
}

/// Runs something, and gives how long after its beginning each of these steps was, as our shim logged it. A step is
/// named by the words before its time.
pub fn logged<const COUNT: usize>(
    machine: &Machine,
    steps: [&str; COUNT],
    run: impl FnOnce() -> Result<()>,
) -> Result<[Duration; COUNT]> {
    let before = log(machine)?.len();
    run()?;
    wait::until("the shim's log", LOG_LIMIT, || {
        let log = log(machine)?;
        let new = log.get(before..).unwrap_or_default();
        let found: Option<Vec<Duration>> = steps.iter().map(|step| time_after(new, step)).collect();
        Ok(found.and_then(|found| found.try_into().ok()))
    })
}

/// The time that follows these words.
fn time_after(log: &str, words: &str) -> Option<Duration> {
    let rest = log.split_once(words)?.1;
    parse_duration(rest.split([',', '"', '\\', ' ', '\n']).next()?)
}

fn log(machine: &Machine) -> Result<String> {
    let log = fs::read(machine.containerd.log_path()).context("reading containerd's log")?;
    Ok(String::from_utf8_lossy(&log).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_found_by_its_words() {
        let log = "level=debug msg=\"prepared after 1.5ms, cold: true\"\nmsg=\"a VM runs after 2s\"\n";
        assert_eq!(time_after(log, "prepared after "), Some(Duration::from_micros(1500)));
        assert_eq!(time_after(log, "a VM runs after "), Some(Duration::from_secs(2)));
        assert_eq!(time_after(log, "set up after "), None);
    }
}
