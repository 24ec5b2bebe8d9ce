//! What the host asks the guest to be: the sandbox's identity and disks, the container, its processes.

use serde::{Deserialize, Serialize};

/// Everything that makes a VM, booted or cloned from a template, one sandbox and no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Fresh randomness from the host, mixed into and credited to the guest kernel's pool before anything else.
    pub entropy: [u8; 32],
    /// The time of day, in nanoseconds since the epoch.
    pub realtime_ns: u64,
    pub hostname: String,
    pub root: RootDisk,
    pub scratch: Scratch,
}

/// The image: an EROFS filesystem followed by its dm-verity tree, on the first block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootDisk {
    /// Size of the filesystem in blocks of 4,096 bytes; the tree begins right after it.
    pub data_blocks: u64,
    /// SHA-256 at the root of the tree. What does not match it cannot be read in the guest.
    pub root_hash: [u8; 32],
    pub salt: [u8; 32],
}

/// The writable disk, on the second block device: encrypted by the guest with a key that only it knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scratch {
    /// Size of the disk in bytes, a multiple of 4,096.
    pub bytes: u64,
    /// The blocks of an empty filesystem of that size that matter, by rising offsets. All others may hold anything.
    pub filesystem: Vec<Extent>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// In bytes.
    pub offset: u64,
    pub data: Vec<u8>,
    /// Zero bytes after the data.
    pub zeros: u64,
}

impl Extent {
    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset + self.data.len() as u64 + self.zeros
    }
}

/// The container inside the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub hostname: Option<String>,
    pub readonly_root: bool,
    pub mounts: Vec<Mount>,
    /// Small files that stand for bind mounts of host files such as `/etc/resolv.conf`.
    pub files: Vec<InjectedFile>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub sysctls: Vec<(String, String)>,
    /// Everything in the VM's own `/dev`, instead of the usual few devices.
    pub all_devices: bool,
    /// A small init as the container's first process, which reaps and passes signals on.
    pub init: bool,
    pub limits: Limits,
    pub process: Process,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub kind: String,
    pub source: String,
    pub target: String,
    /// As in fstab: flags by name, the rest handed to the filesystem.
    pub options: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InjectedFile {
    pub target: String,
    pub mode: u32,
    pub data: Vec<u8>,
    pub readonly: bool,
}

/// Limits that hold inside the VM, on the container's cgroup. None means no limit beyond the VM's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    pub memory_bytes: Option<u64>,
    pub pids: Option<u64>,
    /// Microseconds of CPU for each `cpu_period_us`.
    pub cpu_quota_us: Option<u64>,
    pub cpu_period_us: Option<u64>,
    /// cgroup v2 weight, 1 to 10,000.
    pub cpu_weight: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub args: Vec<String>,
    /// Exactly these, in this order: nothing is added.
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub umask: Option<u32>,
    pub capabilities: Capabilities,
    pub no_new_privileges: bool,
    pub rlimits: Vec<Rlimit>,
    pub oom_score_adj: Option<i32>,
    /// A terminal of this many columns and rows instead of pipes.
    pub terminal: Option<(u16, u16)>,
    /// Whether something will be written to its standard input; it is empty otherwise.
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// Capability sets as bit masks, bit n being capability number n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*` as the kernel numbers them.
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}
