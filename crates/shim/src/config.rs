//! The operator's settings: one TOML file, read once, checked whole.
//!
//! The file is the one that the runtime option of the container names, else that of `BAILEY_SHIM_CONFIG`, else
//! `/etc/bailey/shim.toml`; without a file, the defaults. The environment is read here alone.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};
use crate::size::parse_size;

/// The environment's name for the settings' file.
pub(crate) const FILE_VARIABLE: &str = "BAILEY_SHIM_CONFIG";

const DEFAULT_PATH: &str = "/etc/bailey/shim.toml";

/// Which VMM runs the sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum VmmChoice {
    #[default]
    Qemu,
    Firecracker,
}

/// How QEMU runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AccelChoice {
    /// KVM when it truly works, else emulation.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// How sandboxes start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Start {
    /// Cloned from a template of the same tenant.
    #[default]
    Warm,
    /// Booted.
    Cold,
}

/// What stands in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    guest_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    vmm: VmmChoice,
    accel: AccelChoice,
    start: Start,
    qemu: Option<PathBuf>,
    mkfs_erofs: Option<PathBuf>,
    image_max: Option<String>,
    cache_limit: Option<String>,
    image_timeout_seconds: Option<u64>,
    firecracker: Option<PathBuf>,
    jailer: Option<PathBuf>,
    memory: Option<String>,
    scratch: Option<String>,
    scratch_overcommit: Option<u32>,
    boot_timeout_seconds: Option<u64>,
    template_max_age_seconds: Option<u64>,
    template_max_clones: Option<u64>,
    template_max_idle_seconds: Option<u64>,
    first_uid: Option<u32>,
    uids: Option<u32>,
    container_class_namespaces: Vec<String>,
}

/// The settings, checked.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// The file that was named for them, for programs that are to have the same.
    pub(crate) file: Option<PathBuf>,
    /// Kernels and initramfs: one folder for each flavour.
    pub(crate) guest_dir: PathBuf,
    /// What lives as long as the machine is up.
    pub(crate) state_dir: PathBuf,
    /// What may be made again at any time: images, jail roots, empty filesystems.
    pub(crate) cache_dir: PathBuf,
    pub(crate) vmm: VmmChoice,
    pub(crate) accel: AccelChoice,
    pub(crate) start: Start,
    pub(crate) qemu: PathBuf,
    pub(crate) mkfs_erofs: PathBuf,
    /// The largest image that is made, in bytes, and the longest time that it may take.
    pub(crate) image_bytes_max: u64,
    pub(crate) image_timeout: Duration,
    /// The most that all kept images that nobody uses may have together, in bytes.
    pub(crate) cache_bytes_max: u64,
    pub(crate) firecracker: Option<PathBuf>,
    pub(crate) jailer: Option<PathBuf>,
    /// Memory of a sandbox whose container has no limit, in bytes.
    pub(crate) memory_bytes: u64,
    /// Scratch disk of a sandbox that names no size, in bytes.
    pub(crate) scratch_bytes: u64,
    /// How many times more the scratch disks of the host may promise than is reserved for them.
    pub(crate) scratch_overcommit: u32,
    /// Longest time that a guest may take to boot.
    pub(crate) boot_timeout: Duration,
    pub(crate) template_max_age: Duration,
    pub(crate) template_max_clones: u64,
    pub(crate) template_max_idle: Duration,
    /// Users that VMMs run as; nothing else on the host may use them.
    pub(crate) uids: Range<u32>,
    /// The namespaces (tenants) that may use the container class.
    pub(crate) container_class_namespaces: Vec<String>,
}

impl Config {
    /// Reads the settings from `path` if it is given, else from where they usually are.
    pub(crate) fn load(path: Option<&Path>) -> Result<Config> {
        let from_environment = environment(FILE_VARIABLE).map(PathBuf::from);
        let named = path.map(Path::to_owned).or(from_environment);
        let file = named.clone().unwrap_or_else(|| DEFAULT_PATH.into());
        let doing = || format!("reading the settings in {}", file.display());
        let raw = match fs::read_to_string(&file) {
            Ok(text) => toml::from_str(&text).context_as(Kind::Invalid, doing)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => Raw::default(),
            Err(error) => return Err(error).context_as(Kind::Invalid, doing),
        };
        let config = raw.validate().map_err(|error| Error::invalid(doing()).because(error))?;
        Ok(Config { file: named, ..config })
    }
}

impl Config {
    /// The program that runs the VMs.
    pub(crate) fn vmm_program(&self) -> &Path {
        match (self.vmm, &self.firecracker) {
            (VmmChoice::Firecracker, Some(program)) => program,
            _ => &self.qemu,
        }
    }
}

impl Raw {
    fn validate(self) -> Result<Config> {
        let or = |path: Option<PathBuf>, default: &str| path.unwrap_or_else(|| default.into());
        let config = Config {
            file: None,
            guest_dir: or(self.guest_dir, "/usr/lib/bailey/guest"),
            state_dir: or(self.state_dir, "/run/bailey"),
            cache_dir: or(self.cache_dir, "/var/lib/bailey/shim"),
            vmm: self.vmm,
            accel: self.accel,
            start: self.start,
            qemu: or(self.qemu, "/usr/bin/qemu-system-x86_64"),
            mkfs_erofs: or(self.mkfs_erofs, "/usr/bin/mkfs.erofs"),
            image_bytes_max: size("image_max", self.image_max.as_deref(), 16 << 30)?,
            cache_bytes_max: size("cache_limit", self.cache_limit.as_deref(), 32 << 30)?,
            image_timeout: Duration::from_secs(self.image_timeout_seconds.unwrap_or(600)),
            firecracker: self.firecracker.or_else(|| environment("BAILEY_FIRECRACKER").map(PathBuf::from)),
            jailer: self.jailer.or_else(|| environment("BAILEY_JAILER").map(PathBuf::from)),
            memory_bytes: size("memory", self.memory.as_deref(), 512 << 20)?,
            scratch_bytes: size("scratch", self.scratch.as_deref(), 1 << 30)?,
            scratch_overcommit: self.scratch_overcommit.unwrap_or(1),
            boot_timeout: Duration::from_secs(self.boot_timeout_seconds.unwrap_or(60)),
            template_max_age: Duration::from_secs(self.template_max_age_seconds.unwrap_or(3600)),
            template_max_clones: self.template_max_clones.unwrap_or(1000),
            template_max_idle: Duration::from_secs(self.template_max_idle_seconds.unwrap_or(900)),
            uids: uids(self.first_uid.unwrap_or(2_000_000_000), self.uids.unwrap_or(10_000))?,
            container_class_namespaces: self.container_class_namespaces,
        };
        for (key, path) in [
            ("guest_dir", &config.guest_dir),
            ("state_dir", &config.state_dir),
            ("cache_dir", &config.cache_dir),
        ] {
            if !path.is_absolute() {
                return Err(Error::invalid(format!(
                    "{key} must be an absolute path, not {}",
                    path.display()
                )));
            }
        }
        if config.scratch_overcommit == 0 {
            return Err(Error::invalid(
                "scratch_overcommit must be at least 1, which promises no more than there is",
            ));
        }
        if config.vmm == VmmChoice::Firecracker && (config.firecracker.is_none() || config.jailer.is_none()) {
            let text = "vmm = \"firecracker\" needs the paths of both programs, as firecracker and jailer";
            return Err(Error::invalid(text));
        }
        Ok(config)
    }
}

fn size(key: &str, text: Option<&str>, default: u64) -> Result<u64> {
    text.map_or(Ok(default), |text| parse_size(text).map_err(|error| Error::invalid(key).because(error)))
}

fn uids(first: u32, count: u32) -> Result<Range<u32>> {
    match first.checked_add(count) {
        Some(end) if count > 0 && first >= 1000 => Ok(first..end),
        _ => Err(Error::invalid(format!("first_uid {first} and uids {count} are no range of unused users"))),
    }
}

#[expect(clippy::disallowed_methods, reason = "configuration is read here and nowhere else")]
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// What containerd tells a shim through its environment.
#[derive(Debug, Clone)]
pub(crate) struct FromContainerd {
    /// Where events go.
    pub(crate) ttrpc_address: Option<String>,
    /// The newest task API that containerd speaks; containerd 1.6 does not say.
    pub(crate) newest_api: Option<u32>,
}

impl FromContainerd {
    pub(crate) fn read() -> FromContainerd {
        FromContainerd {
            ttrpc_address: environment("TTRPC_ADDRESS"),
            newest_api: environment("MAX_SHIM_VERSION").and_then(|version| version.parse().ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        toml::from_str::<Raw>(text).context(|| "reading".into())?.validate()
    }

    #[test]
    fn nothing_is_the_defaults() {
        let config = read("").unwrap();
        assert_eq!(config.start, Start::Warm);
        assert_eq!(config.memory_bytes, 512 << 20);
        assert!(config.container_class_namespaces.is_empty());
    }

    #[test]
    fn a_wrong_key_or_value_is_named() {
        assert!(read("memroy = \"1GiB\"").unwrap_err().chain().contains("memroy"));
        assert!(read("memory = \"much\"").unwrap_err().chain().contains("much"));
        assert!(read("state_dir = \"run\"").unwrap_err().chain().contains("state_dir"));
        assert!(read("scratch_overcommit = 0").unwrap_err().chain().contains("scratch_overcommit"));
        assert!(read("first_uid = 0").unwrap_err().chain().contains("first_uid"));
        assert!(read("vmm = \"firecracker\"").unwrap_err().chain().contains("jailer"));
    }
}
