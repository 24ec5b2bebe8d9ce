//! Landlock's rules: the second wall around files, TCP, signals and abstract sockets.
//!
//! It knows nothing of mount namespaces and users, so it holds where those fail: even with the host's whole tree in
//! sight, a process can read the base's own files, execute the program and its loader, use the harmless devices,
//! and nothing else.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
    make_bitflags,
};

use super::error::{JailError, StepContext, at};
use super::spec::{JailSpec, Report};
use super::{base, path};
use crate::sys::privilege::landlock_version;

/// What each version of Landlock brought that a jail uses: version, what.
const FEATURES: [(i32, &str); 5] = [
    (1, "landlock: files"),
    (3, "landlock: truncating files"),
    (4, "landlock: TCP"),
    (5, "landlock: device control"),
    (6, "landlock: abstract sockets and signals"),
];

/// The newest version whose rights are handled here.
const NEWEST: i32 = 7;

/// What the rules are made from, collected while the host's files can still be read.
pub(super) struct Plan {
    files: Vec<PathBuf>,
    executables: Vec<PathBuf>,
}

/// Lists the files of the base and finds out which of them are executed: the program and its loader.
pub(super) fn plan(spec: &JailSpec) -> Result<Plan, JailError> {
    let base = path::open_root_owned_dir(&spec.base)?;
    let base_path = base.proc_path();
    let mut files = Vec::new();
    list(&base_path, Path::new("/"), &mut files).step(|| at("list the files of", &spec.base))?;
    let inside = base_path.join(spec.program.strip_prefix("/").unwrap_or(&spec.program));
    let loader = base::elf::interpreter(&inside).step(|| at("find the loader of", &spec.program))?;
    let executables = std::iter::once(spec.program.clone()).chain(loader).collect();
    Ok(Plan { files, executables })
}

fn list(directory: &Path, name: &Path, into: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = name.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(&entry.path(), &name, into)?;
        } else if kind.is_file() {
            into.push(name);
        }
    }
    Ok(())
}

/// Applies the rules to this process and all that it becomes.
pub(super) fn restrict(spec: &JailSpec, plan: &Plan, report: &mut Report) -> Result<(), JailError> {
    let version = landlock_version().min(NEWEST);
    let (had, missing): (Vec<_>, Vec<_>) = FEATURES.iter().partition(|(since, _)| *since <= version);
    report.applied.extend(had.iter().map(|(_, what)| (*what).to_owned()));
    report.missing.extend(missing.iter().map(|(since, what)| {
        format!("{what}: needs version {since} of Landlock, the kernel offers {version}")
    }));
    if version == 0 {
        return Ok(());
    }
    let status = build(spec, plan, ABI::from(version))?
        .restrict_self()
        .map_err(io::Error::other)
        .step(|| "apply Landlock's rules".to_owned())?;
    check(&status)
}

/// The rights of `version` were asked for, so anything less is a mistake of ours.
fn check(status: &RestrictionStatus) -> Result<(), JailError> {
    if status.ruleset == RulesetStatus::FullyEnforced {
        return Ok(());
    }
    Err(io::Error::other(format!("{:?}", status.ruleset))).step(|| "check Landlock's rules".to_owned())
}

fn build(spec: &JailSpec, plan: &Plan, abi: ABI) -> Result<RulesetCreated, JailError> {
    let make = || {
        let mut rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        rules = rules.handle_access(AccessFs::from_all(abi))?;
        if !AccessNet::from_all(abi).is_empty() {
            rules = rules.handle_access(AccessNet::from_all(abi))?;
        }
        if !Scope::from_all(abi).is_empty() {
            rules = rules.scope(Scope::from_all(abi))?;
        }
        rules.create()
    };
    let mut rules = make().map_err(io::Error::other).step(|| "create Landlock's rules".to_owned())?;
    let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
    let known = AccessFs::from_all(abi);
    for file in &plan.files {
        rules = allow_path(rules, file, read)?;
    }
    for file in &plan.executables {
        rules = allow_path(rules, file, read | AccessFs::Execute)?;
    }
    // Its own entries and not those of others. The rule holds while the kernel remembers the directory, which
    // may end some time after the start: what a program opens there it opens when it starts.
    rules = allow_path(rules, Path::new("/proc/self"), make_bitflags!(AccessFs::{ReadFile | ReadDir}))?;
    for device in ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"] {
        rules = allow_path(rules, Path::new(device), make_bitflags!(AccessFs::{ReadFile | WriteFile}))?;
    }
    if spec.kvm {
        let rights = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev}) & known;
        rules = allow_path(rules, Path::new("/dev/kvm"), rights)?;
    }
    if spec.tmp_bytes.is_some() && spec.layers.root {
        let rights =
            known & !make_bitflags!(AccessFs::{Execute | MakeChar | MakeBlock | MakeSock | IoctlDev});
        rules = allow_path(rules, Path::new("/tmp"), rights)?;
    }
    for file in &spec.files {
        let mut rights = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        if file.writable {
            rights |= make_bitflags!(AccessFs::{WriteFile | Truncate | MakeReg | RemoveFile}) & known;
        }
        rules = allow_path(rules, &file.target, rights)?;
    }
    for again in &spec.reopen {
        let write = make_bitflags!(AccessFs::{WriteFile | Truncate}) & known;
        let rights = if again.writable { read | write } else { read };
        let link = PathBuf::from(format!("/proc/self/fd/{}", again.fd));
        // A memory file lies in no tree that a rule could name: Landlock leaves those alone and refuses rules.
        let names = std::fs::read_link(&link).step(|| at("look at", &link))?;
        if names.to_string_lossy().starts_with("/memfd:") {
            continue;
        }
        rules = allow_path(rules, &link, rights)?;
    }
    Ok(rules)
}

/// Adds one rule. Rights that only directories have are left out for a file.
fn allow_path(
    rules: RulesetCreated,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, JailError> {
    let fd = PathFd::new(path).map_err(io::Error::other).step(|| at("open for a rule of Landlock", path))?;
    let rights = if is_dir(&fd).step(|| at("look at", path))? {
        rights
    } else {
        rights & AccessFs::from_file(ABI::from(NEWEST))
    };
    rules
        .add_rule(PathBeneath::new(fd, rights))
        .map_err(io::Error::other)
        .step(|| at("add a rule of Landlock for", path))
}

fn is_dir(fd: &PathFd) -> io::Result<bool> {
    let stat = nix::sys::stat::fstat(fd)?;
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}
