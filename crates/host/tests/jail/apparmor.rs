//! AppArmor's part, on hosts that have it: what the VMM's profile stops with every other layer off.
//!
//! The stand-in is not where a VMM is, so it runs under a copy of the profile that lets it be read, and in which paths
//! are those of a jail without a root of its own. All else is the profile's own text.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bailey_host::jail::apparmor::{self, AppArmor, VMM_PROFILE};
use bailey_host::jail::{self, Layers};

use super::attacks::Victims;
use super::host::{Host, Outcome, Role, run};
use super::matrix::{ATTACKS, only};

/// What AppArmor as Debian's kernels have it cannot see: sockets of this machine's own kind, once there is a rule for
/// those that a VMM was given; root that becomes root; how much of something there is; io_uring.
const NOT_STOPPED: [&str; 6] =
    ["connect-path", "connect-abstract", "setuid", "fork-many", "open-many", "io-uring"];

fn checked_in() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("apparmor").join(VMM_PROFILE)
}

/// A profile for the stand-in, loaded as long as this lives.
struct Loaded {
    name: String,
    file: PathBuf,
}

impl Loaded {
    /// None where the host has no AppArmor, which is said.
    fn for_standin(host: &Host) -> Option<Self> {
        if apparmor::look(VMM_PROFILE) == AppArmor::Absent {
            eprintln!("SKIPPED: this machine has no AppArmor");
            return None;
        }
        let name = format!("bailey-test-{}", std::process::id());
        let text = profile_text();
        let (program, report) = (host.program.display(), "network unix stream,");
        let own = format!("{report}\n  {program} mr,\n");
        let text = text
            .replace("@{jail}=/base", "@{jail}=\"\"")
            .replace(&format!("profile {VMM_PROFILE} "), &format!("profile {name} "))
            .replace(report, &own);
        let file = host.folder.path().join("profile");
        fs::write(&file, text).unwrap();
        parser(&["--replace", "--skip-cache"], &file);
        Some(Self { name, file })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        parser(&["--remove"], &self.file);
    }
}

/// The profile, from the repository or from where somebody says that it is.
fn profile_text() -> String {
    let given = std::env::var_os("BAILEY_APPARMOR_PROFILES");
    let path = given.map_or_else(checked_in, |folder| Path::new(&folder).join(VMM_PROFILE));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()))
}

fn parser(words: &[&str], file: &Path) {
    let output = Command::new("apparmor_parser").args(words).arg(file).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn alone_it_stops_exactly_what_the_matrix_says() {
    let victims = Victims::new(Role::Vmm);
    let Some(profile) = Loaded::for_standin(&victims.host) else { return };
    let mut wrong = Vec::new();
    for attack in ATTACKS {
        let outcome = victims.attack_under(attack, &only(&[]), Some(&profile.name));
        let stopped = outcome != Outcome::Succeeded;
        if stopped == NOT_STOPPED.contains(&attack.name) {
            wrong.push(format!("{} at {:?}: {outcome:?}", attack.name, attack.target));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn it_is_reported_and_a_profile_that_is_not_loaded_is_an_error() {
    let host = Host::new();
    let Some(profile) = Loaded::for_standin(&host) else { return };
    let mut spec = host.spec("nothing", "");
    spec.layers = Layers { root: false, landlock: false, ..Layers::all() };
    spec.apparmor = Some(profile.name.clone());
    assert!(matches!(run(&spec), Outcome::Denied(_)));
    let (_said, tell) = std::io::pipe().unwrap();
    let jailed = jail::spawn(&spec, vec![(tell.into(), 3)], |_| Ok(())).unwrap();
    let entry = format!("apparmor: {}", profile.name);
    assert!(jailed.report.applied.contains(&entry), "{:?}", jailed.report);
    super::host::end(&jailed);
    spec.apparmor = Some("bailey-no-such-profile".to_owned());
    let refused = jail::spawn(&spec, Vec::new(), |_| Ok(())).unwrap_err();
    assert!(refused.to_string().contains("bailey-no-such-profile"), "{refused}");
}
