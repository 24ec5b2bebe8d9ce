//! What a caller asks for, and what it got.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::JailError;

/// A jail and the program in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailSpec {
    /// The user that the program runs as: one that nothing else on the host runs as. See [`super::uid::lease`].
    pub uid: u32,
    /// The group that the program runs as, its only one.
    pub gid: u32,
    /// The directory that becomes the read-only root, made by [`super::base::prepare`].
    pub base: PathBuf,
    /// Further files and directories of the host. Their targets lie below `/run`.
    pub files: Vec<FileMount>,
    /// Descriptors, by their number in the jail, that the program opens anew through `/proc/self/fd`.
    pub reopen: Vec<Reopen>,
    /// Gives the program `/dev/kvm`, beside `/dev/null`, `zero`, `random` and `urandom`.
    pub kvm: bool,
    /// Gives the program a `/tmp` of at most this many bytes. It counts as the process's memory. (The profiles for
    /// QEMU do not allow making files, so it is of use to other programs only.)
    pub tmp_bytes: Option<u64>,
    /// Lets the program read the files that it sees whoever they belong to: it keeps `CAP_DAC_READ_SEARCH`, and no
    /// other capability. Its root, Landlock and the filter decide what it sees.
    pub read_all: bool,
    /// The program's absolute path inside the jail.
    pub program: PathBuf,
    /// Its arguments, the first being its name.
    pub argv: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Its limits.
    pub rlimits: Rlimits,
    /// The system calls that it may make.
    pub seccomp: Profile,
    /// The AppArmor profile that it is put under where the host has AppArmor.
    pub apparmor: Option<String>,
    /// The layers that are on. Never read from outside: always all of them unless code says otherwise.
    #[serde(skip)]
    pub layers: Layers,
    /// The program that goes through the steps: one whose `main` calls [`super::enter_if_asked`]. It is this
    /// program itself, unless code says otherwise.
    #[serde(skip, default = "own_program")]
    pub entry: PathBuf,
}

fn own_program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

impl JailSpec {
    /// A jail with nothing but the program: no files, no devices beyond the harmless ones, no environment.
    #[must_use]
    pub fn new(user: u32, base: PathBuf, program: PathBuf, seccomp: Profile) -> Self {
        let argv = vec![program.to_string_lossy().into_owned()];
        Self {
            uid: user,
            gid: user,
            base,
            files: Vec::new(),
            reopen: Vec::new(),
            kvm: false,
            tmp_bytes: None,
            read_all: false,
            program,
            argv,
            env: Vec::new(),
            rlimits: Rlimits::default(),
            seccomp,
            apparmor: None,
            layers: Layers::all(),
            entry: own_program(),
        }
    }

    /// Refuses what can never be right.
    pub(super) fn validate(&self) -> Result<(), JailError> {
        let refuse = |why: String| Err(JailError::Spec(why));
        if self.layers.uid && (self.uid == 0 || self.gid == 0) {
            return refuse("the user and the group of a jail must not be root's".to_owned());
        }
        if self.argv.is_empty() {
            return refuse("the program needs at least its name as an argument".to_owned());
        }
        for (what, path) in [("program", &self.program), ("base", &self.base)] {
            if !path.is_absolute() {
                return refuse(format!("the {what} must be an absolute path: {}", path.display()));
            }
        }
        for file in &self.files {
            if !is_plain_below(&file.target, Path::new("/run")) {
                return refuse(format!("a file's target must lie below /run: {}", file.target.display()));
            }
        }
        if !self.files.is_empty() && !self.layers.root {
            return refuse("files cannot be mounted while the root layer is off".to_owned());
        }
        Ok(())
    }
}

/// Whether `path` is `parent` and at least one ordinary name.
fn is_plain_below(path: &Path, parent: &Path) -> bool {
    use std::path::Component;
    path.strip_prefix(parent).is_ok_and(|rest| {
        rest.components().count() > 0 && rest.components().all(|c| matches!(c, Component::Normal(_)))
    })
}

/// One file or directory of the host, seen in the jail. Never executable, no devices, no set-user-id.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileMount {
    /// Where it is on the host. Every directory above it must belong to root and be writable to root alone.
    pub source: PathBuf,
    /// Where it is in the jail: below `/run`.
    pub target: PathBuf,
    /// Whether the program may write to it. Who it belongs to decides as well.
    pub writable: bool,
}

/// A descriptor that the program opens a second time through `/proc/self/fd`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reopen {
    /// Its number in the jail.
    pub fd: RawFd,
    /// Whether it may be opened for writing too.
    pub writable: bool,
}

/// Limits of the process. Those that are higher than the host's own stay at the host's.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimits {
    /// Open descriptors.
    pub nofile: u64,
    /// Threads and processes of the jail's user.
    pub nproc: u64,
    /// Bytes that may be locked in memory.
    pub memlock: u64,
    /// Bytes that a file may be made to have; `None` leaves it to the disks' own sizes.
    pub fsize: Option<u64>,
    /// Bytes of memory that the process may map; `None` leaves it to its cgroup.
    pub address_space: Option<u64>,
}

impl Default for Rlimits {
    /// Enough for a small VM: a VMM's pool of I/O threads is at most 64.
    fn default() -> Self {
        Self { nofile: 256, nproc: 128, memlock: 0, fsize: None, address_space: None }
    }
}

/// Which table of system calls applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// QEMU that emulates the processor.
    QemuTcg,
    /// QEMU on KVM.
    QemuKvm,
    /// `mkfs.erofs`, which makes an image of a tenant's files.
    MkfsErofs,
}

/// The layers of a jail. Production uses [`Layers::all`] alone; switching one off is for the tests that show that
/// the others hold without it. It cannot be read from any file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// Process, IPC, host name, network and cgroup namespaces of its own.
    pub namespaces: bool,
    /// A mount namespace with a read-only root that holds only what the program needs.
    pub root: bool,
    /// A user of its own.
    pub uid: bool,
    /// No capabilities, and none to be had.
    pub caps: bool,
    /// No privilege through executing a file. (Landlock and seccomp imply it, so it is off only without them.)
    pub no_new_privs: bool,
    /// The filter of system calls.
    pub seccomp: SeccompLayer,
    /// Landlock's rules on files, TCP, signals and abstract sockets.
    pub landlock: bool,
    /// Resource limits.
    pub rlimits: bool,
}

/// What happens to a system call that the profile does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompLayer {
    /// The process is killed.
    Kill,
    /// It is allowed and noted in the kernel's log: for finding out what a new VMM needs.
    Log,
    /// There is no filter.
    Off,
}

impl Layers {
    /// Everything on.
    #[must_use]
    pub const fn all() -> Self {
        Self {
            namespaces: true,
            root: true,
            uid: true,
            caps: true,
            no_new_privs: true,
            seccomp: SeccompLayer::Kill,
            landlock: true,
            rlimits: true,
        }
    }
}

impl Default for Layers {
    fn default() -> Self {
        Self::all()
    }
}

/// What a jail really consists of on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The layers that are in force, in the order in which they were applied.
    pub applied: Vec<String>,
    /// What was wanted and could not be had on this host, each with the reason.
    pub missing: Vec<String>,
}
