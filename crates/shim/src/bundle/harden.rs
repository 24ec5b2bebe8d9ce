//! The container class: what a specification becomes before runc may run it on the host's own kernel.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilitiesBuilder, LinuxIdMapping, LinuxNamespaceType, Spec};

use super::seccomp;
use crate::error::{Context, Error, Result};

/// Capabilities that a container may have: the usual default without `NET_RAW`, which forges packets, and `MKNOD`,
/// which nothing in a user namespace can use.
const CAPABILITIES: [Capability; 12] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::NetBindService,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Paths of the kernel's that tell of the host, or let it be changed.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Hardens a specification, or refuses what no hardening makes safe.
pub(crate) fn harden(mut spec: Spec) -> Result<Spec> {
    refuse(&spec)?;
    if let Some(process) = spec.process_mut() {
        process.set_no_new_privileges(Some(true));
        let asked =
            process.capabilities().as_ref().and_then(|sets| sets.bounding().clone()).unwrap_or_default();
        let allowed: HashSet<Capability> =
            CAPABILITIES.into_iter().filter(|one| asked.contains(one)).collect();
        let sets = LinuxCapabilitiesBuilder::default()
            .bounding(allowed.clone())
            .effective(allowed.clone())
            .permitted(allowed)
            .inheritable(HashSet::new())
            .ambient(HashSet::new())
            .build();
        process.set_capabilities(Some(sets.context(|| "hardening the capabilities".into())?));
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_seccomp(Some(seccomp::profile()?));
        let add = |there: &Option<Vec<String>>, ours: &[&str]| {
            let mut paths = there.clone().unwrap_or_default();
            paths.extend(ours.iter().map(|path| (*path).to_owned()));
            paths.sort();
            paths.dedup();
            Some(paths)
        };
        let (masked, readonly) = (add(linux.masked_paths(), &MASKED), add(linux.readonly_paths(), &READONLY));
        linux.set_masked_paths(masked).set_readonly_paths(readonly);
    }
    Ok(spec)
}

fn refuse(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref().ok_or_else(|| super::missing("linux"))?;
    super::refuse_host_namespaces(linux)?;
    if super::allows_all_devices(linux) {
        return Err(Error::invalid("a privileged container cannot be of the class container"));
    }
    super::refuse_devices(linux, false)?;
    // Copied files are bound from the host here: the same few are allowed, and no other.
    super::mounts::convert(spec.mounts().as_deref().unwrap_or_default())?;
    let own_users = linux.namespaces().iter().flatten().any(|one| one.typ() == LinuxNamespaceType::User);
    let safe = |mappings: &Option<Vec<LinuxIdMapping>>| {
        let mappings = mappings.as_deref().unwrap_or_default();
        !mappings.is_empty() && mappings.iter().all(|mapping| mapping.host_id() != 0)
    };
    if !own_users || !safe(linux.uid_mappings()) || !safe(linux.gid_mappings()) {
        return Err(Error::invalid(
            "a container of the class container needs users of its own: give its specification a user namespace, \
             with uidMappings and gidMappings to ids of the host that nothing else uses",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::spec;

    fn with_users(change: impl FnOnce(&mut serde_json::Value)) -> Spec {
        spec(|json| {
            let namespaces = ["pid", "ipc", "uts", "mount", "network", "user"];
            json["linux"]["namespaces"] =
                namespaces.iter().map(|kind| serde_json::json!({"type": kind})).collect::<Vec<_>>().into();
            let mapping = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
            json["linux"]["uidMappings"] = mapping.clone();
            json["linux"]["gidMappings"] = mapping;
            let all = serde_json::json!(["CAP_SYS_ADMIN", "CAP_NET_RAW", "CAP_CHOWN"]);
            json["process"]["capabilities"] = serde_json::json!({"bounding": all, "effective": all, "permitted": all,
                "inheritable": all, "ambient": all});
            change(json);
        })
    }

    #[test]
    fn little_is_left_to_a_hardened_container() {
        let spec = harden(with_users(|_| {})).unwrap();
        let process = spec.process().as_ref().unwrap();
        let sets = process.capabilities().as_ref().unwrap();
        assert_eq!(sets.bounding().clone().unwrap(), HashSet::from([Capability::Chown]));
        assert!(sets.ambient().as_ref().unwrap().is_empty());
        assert_eq!(process.no_new_privileges(), Some(true));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some());
        assert!(linux.masked_paths().as_ref().unwrap().contains(&"/proc/kcore".to_owned()));
    }

    #[test]
    fn without_users_of_its_own_it_is_refused_with_the_remedy() {
        let error =
            harden(with_users(|json| json["linux"]["uidMappings"][0]["hostID"] = 0.into())).unwrap_err();
        assert!(error.to_string().contains("uidMappings"));
        assert!(harden(spec(|_| {})).is_err());
    }
}
