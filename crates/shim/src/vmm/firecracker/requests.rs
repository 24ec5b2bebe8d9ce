//! What is asked of Firecracker's API to boot, save and clone a VM.
//!
//! The files have the same names in every jail, a template's and its clones': the names are in the saved state, what
//! is behind them may differ.

use serde_json::{Value, json};

use super::api::Request;
use crate::bundle::IoLimits;
use crate::error::{Error, Result};
use crate::vmm::Shape;

/// Names in the jail's root, which is Firecracker's working directory.
pub(super) const KERNEL: &str = "vmlinux";
pub(super) const INITRAMFS: &str = "initramfs";
pub(super) const ROOT: &str = "root.img";
pub(super) const SCRATCH: &str = "scratch.img";
pub(super) const MEMORY: &str = "memory";
pub(super) const DEVICES: &str = "devices";
pub(super) const VSOCK: &str = "v.sock";
pub(super) const API: &str = "api.sock";

/// The guest's address on vsock. Every Firecracker has a vsock of its own, so all may have the same.
const GUEST_CID: u32 = 3;

/// Most processors that Firecracker gives a VM.
const VCPUS_MAX: u32 = 32;

/// Refills a bucket that holds what may flow in one second.
const SECOND_MS: u64 = 1000;

/// Everything that configures a VM and boots it.
pub(super) fn boot(shape: &Shape, io: IoLimits) -> Result<Vec<Request>> {
    let Shape { memory_bytes, vcpus, .. } = shape;
    if !(1..=VCPUS_MAX).contains(vcpus) {
        return Err(Error::invalid(format!(
            "Firecracker gives a VM 1 to {VCPUS_MAX} processors, not {vcpus}: ask for fewer, or set vmm = \"qemu\""
        )));
    }
    let (root, scratch) = limiters(io);
    let machine = json!({"vcpu_count": vcpus, "mem_size_mib": memory_bytes >> 20, "smt": false});
    let source = json!({"kernel_image_path": KERNEL, "initrd_path": INITRAMFS, "boot_args": cmdline(shape)});
    Ok(vec![
        Request::put("/machine-config", machine),
        Request::put("/boot-source", source),
        Request::put("/drives/root", drive("root", ROOT, true, root)),
        Request::put("/drives/scratch", drive("scratch", SCRATCH, false, scratch)),
        Request::put("/vsock", json!({"guest_cid": GUEST_CID, "uds_path": VSOCK})),
        Request::put("/actions", json!({"action_type": "InstanceStart"})),
    ])
}

/// Everything that makes a VM out of a saved one. A template has no limits of its clones' disks, so those come first
/// and then the VM goes on.
pub(super) fn load(io: IoLimits) -> Vec<Request> {
    let (root, scratch) = limiters(io);
    let limited: Vec<Request> = [("/drives/root", "root", root), ("/drives/scratch", "scratch", scratch)]
        .into_iter()
        .filter_map(|(path, id, limiter)| {
            Some(Request::patch(path, json!({"drive_id": id, "rate_limiter": limiter?})))
        })
        .collect();
    let resume = limited.is_empty();
    let load = json!({
        "snapshot_path": DEVICES,
        "mem_backend": {"backend_type": "File", "backend_path": MEMORY},
        "resume_vm": resume,
    });
    let mut requests = vec![Request::put("/snapshot/load", load)];
    if !resume {
        requests.extend(limited);
        requests.push(state("Resumed"));
    }
    requests
}

/// Stops the guest's processors, or lets them go on.
pub(super) fn state(state: &str) -> Request {
    Request::patch("/vm", json!({ "state": state }))
}

/// Saves a VM that is stopped.
pub(super) fn save() -> Request {
    let body = json!({"snapshot_type": "Full", "snapshot_path": DEVICES, "mem_file_path": MEMORY});
    Request::put("/snapshot/create", body)
}

/// The kernel's boot parameters; Firecracker adds those of its devices.
fn cmdline(shape: &Shape) -> String {
    let fixed =
        "console=ttyS0 quiet reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd";
    format!("{fixed} {}", shape.guest.manifest.cmdline).trim_end().to_owned()
}

/// Nothing on either disk outlives the VM: flushes are for nothing.
fn drive(id: &str, path: &str, read_only: bool, limiter: Option<Value>) -> Value {
    let mut drive = json!({
        "drive_id": id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": read_only,
        "cache_type": "Unsafe",
        "io_engine": "Sync",
    });
    if let Some(limiter) = limiter {
        drive["rate_limiter"] = limiter;
    }
    drive
}

/// The limiters of the image's and the scratch disk. Firecracker's have one bucket for both directions, and each
/// disk has its own; our limits are for each direction, over both disks. So that no limit is ever exceeded, reading
/// is shared out half and half, and the scratch disk has the lower one of reading and writing.
fn limiters(io: IoLimits) -> (Option<Value>, Option<Value>) {
    let half = |limit: Option<u64>| limit.map(|limit| (limit / 2).max(1));
    let lower = |read: Option<u64>, write: Option<u64>| [read, write].into_iter().flatten().min();
    let (bytes, operations) = (half(io.read_bytes_per_second), half(io.reads_per_second));
    let root = limiter(bytes, operations);
    let scratch = limiter(lower(bytes, io.write_bytes_per_second), lower(operations, io.writes_per_second));
    (root, scratch)
}

fn limiter(bytes: Option<u64>, operations: Option<u64>) -> Option<Value> {
    let mut limiter = serde_json::Map::new();
    for (name, limit) in [("bandwidth", bytes), ("ops", operations)] {
        if let Some(limit) = limit {
            limiter.insert(name.to_owned(), json!({"size": limit, "refill_time": SECOND_MS}));
        }
    }
    (!limiter.is_empty()).then_some(Value::Object(limiter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(limiter: Option<&Value>, bucket: &str) -> u64 {
        limiter.and_then(|limiter| limiter[bucket]["size"].as_u64()).unwrap_or(u64::MAX)
    }

    /// However both disks are used, neither direction gets more than its limit, and what is not limited is free.
    #[test]
    fn no_limit_is_ever_exceeded() {
        let limits = [None, Some(2), Some(3), Some(1 << 20), Some(u64::MAX - 1)];
        for (read, write) in limits.iter().flat_map(|read| limits.iter().map(move |write| (*read, *write))) {
            let bytes = IoLimits {
                read_bytes_per_second: read,
                write_bytes_per_second: write,
                ..IoLimits::default()
            };
            let counts = IoLimits { reads_per_second: read, writes_per_second: write, ..IoLimits::default() };
            for (io, bucket) in [(bytes, "bandwidth"), (counts, "ops")] {
                let (root, scratch) = limiters(io);
                let (root, scratch) = (size(root.as_ref(), bucket), size(scratch.as_ref(), bucket));
                assert!(root.saturating_add(scratch) <= read.unwrap_or(u64::MAX), "{io:?}");
                assert!(scratch <= write.unwrap_or(u64::MAX), "{io:?}");
                assert_eq!(root == u64::MAX, read.is_none(), "{io:?}");
                assert_eq!(scratch == u64::MAX, read.is_none() && write.is_none(), "{io:?}");
            }
        }
    }

    #[test]
    fn a_clone_without_limits_goes_on_at_once() {
        let requests = load(IoLimits::default());
        assert_eq!(requests.len(), 1);
        assert_eq!(requests[0].body.as_ref().unwrap()["resume_vm"], true);
    }
}
