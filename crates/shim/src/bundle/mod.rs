//! The OCI bundle that containerd hands over: read once, checked whole, turned into what the guest and the host are
//! asked to be. What a sandbox cannot give is refused by name. What needs no host to hold (seccomp, AppArmor and SELinux:
//! the VM is the wall) or has no meaning in a VM of its own (cpusets, huge pages) has no effect; docs/shim.md lists it.

mod annotations;
mod harden;
mod mounts;
mod process;
mod seccomp;

use std::path::{Path, PathBuf};

use bailey_host::cgroup::weight_from_shares;
use bailey_types::guest::spec::{Container, Limits};
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};

pub(crate) use self::annotations::{Annotations, Class, IoLimits};
pub(crate) use self::harden::harden;
pub(crate) use self::process::convert_process;
use crate::config::{Config, Start};
use crate::error::{Context, Error, Kind, Result};

/// The least memory that a container can be run with, in bytes: less would end before its program does anything.
pub(crate) const MEMORY_MIN: u64 = 6 << 20;

/// Everything that the bundle says about a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) container: Container,
    /// The root filesystem's folder, for callers that mount it there instead of handing mounts over.
    pub(crate) root: PathBuf,
    /// Memory for the workload, in bytes; none when the bundle sets no limit.
    pub(crate) memory_bytes: Option<u64>,
    /// Virtual processors.
    pub(crate) vcpus: u32,
    /// The cgroup of the VMM, below the root of the tree.
    pub(crate) cgroup: PathBuf,
    pub(crate) annotations: Annotations,
}

impl Plan {
    /// How the sandbox starts: as its annotation says, else as the settings do.
    pub(crate) fn start(&self, config: &Config) -> Start {
        self.annotations.start.unwrap_or(config.start)
    }
}

/// Reads `config.json`.
pub(crate) fn load_spec(bundle: &Path) -> Result<Spec> {
    let file = bundle.join("config.json");
    let text = std::fs::read(&file)
        .context_as(Kind::Invalid, || format!("reading the bundle's specification, {}", file.display()))?;
    serde_json::from_slice(&text)
        .context_as(Kind::Invalid, || format!("the bundle's specification, {}, is malformed", file.display()))
}

/// The class that a specification asks for.
pub(crate) fn class(spec: &Spec) -> Result<Class> {
    Ok(Annotations::read(spec)?.class)
}

/// Checks a specification and turns it into a plan.
pub(crate) fn plan(spec: &Spec, namespace: &str, id: &str, terminal: bool) -> Result<Plan> {
    let annotations = Annotations::read(spec)?;
    let linux = spec.linux().as_ref().ok_or_else(|| missing("linux"))?;
    let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
    refuse_shared_namespaces(linux)?;
    refuse_host_programs(spec)?;
    let all_devices = allows_all_devices(linux);
    refuse_devices(linux, all_devices)?;
    let (mounts, files) = mounts::convert(spec.mounts().as_deref().unwrap_or_default())?;
    let limits = limits(linux)?;
    let container = Container {
        hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
        readonly_root: spec.root().as_ref().is_some_and(|root| root.readonly().unwrap_or(false)),
        mounts,
        files,
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        sysctls: linux.sysctl().iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect(),
        all_devices,
        init: annotations.init,
        limits,
        process: convert_process(process, terminal)?,
    };
    Ok(Plan {
        memory_bytes: limits.memory_bytes,
        vcpus: vcpus(&limits),
        container,
        root: spec.root().as_ref().map_or_else(|| PathBuf::from("rootfs"), |root| root.path().clone()),
        cgroup: cgroup_path(linux, namespace, id),
        annotations,
    })
}

fn missing(part: &str) -> Error {
    Error::invalid(format!("the bundle's specification has no {part} part"))
}

/// Hooks would run on the host, and a container with mapped users expects files that are mapped likewise.
fn refuse_host_programs(spec: &Spec) -> Result<()> {
    if spec.hooks().as_ref().is_some_and(|hooks| *hooks != oci_spec::runtime::Hooks::default()) {
        return Err(Error::invalid(
            "the container has hooks, programs that would run on the host: a sandbox has none",
        ));
    }
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    if namespaces.iter().any(|one| one.typ() == LinuxNamespaceType::User) {
        return Err(Error::invalid(
            "the container asks for a user namespace, which a sandbox does without: its users are its VM's own \
             (mapped users are for the class container)",
        ));
    }
    Ok(())
}

/// Neither the host's namespaces nor another container's can be had.
fn refuse_shared_namespaces(linux: &Linux) -> Result<()> {
    refuse_host_namespaces(linux)?;
    for namespace in linux.namespaces().as_deref().unwrap_or_default() {
        if let Some(path) = namespace.path() {
            return Err(Error::invalid(format!(
                "the container asks for the namespace {}, which a sandbox cannot join: it has a kernel of its own",
                path.display()
            )));
        }
    }
    Ok(())
}

/// A namespace that is not listed is the host's.
fn refuse_host_namespaces(linux: &Linux) -> Result<()> {
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    let needed = [
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Mount, "mount"),
        (LinuxNamespaceType::Network, "network"),
    ];
    for (kind, name) in needed {
        if !listed.iter().any(|namespace| namespace.typ() == kind) {
            let text =
                format!("the container asks for the host's {name} namespace, which a sandbox never shares");
            return Err(Error::invalid(text));
        }
    }
    Ok(())
}

/// Whether the device rules are those of a privileged container: everything allowed.
fn allows_all_devices(linux: &Linux) -> bool {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone());
    rules.unwrap_or_default().iter().any(|rule| {
        rule.allow()
            && rule.major().is_none_or(|major| major < 0)
            && rule.access().as_deref() == Some("rwm")
            && rule.typ().is_none_or(|kind| kind == oci_spec::runtime::LinuxDeviceType::A)
    })
}

/// A privileged container gets the VM's own devices; single devices of the host cannot be had.
fn refuse_devices(linux: &Linux, all: bool) -> Result<()> {
    match linux.devices().as_deref().unwrap_or_default() {
        [first, ..] if !all => Err(Error::invalid(format!(
            "the container asks for the host's device {}: a sandbox has no devices of the host",
            first.path().display()
        ))),
        _ => Ok(()),
    }
}

/// The limits that hold inside the VM.
pub(crate) fn limits(linux: &Linux) -> Result<Limits> {
    let Some(resources) = linux.resources() else { return Ok(Limits::default()) };
    convert_limits(resources)
}

/// As [`limits`], of the resources alone: also what an update brings.
pub(crate) fn convert_limits(resources: &oci_spec::runtime::LinuxResources) -> Result<Limits> {
    let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
    let memory_bytes = memory.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
    if let Some(bytes) = memory_bytes.filter(|bytes| *bytes < MEMORY_MIN) {
        return Err(Error::invalid(format!(
            "the memory limit of {bytes} bytes is too small for any program; the least is {MEMORY_MIN}"
        )));
    }
    let cpu = resources.cpu().as_ref();
    let quota = cpu.and_then(|cpu| cpu.quota()).and_then(|quota| u64::try_from(quota).ok());
    let pids = resources.pids().as_ref().map(oci_spec::runtime::LinuxPids::limit);
    Ok(Limits {
        memory_bytes,
        pids: pids.and_then(|pids| u64::try_from(pids).ok()).filter(|pids| *pids > 0),
        cpu_quota_us: quota.filter(|quota| *quota > 0),
        cpu_period_us: cpu.and_then(|cpu| cpu.period()).filter(|period| *period > 0),
        cpu_weight: cpu.and_then(|cpu| cpu.shares()).filter(|shares| *shares > 0).map(weight_from_shares),
    })
}

/// As many processors as the quota can fill; one without a quota.
fn vcpus(limits: &Limits) -> u32 {
    let period = limits.cpu_period_us.unwrap_or(100_000);
    let there =
        std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    let wanted = limits.cpu_quota_us.map_or(1, |quota| quota.div_ceil(period));
    u32::try_from(wanted).unwrap_or(u32::MAX).clamp(1, there)
}

/// The bundle's cgroup path: a path, or systemd's `slice:prefix:name`.
fn cgroup_path(linux: &Linux, namespace: &str, id: &str) -> PathBuf {
    let Some(path) = linux.cgroups_path() else { return Path::new("/bailey").join(namespace).join(id) };
    let text = path.to_string_lossy();
    match text.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] => Path::new("/").join(slice).join(format!("{prefix}-{name}.scope")),
        _ => path.clone(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn spec(change: impl FnOnce(&mut serde_json::Value)) -> Spec {
        let namespaces =
            ["pid", "ipc", "uts", "mount", "network"].map(|kind| serde_json::json!({"type": kind}));
        let mut json = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["sh"], "env": ["A=b"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": namespaces, "cgroupsPath": "/default/x"},
        });
        change(&mut json);
        serde_json::from_value(json).unwrap()
    }

    fn refusal(change: impl FnOnce(&mut serde_json::Value)) -> String {
        plan(&spec(change), "default", "x", false).unwrap_err().chain()
    }

    #[test]
    fn a_plain_bundle_is_a_plan() {
        let plan = plan(&spec(|_| {}), "default", "x", false).unwrap();
        assert_eq!(plan.container.process.env, ["A=b"]);
        assert_eq!((plan.vcpus, plan.memory_bytes), (1, None));
        assert_eq!(plan.cgroup, Path::new("/default/x"));
    }

    #[test]
    fn what_belongs_to_the_host_is_refused_by_name() {
        let no_network = refusal(|spec| spec["linux"]["namespaces"] = serde_json::json!([{"type": "pid"}]));
        assert!(no_network.contains("namespace"), "{no_network}");
        let joined = refusal(|spec| spec["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid".into());
        assert!(joined.contains("/proc/1/ns/pid"), "{joined}");
        let device = serde_json::json!([{"type": "b", "path": "/dev/sda", "major": 8, "minor": 0}]);
        let device = refusal(|spec| spec["linux"]["devices"] = device);
        assert!(device.contains("/dev/sda"), "{device}");
        let bind = serde_json::json!([{"destination": "/x", "type": "bind", "source": "/etc", "options": ["rbind"]}]);
        let bind = refusal(|spec| spec["mounts"] = bind);
        assert!(bind.contains("/etc"), "{bind}");
    }

    #[test]
    fn hooks_and_mapped_users_are_refused() {
        let hooks = refusal(|spec| spec["hooks"] = serde_json::json!({"prestart": [{"path": "/bin/true"}]}));
        assert!(hooks.contains("hooks"), "{hooks}");
        let user = refusal(|spec| {
            let all = ["pid", "ipc", "uts", "mount", "network", "user"];
            let all = all.map(|kind| serde_json::json!({"type": kind}));
            spec["linux"]["namespaces"] = all.to_vec().into();
        });
        assert!(user.contains("user namespace"), "{user}");
    }

    #[test]
    fn a_memory_limit_too_small_says_the_least() {
        let text =
            refusal(|spec| spec["linux"]["resources"] = serde_json::json!({"memory": {"limit": 1_000_000}}));
        assert!(text.contains("1000000") && text.contains("6291456"), "{text}");
    }

    #[test]
    fn a_quota_of_a_processor_and_a_half_gets_two() {
        let limits =
            Limits { cpu_quota_us: Some(150_000), cpu_period_us: Some(100_000), ..Limits::default() };
        let there = std::thread::available_parallelism().unwrap().get();
        assert_eq!(vcpus(&limits) as usize, 2.min(there));
    }

    #[test]
    fn systemds_cgroup_name_is_a_path() {
        let spec = spec(|spec| spec["linux"]["cgroupsPath"] = "system.slice:bailey:abc".into());
        let path = cgroup_path(spec.linux().as_ref().unwrap(), "n", "i");
        assert_eq!(path, Path::new("/system.slice/bailey-abc.scope"));
    }
}
