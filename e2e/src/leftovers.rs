//! What a runtime left behind when its containers are gone: processes, mounts, cgroups, network namespaces and
//! devices, loop devices, sockets, files.
//!
//! Others use the machine at the same time, so a difference of before and after would accuse the wrong one. Whatever
//! is counted here belongs to one containerd: its descendants (the test is their reaper, so that none can get away),
//! and what carries its folder or its namespace in its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::containerd::Containerd;
use crate::process::text_of;
use crate::wait;

/// For what goes away a moment after its container is reported gone.
const GRACE: Duration = Duration::from_secs(10);
const QUICK: Duration = Duration::from_secs(30);

/// Programs that belong to the tests or to containerd and not to a container.
const EXPECTED: [&str; 5] = ["containerd", "ctr", "nsenter", "script", "cargo"];

/// Files that the shim keeps for all sandboxes of a machine: the one whose locks are the leases of user ids, which end
/// with the processes that hold them, the measured speed of the processor's clock, and whether KVM works.
const KEPT: [&str; 3] = ["uids", "tsc-khz", "kvm"];

/// Network interfaces and namespaces as they were, by name.
pub struct Before {
    interfaces: BTreeSet<String>,
    namespaces: BTreeSet<String>,
}

impl Before {
    /// Takes note of what there is before a containerd runs anything, and becomes the reaper of what it orphans.
    pub fn take() -> Result<Self> {
        nix::sys::prctl::set_child_subreaper(true).context("becoming a reaper")?;
        Ok(Self { interfaces: names("/sys/class/net"), namespaces: names("/run/netns") })
    }

    /// Fails if something is left, in words.
    pub fn assert_nothing_left(&self, containerd: &Containerd) -> Result<()> {
        let mut last = Vec::new();
        let gone = wait::until_true("an empty machine", GRACE, || {
            last = self.left(containerd)?;
            Ok(last.is_empty())
        });
        match gone {
            Err(_) if !last.is_empty() => bail!("left behind:\n  {}", last.join("\n  ")),
            other => other,
        }
    }

    /// All that is left now.
    fn left(&self, containerd: &Containerd) -> Result<Vec<String>> {
        let mut left = Vec::new();
        let orphans = orphans()?;
        left.extend(orphans.iter().map(|(pid, line)| format!("process {pid}: {line}")));
        left.extend(mounts(containerd)?);
        left.extend(
            cgroups(containerd.namespace()).into_iter().map(|path| format!("cgroup {}", path.display())),
        );
        left.extend(self.network(containerd));
        left.extend(loop_devices(containerd.folder()));
        left.extend(files(containerd)?);
        Ok(left)
    }

    fn network(&self, containerd: &Containerd) -> Vec<String> {
        let held = held_interfaces();
        let new = names("/sys/class/net");
        let new = new.difference(&self.interfaces).filter(|name| !held.contains(name.as_str()));
        let mut left: Vec<_> =
            new.map(|name| format!("network interface {name}, held by no process")).collect();
        let new = names("/run/netns");
        let ours = |name: &&String| name.contains(containerd.namespace());
        left.extend(
            new.difference(&self.namespaces).filter(ours).map(|name| format!("network namespace {name}")),
        );
        left
    }
}

/// Kills all descendants but those that a test expects, until there are none.
pub fn kill_orphans() -> Result<()> {
    wait::until_true("the end of what was left", GRACE, || {
        let orphans = orphans()?;
        for pid in orphans.keys() {
            // It may have ended since.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        Ok(orphans.is_empty())
    })
}

/// Processes of containers: descendants of this process that are neither containerd nor a tool of the tests.
fn orphans() -> Result<BTreeMap<i32, String>> {
    let mut parents = BTreeMap::new();
    let mut lines = BTreeMap::new();
    let own = i32::try_from(std::process::id()).context("reading a process id")?;
    for name in names("/proc") {
        let Ok(pid) = name.parse::<i32>() else { continue };
        // Processes end while we look.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let mut fields = rest.split(' ');
        let state = fields.next().unwrap_or_default().to_owned();
        let parent = fields.next().and_then(|parent| parent.parse::<i32>().ok()).unwrap_or(0);
        parents.insert(pid, parent);
        if state == "Z" && parent == own {
            reap(pid);
            continue;
        }
        lines.insert(pid, described(pid));
    }
    let is_descendant = |pid: &i32| {
        let ancestors = std::iter::successors(parents.get(pid), |parent| parents.get(parent));
        ancestors.take(parents.len()).any(|ancestor| *ancestor == own)
    };
    lines.retain(|pid, line| is_descendant(pid) && !is_expected(line));
    Ok(lines)
}

/// Reaps a process that became our child when its parent ended. Those that the standard library waits for are left
/// to it.
fn reap(pid: i32) {
    if !is_expected(&described(pid)) {
        let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    }
}

fn is_expected(line: &str) -> bool {
    let program = line.split(' ').next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    EXPECTED.contains(&name)
}

fn described(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    if line.is_empty() {
        return fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    }
    line.trim().to_owned()
}

/// Mounts in containerd's view below its folder, and in the machine's.
fn mounts(containerd: &Containerd) -> Result<Vec<String>> {
    let theirs = text_of(containerd.command("cat").arg("/proc/self/mountinfo"), QUICK)?;
    let ours = fs::read_to_string("/proc/self/mountinfo").context("reading mounts")?;
    let folder = containerd.folder().to_string_lossy();
    let points = theirs.lines().chain(ours.lines()).filter_map(|line| line.split(' ').nth(4));
    let found: BTreeSet<_> = points.filter(|point| point.contains(folder.as_ref())).collect();
    Ok(found.into_iter().map(|point| format!("mount {point}")).collect())
}

/// The cgroups below those that are named after the namespace. Runtimes keep that one itself, which is empty.
fn cgroups(namespace: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &mut |path| {
        let name = path.to_string_lossy();
        if let Some((_, below)) = name.split_once(namespace)
            && !below.is_empty()
            && path.is_dir()
        {
            found.push(path.to_path_buf());
        }
        path.is_dir()
    });
    found
}

/// Loop devices whose file is in that folder.
fn loop_devices(folder: &Path) -> Vec<String> {
    let devices = names("/sys/block").into_iter().filter(|name| name.starts_with("loop"));
    let file = |name: &String| fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok();
    let used = devices.filter_map(|name| file(&name).map(|file| (name, file)));
    let ours = used.filter(|(_, file)| Path::new(file.trim()).starts_with(folder));
    ours.map(|(name, file)| format!("loop device {name} on {}", file.trim())).collect()
}

/// Tap interfaces that a process holds open, which are no leftovers.
fn held_interfaces() -> BTreeSet<String> {
    let mut held = BTreeSet::new();
    for pid in names("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok()) {
        let folder = PathBuf::from(format!("/proc/{pid}/fdinfo"));
        for info in names(&folder).into_iter().filter_map(|fd| fs::read_to_string(folder.join(fd)).ok()) {
            held.extend(info.lines().filter_map(|line| line.strip_prefix("iff:\t")).map(str::to_owned));
        }
    }
    held
}

/// Files below the shim's state folder, and bundles that containerd still has.
fn files(containerd: &Containerd) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let kept = KEPT.map(|name| containerd.shim_state_dir().join(name));
    walk(&containerd.shim_state_dir(), &mut |path| {
        if !path.is_dir() && !kept.iter().any(|kept| kept == path) {
            left.push(format!("file {}", path.display()));
        }
        path.is_dir()
    });
    let bundles =
        containerd.folder().join("state/io.containerd.runtime.v2.task").join(containerd.namespace());
    left.extend(names(bundles).into_iter().map(|name| format!("bundle of {name}")));
    Ok(left)
}

/// Calls `look` with everything below a folder; it says whether to go deeper. Follows no links.
fn walk(folder: &Path, look: &mut impl FnMut(&Path) -> bool) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if !is_link && look(&entry.path()) {
            walk(&entry.path(), look);
        }
    }
}

fn names(folder: impl AsRef<Path>) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
