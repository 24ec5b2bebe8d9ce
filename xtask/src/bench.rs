//! `cargo xtask bench`: runs one of the benchmarks.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::tool;

/// Runs a benchmark with these arguments.
pub(crate) fn run(name: &str, args: &[OsString]) -> Result<()> {
    let folder = tool::repository().join("bench");
    let programs = names(&folder.join("src/bin"))?;
    let scripts = names(&folder)?;
    let mut command = if programs.contains(&format!("{name}.rs")) {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(tool::repository());
        cargo.args([
            "run",
            "--quiet",
            "--release",
            "--locked",
            "--package",
            "bailey-bench",
            "--bin",
            name,
            "--",
        ]);
        cargo
    } else if scripts.contains(name) && !name.contains('.') {
        Command::new(folder.join(name))
    } else {
        let programs = programs.iter().filter_map(|file| file.strip_suffix(".rs"));
        let scripts = scripts.iter().map(String::as_str).filter(|file| !file.contains('.'));
        let known: Vec<&str> = programs.chain(scripts).collect();
        bail!("there is no benchmark {name}; there are: {}", known.join(", "));
    };
    tool::run(command.args(args))
}

/// The files in a folder.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let files = entries.flatten().filter(|entry| entry.path().is_file());
    Ok(files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}
