//! What is behind the VM's two disks, as block nodes of QEMU.
//!
//! A disk's own node stays for the VM's life: `root`, `scratch`, of the format raw. Below it hangs what it shows: an
//! empty stand-in, or a file, with a throttle between if there are limits. What hangs there can be changed while
//! the VM is up, so that a VM can be there before it is known what it will run. The raw node bounds each request by
//! the disk's size: a guest that was promised more cannot make a file grow.

use std::os::fd::RawFd;

use serde_json::{Value, json};

use crate::bundle::IoLimits;
use crate::vmm::DISK_MAX;

/// One of the two disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) name: &'static str,
    pub(super) readonly: bool,
}

pub(super) const ROOT: Disk = Disk { name: "root", readonly: true };
pub(super) const SCRATCH: Disk = Disk { name: "scratch", readonly: false };

/// A file to hang below a disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backing {
    /// The set of descriptors, as QEMU numbers them, that has the file.
    pub(super) fdset: i64,
    pub(super) throttled: bool,
    /// Counts what has hung below the disk, since two of them are there at a time when one takes over.
    pub(super) number: u32,
}

impl Disk {
    /// The node of the disk itself, over the node `below`, with its size in bytes as a bound.
    pub(super) fn top(self, below: &str, bound: Option<u64>) -> Value {
        let Disk { name, readonly } = self;
        let mut node = json!({"driver": "raw", "node-name": name, "file": below, "read-only": readonly});
        if let Some(bytes) = bound {
            node["size"] = json!(bytes);
        }
        node
    }

    /// The stand-in of a disk that has nothing yet.
    pub(super) fn stand_in(self) -> Value {
        let Disk { name, readonly } = self;
        json!({"driver": "null-co", "node-name": format!("{name}-0"), "size": DISK_MAX, "read-only": readonly})
    }

    /// The nodes below the disk, the lowest first, each with its name.
    pub(super) fn below(self, backing: Backing) -> Vec<(String, Value)> {
        let Disk { name, readonly } = self;
        let Backing { fdset, throttled, number } = backing;
        let (file, throttle) = (format!("{name}-{number}"), format!("{name}-{number}-limited"));
        let mut node = json!({
            "driver": "file", "node-name": file, "filename": format!("/dev/fdset/{fdset}"), "locking": "off",
            "read-only": readonly,
        });
        if !readonly {
            // Nothing of a scratch disk outlives its VM.
            node["cache"] = json!({"no-flush": true});
        }
        let mut nodes = vec![(file.clone(), node)];
        if throttled {
            let node = json!({
                "driver": "throttle", "node-name": throttle, "throttle-group": LIMITS, "file": file,
                "read-only": readonly,
            });
            nodes.push((throttle, node));
        }
        nodes
    }
}

/// The throttle group of both disks.
pub(super) const LIMITS: &str = "limits";

/// The limits of a throttle group; none when nothing is limited.
pub(super) fn limits(io: &IoLimits) -> Option<Value> {
    let parts = [
        ("bps-read", io.read_bytes_per_second),
        ("bps-write", io.write_bytes_per_second),
        ("iops-read", io.reads_per_second),
        ("iops-write", io.writes_per_second),
    ];
    let set: serde_json::Map<String, Value> =
        parts.iter().filter_map(|(name, value)| Some(((*name).to_owned(), json!((*value)?)))).collect();
    (!set.is_empty()).then_some(Value::Object(set))
}

/// A throttle group, as an object of QEMU.
pub(super) fn limits_object(limits: &Value) -> Value {
    json!({"qom-type": "throttle-group", "id": LIMITS, "limits": limits})
}

/// The set of descriptors of one that QEMU was started with: named after it.
pub(super) fn inherited_set(fd: RawFd) -> i64 {
    i64::from(fd)
}
