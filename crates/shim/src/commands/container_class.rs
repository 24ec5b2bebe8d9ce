//! The container class: a hardened container by containerd's own runc shim, for those whom the operator lets.
//!
//! The bundle's specification is hardened in place, and this process becomes the runc shim: from there on,
//! containerd speaks with that.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use oci_spec::runtime::Spec;

use crate::args::Args;
use crate::bundle::harden;
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};

const RUNC_SHIM: &str = "containerd-shim-runc-v2";

/// Hardens the bundle and becomes the runc shim. Only returns with an error.
pub(super) fn become_runc(config: &Config, args: &Args, spec: Spec) -> Error {
    match prepare(config, args, spec) {
        Ok(()) => exec_runc_shim(),
        Err(error) => error,
    }
}

fn prepare(config: &Config, args: &Args, spec: Spec) -> Result<()> {
    if !config.container_class_namespaces.contains(&args.namespace) {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "the namespace {} may not use the class container; the operator lets it by \
                 container_class_namespaces in the shim's settings",
                args.namespace
            ),
        ));
    }
    let hardened = harden(spec)?;
    let text = serde_json::to_vec(&hardened).context(|| "writing the hardened specification".into())?;
    // Replaced whole: a reader sees the old one or the new one.
    fs::write("config.json.new", text).context(|| "writing the hardened specification".into())?;
    fs::rename("config.json.new", "config.json").context(|| "writing the hardened specification".into())
}

/// Becomes the runc shim, with the arguments that containerd gave us.
pub(super) fn exec_runc_shim() -> Error {
    let error = Command::new(RUNC_SHIM).args(std::env::args_os().skip(1)).exec();
    Error::new(Kind::Unavailable, format!("running {RUNC_SHIM}, of containerd's package")).because(error)
}
