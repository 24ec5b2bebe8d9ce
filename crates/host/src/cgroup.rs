//! The cgroup of one sandbox on the host: what the VMM and its helpers may use, whatever goes on in the guest.
//!
//! Works on cgroup v2 and on v1 controllers mounted one by one (the hybrid layout), found by looking. Holds no
//! process-wide state; a cgroup is a path, so that whoever comes after a crash can remove it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::unistd::Pid;

use crate::block::Disk;

/// Where cgroups are mounted, on every distribution that we know.
const MOUNT: &str = "/sys/fs/cgroup";

/// v1 controllers that we use, when they are there.
const V1: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "blkio", "freezer"];

/// v2 controllers that we use, when they are there.
const V2: [&str; 4] = ["memory", "cpu", "pids", "io"];

/// How often making a folder is tried while others remove empty ones above it.
const CREATE_TRIES: u32 = 10;

/// How often a cgroup is looked at that is to be empty.
const MOVE_TRIES: u32 = 10;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path would lead out of the cgroup tree.
    #[error("the cgroup path {0} is not a plain path below the root of the tree")]
    Path(PathBuf),
    /// The host has no cgroups where they are expected.
    #[error("there is neither cgroup v2 nor a v1 memory controller below {MOUNT}")]
    Absent,
    /// A file of the cgroup could not be used.
    #[error("{what} {path}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// Limits of a cgroup. None leaves what is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes, page cache included. Swap is none of it: the cgroup gets none, where the kernel counts it.
    pub memory_bytes: Option<u64>,
    /// Microseconds of CPU time for each period.
    pub cpu_quota_us: Option<u64>,
    /// The period, in microseconds; 100,000 when not given.
    pub cpu_period_us: Option<u64>,
    /// Weight of the CPU share among neighbours, 1 to 10,000, 100 being the usual one.
    pub cpu_weight: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// Limits of the I/O on one disk. None is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoLimits {
    /// Bytes per second.
    pub read_bytes: Option<u64>,
    /// Bytes per second.
    pub write_bytes: Option<u64>,
    /// Operations per second.
    pub reads: Option<u64>,
    /// Operations per second.
    pub writes: Option<u64>,
}

/// Usage of a cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in microseconds.
    pub cpu_us: u64,
    /// Memory now, in bytes.
    pub memory_bytes: u64,
    /// Processes and threads now.
    pub pids: u64,
}

/// One cgroup: a folder on v2, one folder for each controller on v1.
#[derive(Debug, Clone)]
pub struct Cgroup {
    version: Version,
    folders: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Cgroup {
    /// Names the cgroup at `path` below the root of the tree, without making it.
    ///
    /// # Errors
    /// When the path has anything but plain names, or the host has no cgroups.
    pub fn at(path: &Path) -> Result<Cgroup, CgroupError> {
        Cgroup::below(Path::new(MOUNT), path)
    }

    fn below(mount: &Path, path: &Path) -> Result<Cgroup, CgroupError> {
        use std::path::Component;
        let relative = path.strip_prefix("/").unwrap_or(path);
        let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || relative.as_os_str().is_empty() {
            return Err(CgroupError::Path(path.to_owned()));
        }
        if mount.join("cgroup.controllers").exists() {
            return Ok(Cgroup { version: Version::V2, folders: vec![mount.join(relative)] });
        }
        let there = |name: &&str| mount.join(name).join("cgroup.procs").exists();
        let folders: Vec<_> =
            V1.iter().filter(|name| there(name)).map(|name| mount.join(name).join(relative)).collect();
        if folders.is_empty() {
            return Err(CgroupError::Absent);
        }
        Ok(Cgroup { version: Version::V1, folders })
    }

    /// Its path below the root of the tree, where there is one tree for all controllers (v2).
    #[must_use]
    pub fn unified(&self) -> Option<PathBuf> {
        let folder = self.folders.first().filter(|_| self.version == Version::V2)?;
        folder.strip_prefix(MOUNT).ok().map(Path::to_owned)
    }

    /// Makes the cgroup, and gives it its controllers.
    ///
    /// # Errors
    /// When a folder cannot be made.
    pub fn create(&self) -> Result<(), CgroupError> {
        self.folders.iter().try_for_each(|folder| {
            for _ in 0..CREATE_TRIES {
                match self.create_folder(folder) {
                    // Another one has just removed an empty folder above.
                    Err(CgroupError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                    other => return other,
                }
            }
            self.create_folder(folder)
        })
    }

    fn create_folder(&self, folder: &Path) -> Result<(), CgroupError> {
        if self.version == Version::V2 {
            delegate(folder)?;
        }
        fs::create_dir_all(folder).map_err(failed("make", folder))
    }

    /// Puts a process into the cgroup.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn add(&self, pid: Pid) -> Result<(), CgroupError> {
        for folder in &self.folders {
            let file = folder.join("cgroup.procs");
            fs::write(&file, pid.to_string()).map_err(failed("put the process into", &file))?;
        }
        Ok(())
    }

    /// Puts all that is in this cgroup into another one. With a process of KVM's go threads of the kernel's own that work
    /// for it, and that do not follow it by themselves.
    ///
    /// # Errors
    /// When the kernel refuses one that is still there.
    pub fn move_to(&self, other: &Cgroup) -> Result<(), CgroupError> {
        for (from, to) in self.folders.iter().zip(&other.folders) {
            let (from, to) = (from.join("cgroup.procs"), to.join("cgroup.procs"));
            // What is born meanwhile is in the next look.
            for _ in 0..MOVE_TRIES {
                let there = fs::read_to_string(&from).map_err(failed("list the processes of", &from))?;
                if there.is_empty() {
                    break;
                }
                for pid in there.lines() {
                    match fs::write(&to, pid) {
                        // It has ended meanwhile.
                        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                        other => other.map_err(failed("put a process into", &to))?,
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets the limits that are given.
    ///
    /// # Errors
    /// When the kernel refuses a value, or the controller is not there.
    pub fn set(&self, limits: &Limits) -> Result<(), CgroupError> {
        let period = limits.cpu_period_us.unwrap_or(100_000);
        let v2 = self.version == Version::V2;
        if let Some(bytes) = limits.memory_bytes {
            self.write(
                "memory",
                if v2 { "memory.max" } else { "memory.limit_in_bytes" },
                &bytes.to_string(),
            )?;
            self.without_swap(bytes)?;
        }
        if let Some(quota) = limits.cpu_quota_us {
            if v2 {
                self.write("cpu", "cpu.max", &format!("{quota} {period}"))?;
            } else {
                self.write("cpu", "cpu.cfs_period_us", &period.to_string())?;
                self.write("cpu", "cpu.cfs_quota_us", &quota.to_string())?;
            }
        }
        if let Some(weight) = limits.cpu_weight {
            if v2 {
                self.write("cpu", "cpu.weight", &weight.to_string())?;
            } else {
                self.write("cpu", "cpu.shares", &shares(weight).to_string())?;
            }
        }
        if let Some(pids) = limits.pids {
            self.write("pids", "pids.max", &pids.to_string())?;
        }
        Ok(())
    }

    /// Sets the limits of the I/O on one disk that are given. On v1 they hold for what is read, and for what is written
    /// directly or waited for; what the kernel writes out of its cache later has no owner there.
    ///
    /// # Errors
    /// When the kernel refuses them, or the controller is not there.
    pub fn set_io(&self, disk: Disk, limits: &IoLimits) -> Result<(), CgroupError> {
        let all = [
            ("rbps", "read_bps", limits.read_bytes),
            ("wbps", "write_bps", limits.write_bytes),
            ("riops", "read_iops", limits.reads),
            ("wiops", "write_iops", limits.writes),
        ];
        for (v2, v1, limit) in all {
            let Some(limit) = limit else { continue };
            match self.version {
                Version::V2 => self.write("io", "io.max", &format!("{disk} {v2}={limit}"))?,
                Version::V1 => {
                    self.write("blkio", &format!("blkio.throttle.{v1}_device"), &format!("{disk} {limit}"))?;
                }
            }
        }
        Ok(())
    }

    /// What is over the limit shall not go on on the host's swap: it would be there in the clear, and slow down others.
    fn without_swap(&self, bytes: u64) -> Result<(), CgroupError> {
        let (file, value) = match self.version {
            Version::V2 => ("memory.swap.max", 0),
            // Memory and swap together.
            Version::V1 => ("memory.memsw.limit_in_bytes", bytes),
        };
        // A kernel that does not count swap lacks the file.
        if self.folder("memory").join(file).exists() {
            self.write("memory", file, &value.to_string())?;
        }
        Ok(())
    }

    /// What the cgroup uses. What cannot be read counts as nothing.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let read = |controller: &str, file: &str| {
            let path = self.folder(controller).join(file);
            fs::read_to_string(path).unwrap_or_default()
        };
        let number = |text: String| text.trim().parse().unwrap_or(0);
        match self.version {
            Version::V2 => Usage {
                cpu_us: field(&read("cpu", "cpu.stat"), "usage_usec"),
                memory_bytes: number(read("memory", "memory.current")),
                pids: number(read("pids", "pids.current")),
            },
            Version::V1 => Usage {
                cpu_us: number(read("cpuacct", "cpuacct.usage")) / 1000,
                memory_bytes: number(read("memory", "memory.usage_in_bytes")),
                pids: number(read("pids", "pids.current")),
            },
        }
    }

    /// How often the kernel has killed a process of the cgroup for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = if self.version == Version::V2 { "memory.events" } else { "memory.oom_control" };
        field(&fs::read_to_string(self.folder("memory").join(file)).unwrap_or_default(), "oom_kill")
    }

    /// Removes the cgroup, waiting a moment for processes that are just ending. Absent is as good as removed.
    ///
    /// # Errors
    /// When a process stays in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.folders.iter().try_for_each(|folder| remove_folder(folder))
    }

    /// Removes the cgroup as [`Cgroup::remove`] does, then those above it that are empty, up to and without `top`
    /// (a path below the root of the tree).
    ///
    /// # Errors
    /// When a process stays in the cgroup itself. That another one above it is in use is none.
    pub fn remove_up_to(&self, top: &Path) -> Result<(), CgroupError> {
        self.remove()?;
        let top = top.strip_prefix("/").unwrap_or(top);
        for folder in &self.folders {
            for above in folder.ancestors().skip(1).take_while(|above| !above.ends_with(top)) {
                if fs::remove_dir(above).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn folder(&self, controller: &str) -> &Path {
        let named = |folder: &&PathBuf| {
            self.version == Version::V2
                || folder.strip_prefix(MOUNT).is_ok_and(|rest| rest.starts_with(controller))
        };
        self.folders.iter().find(named).unwrap_or(&self.folders[0])
    }

    fn write(&self, controller: &str, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.folder(controller).join(file);
        fs::write(&path, value).map_err(failed("set", &path))
    }
}

/// Lets the children of each ancestor of `folder` have the controllers that the ancestor has.
fn delegate(folder: &Path) -> Result<(), CgroupError> {
    let mut ancestors: Vec<_> =
        folder.ancestors().skip(1).take_while(|path| path.starts_with(MOUNT)).collect();
    ancestors.reverse();
    for ancestor in ancestors {
        fs::create_dir_all(ancestor).map_err(failed("make", ancestor))?;
        let there = fs::read_to_string(ancestor.join("cgroup.controllers")).unwrap_or_default();
        let file = ancestor.join("cgroup.subtree_control");
        for name in V2.iter().filter(|name| there.split_whitespace().any(|one| one == **name)) {
            fs::write(&file, format!("+{name}")).map_err(failed("enable a controller in", &file))?;
        }
    }
    Ok(())
}

fn remove_folder(folder: &Path) -> Result<(), CgroupError> {
    // A killed process leaves its cgroup only when the kernel has torn it down: mostly at once, under load later.
    const TRIES: u32 = 200;
    for attempt in 0.. {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < TRIES => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => return other.map_err(failed("remove", folder)),
        }
    }
    Ok(())
}

/// v1 shares for a v2 weight, as the kernel's own conversion has it: 100 is 1,024.
fn shares(weight: u64) -> u64 {
    (weight * 1024 / 100).clamp(2, 262_144)
}

/// v2 weight for v1 shares, as OCI runtimes convert it.
#[must_use]
pub fn weight_from_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn field(text: &str, name: &str) -> u64 {
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    fields.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> CgroupError {
    move |source| CgroupError::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_tree() {
        for path in ["..", "/a/../..", "", "/", "a/./../b"] {
            assert!(matches!(Cgroup::at(path.as_ref()), Err(CgroupError::Path(_))), "{path}");
        }
    }

    #[test]
    fn shares_and_weights_agree_at_the_ends() {
        assert_eq!(weight_from_shares(2), 1);
        assert_eq!(weight_from_shares(262_144), 10_000);
        assert_eq!(shares(100), 1024);
    }

    #[test]
    fn a_process_is_limited_and_the_cgroup_goes_without_a_trace() {
        let group = Cgroup::at(format!("/bailey-test-{}/one", std::process::id()).as_ref()).unwrap();
        group.create().unwrap();
        group.set(&Limits { memory_bytes: Some(64 << 20), pids: Some(10), ..Limits::default() }).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        group.add(Pid::from_raw(child.id().cast_signed())).unwrap();
        assert_eq!(group.usage().pids, 1);
        child.kill().unwrap();
        child.wait().unwrap();
        group.remove_up_to("/no-such-top".as_ref()).unwrap();
        let parent = Cgroup::at(format!("/bailey-test-{}", std::process::id()).as_ref()).unwrap();
        assert!(parent.folders.iter().all(|folder| !folder.exists()));
    }
}
