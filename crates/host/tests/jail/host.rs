//! A host for one test: a folder that root alone can change, with the roots of jails in it, and a stand-in for a
//! VMM that has been taken over. Everything goes when the value does.

use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use bailey_host::jail::{self, JailSpec, Jailed, Layers, Profile, base};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use tempfile::TempDir;

/// A user for one test's jails, in no range that anything is given. No two tests that run at the same time have the
/// same one: the processes of a user count together towards its limit.
pub(crate) fn user() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 1_800_000_000;
    const TESTS: u32 = 16;
    FIRST + std::process::id() * TESTS + COUNT.fetch_add(1, Ordering::Relaxed) % TESTS
}

/// Another tenant's.
pub(crate) const NEIGHBOUR: u32 = 1_900_000_002;
/// A program that a jail's root holds but that is not the jail's program.
pub(crate) const OTHER_PROGRAM: &str = "/usr/bin/dash";

/// A folder below `/var/lib`, which every user may pass through and root alone may change. Removed at the end.
pub(crate) fn folder() -> TempDir {
    assert!(nix::unistd::Uid::effective().is_root(), "the tests of the jail need root: run them as root");
    let folder = tempfile::Builder::new().prefix("bailey-jail-test-").tempdir_in("/var/lib").unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
}

/// The program of the tests that goes through the steps of the jail.
pub(crate) fn entry() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_bailey-jail-standin")).to_owned()
}

/// What the stand-in stands in for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Vmm,
    /// `mkfs.erofs`, whose jail has a table of its own and keeps the capability to read everything that it sees.
    ImageMaker,
}

/// The stand-in and the roots of its jails.
pub(crate) struct Host {
    pub(crate) role: Role,
    pub(crate) user: u32,
    pub(crate) folder: TempDir,
    pub(crate) program: PathBuf,
    pub(crate) base: PathBuf,
}

/// How an attack went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Succeeded,
    Denied(String),
    /// By the filter of system calls.
    Killed,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with_role(Role::Vmm)
    }

    pub(crate) fn with_role(role: Role) -> Self {
        let folder = folder();
        // Where every user can run it, for jails whose root is the host's.
        let program = folder.path().join("standin");
        fs::copy(entry(), &program).unwrap();
        let roots = folder.path().join("roots");
        fs::create_dir(&roots).unwrap();
        let base = base::prepare(&program, &[OTHER_PROGRAM.into()], &roots).unwrap();
        Self { role, user: user(), folder, program, base }
    }

    /// A jail for one attack.
    pub(crate) fn spec(&self, attack: &str, target: &str) -> JailSpec {
        let profile = match self.role {
            Role::Vmm => Profile::QemuTcg,
            Role::ImageMaker => Profile::MkfsErofs,
        };
        let mut spec = JailSpec::new(self.user, self.base.clone(), self.program.clone(), profile);
        spec.read_all = self.role == Role::ImageMaker;
        spec.entry = entry();
        spec.argv = vec!["standin".to_owned(), attack.to_owned(), target.to_owned()];
        spec
    }

    /// Lets the stand-in try one attack with these layers on, and under this profile of AppArmor's.
    pub(crate) fn attack(
        &self,
        attack: &str,
        target: &str,
        layers: &Layers,
        profile: Option<&str>,
    ) -> Outcome {
        let mut spec = self.spec(attack, target);
        spec.apparmor = profile.map(str::to_owned);
        spec.layers = layers.clone();
        run(&spec)
    }
}

impl Drop for Host {
    /// Whatever the test did, nothing of it is left: no mount, no process.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let folder = self.folder.path().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&folder), "a mount is left below {folder}");
        let running = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let program = fs::read_link(entry.path().join("exe")).ok()?;
            program.starts_with(&folder).then(|| entry.file_name())
        });
        assert_eq!(running.collect::<Vec<_>>(), Vec::<std::ffi::OsString>::new(), "processes are left");
    }
}

/// Runs the stand-in to its end.
pub(crate) fn run(spec: &JailSpec) -> Outcome {
    let (mut said, tell) = io::pipe().unwrap();
    let jailed = jail::spawn(spec, vec![(OwnedFd::from(tell), 3)], |_| Ok(())).unwrap_or_else(|e| {
        panic!("spawn {:?} with {:?}: {e}: {:?}", spec.argv, spec.layers, std::error::Error::source(&e))
    });
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    match (text.as_str(), end(&jailed)) {
        ("succeeded", WaitStatus::Exited(_, 0)) => Outcome::Succeeded,
        ("", WaitStatus::Signaled(_, Signal::SIGSYS, _)) => Outcome::Killed,
        (text, WaitStatus::Exited(_, 0)) if text.starts_with("denied") => Outcome::Denied(text.to_owned()),
        (text, status) => panic!("{:?} with {:?} said {text:?}, {status:?}", spec.argv, spec.layers),
    }
}

pub(crate) fn end(jailed: &Jailed) -> WaitStatus {
    jailed.wait().unwrap()
}

/// Whether a process runs. One that has ended and that nobody has reaped yet does not.
pub(crate) fn runs(pid: nix::unistd::Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state comes after the name, which is in parentheses.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Whether a process is there, reaped or not.
pub(crate) fn exists(pid: nix::unistd::Pid) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
