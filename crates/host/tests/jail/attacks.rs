//! A taken-over VMM attacks its host and its neighbours, with all layers on, with each one off, and with each one
//! alone. `matrix.rs` says what has to come out.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use bailey_host::jail::{FileMount, Layers, SeccompLayer};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::host::{Host, NEIGHBOUR, Outcome, Role, run};
use super::matrix::{ATTACKS, Attack, LAYERS, Target, only, without_one};

const ROLES: [Role; 2] = [Role::Vmm, Role::ImageMaker];

/// A host with something on it to attack.
pub(crate) struct Victims {
    pub(crate) host: Host,
    process: Child,
    tcp: TcpListener,
    abstract_name: String,
    _sockets: [UnixListener; 2],
}

impl Victims {
    pub(crate) fn new(role: Role) -> Self {
        let host = Host::with_role(role);
        let folder = host.folder.path();
        let disk = folder.join("neighbours-disk");
        fs::write(&disk, "secret").unwrap();
        chown(&disk, Some(NEIGHBOUR), Some(NEIGHBOUR)).unwrap();
        fs::set_permissions(&disk, Permissions::from_mode(0o600)).unwrap();
        // The null device, under a name and a mode that no jail gives it.
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&folder.join("device"), SFlag::S_IFCHR, mode, makedev(1, 3)).unwrap();
        let set_user_id = folder.join("set-user-id");
        fs::copy(&host.program, &set_user_id).unwrap();
        fs::set_permissions(&set_user_id, Permissions::from_mode(0o4755)).unwrap();
        let engine = UnixListener::bind(folder.join("engine.sock")).unwrap();
        fs::set_permissions(folder.join("engine.sock"), Permissions::from_mode(0o666)).unwrap();
        let abstract_name = folder.display().to_string();
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let process = Command::new("sleep").arg("600").uid(NEIGHBOUR).gid(NEIGHBOUR).spawn().unwrap();
        Self {
            process,
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            abstract_name,
            _sockets: [engine, UnixListener::bind_addr(&address).unwrap()],
            host,
        }
    }

    fn attack(&self, attack: &Attack, layers: &Layers) -> Outcome {
        self.attack_under(attack, layers, None)
    }

    /// The same, under a profile of AppArmor's.
    pub(crate) fn attack_under(&self, attack: &Attack, layers: &Layers, profile: Option<&str>) -> Outcome {
        let folder = self.host.folder.path();
        let target = match attack.target {
            Target::Fixed(target) => target.to_owned(),
            Target::InFolder(name) => folder.join(name).display().to_string(),
            Target::NeighbourProcess => self.process.id().to_string(),
            Target::NeighbourInode => fs::metadata(folder.join("neighbours-disk")).unwrap().ino().to_string(),
            Target::TcpPort => self.tcp.local_addr().unwrap().to_string(),
            Target::AbstractSocket => self.abstract_name.clone(),
        };
        let outcome = self.host.attack(attack.name, &target, layers, profile);
        // What a success leaves behind, so that the next one can succeed too.
        let _mostly_not_mounted = umount2(folder, MntFlags::MNT_DETACH);
        for made in ["made-by-the-standin", "node-of-the-standin"] {
            let _mostly_not_there = fs::remove_file(folder.join(made));
        }
        outcome
    }
}

impl Drop for Victims {
    fn drop(&mut self) {
        self.process.kill().expect("end the neighbour's process");
        self.process.wait().expect("reap the neighbour's process");
    }
}

/// Collects what did not come out as it should, so that one run shows everything.
fn check(each: impl FnOnce(&Victims, &mut Vec<String>)) {
    check_as(Role::Vmm, each);
}

fn check_as(role: Role, each: impl FnOnce(&Victims, &mut Vec<String>)) {
    let victims = Victims::new(role);
    let mut wrong = Vec::new();
    each(&victims, &mut wrong);
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_attack_works_where_there_is_no_jail() {
    check(|victims, wrong| {
        for attack in ATTACKS {
            let outcome = victims.attack(attack, &only(&[]));
            if outcome != Outcome::Succeeded {
                wrong.push(format!("{} at {:?}: {outcome:?}", attack.name, attack.target));
            }
        }
    });
}

#[test]
fn no_attack_works_in_the_jail() {
    for role in ROLES {
        check_as(role, |victims, wrong| {
            // It runs and can say so: what is killed below is killed for the attack.
            let nothing = victims.host.attack("nothing", "", &Layers::all(), None);
            assert!(matches!(nothing, Outcome::Denied(_)), "{role:?}: {nothing:?}");
            for attack in ATTACKS {
                if victims.attack(attack, &Layers::all()) == Outcome::Succeeded {
                    wrong.push(format!("{role:?}: {} at {:?} succeeded", attack.name, attack.target));
                }
            }
        });
    }
}

#[test]
fn no_attack_works_with_any_one_layer_off() {
    for role in ROLES {
        check_as(role, |victims, wrong| {
            for (off, layers) in without_one() {
                for attack in ATTACKS {
                    let succeeded = victims.attack(attack, &layers) == Outcome::Succeeded;
                    if succeeded && attack.alone != Some(off) {
                        let at = format!("{} at {:?}", attack.name, attack.target);
                        wrong.push(format!("{role:?}: {at} succeeded without {off}"));
                    }
                }
            }
        });
    }
}

#[test]
fn the_image_maker_reads_what_it_sees_and_keeps_no_other_capability() {
    let host = Host::with_role(Role::ImageMaker);
    let file = host.folder.path().join("tree");
    fs::write(&file, "nobody's to read").unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o000)).unwrap();
    let read = |read_all| {
        let mut spec = host.spec("read-file", "/run/tree");
        spec.files = vec![FileMount { source: file.clone(), target: "/run/tree".into(), writable: false }];
        spec.read_all = read_all;
        run(&spec)
    };
    assert_eq!(read(true), Outcome::Succeeded);
    assert!(matches!(read(false), Outcome::Denied(_)));
    // With the filter off, so that it is the capabilities that deny: those to change the root and the user.
    let layers = Layers { seccomp: SeccompLayer::Off, ..Layers::all() };
    for attack in ["chroot", "setuid", "raw-socket", "bpf"] {
        let outcome = host.attack(attack, "/proc", &layers, None);
        assert!(
            matches!(&outcome, Outcome::Denied(why) if why.contains("os error 1)")),
            "{attack}: {outcome:?}"
        );
    }
}

#[test]
fn each_layer_stops_exactly_what_the_matrix_says() {
    check(|victims, wrong| {
        for attack in ATTACKS {
            for layers in attack.stopped_by {
                if victims.attack(attack, &only(layers)) == Outcome::Succeeded {
                    wrong.push(format!("{} at {:?}: not stopped by {layers:?}", attack.name, attack.target));
                }
            }
            for layer in LAYERS.iter().filter(|layer| !attack.stopped_by.contains(&&[**layer][..])) {
                let outcome = victims.attack(attack, &only(&[*layer]));
                if outcome != Outcome::Succeeded {
                    wrong.push(format!("{} at {:?}: {outcome:?} by {layer:?}", attack.name, attack.target));
                }
            }
        }
    });
}
