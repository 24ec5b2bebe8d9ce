//! What a caller of `spawn` gets, and what is left behind: nothing.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bailey_host::jail::{self, FileMount, JailError, Layers, Rlimits, base};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::host::{Host, OTHER_PROGRAM, Outcome, Role, end, exists, run, runs};

#[test]
fn reports_every_layer() {
    let host = Host::new();
    let (_said, tell) = io::pipe().unwrap();
    let jailed = jail::spawn(&host.spec("nothing", ""), vec![(OwnedFd::from(tell), 3)], |_| Ok(())).unwrap();
    let applied = jailed.report.applied.join(", ");
    for layer in
        ["namespaces", "root", "rlimits", "uid", "caps", "no_new_privs", "landlock: files", "seccomp: Kill"]
    {
        assert!(applied.contains(layer), "{layer} is not in {applied}");
    }
    assert!(matches!(end(&jailed), WaitStatus::Exited(_, 0)));
}

#[test]
fn a_failed_step_is_named_and_leaves_no_process() {
    let host = Host::new();
    let mut spec = host.spec("nothing", "");
    spec.program = "/usr/bin/not-in-the-base".into();
    let mut seen = None;
    let error = jail::spawn(&spec, Vec::new(), |pid| {
        seen = Some(pid);
        Ok(())
    })
    .unwrap_err();
    assert!(error.to_string().contains("not-in-the-base"), "{error}");
    assert!(matches!(error, JailError::Step { source, .. } if source.kind() == io::ErrorKind::NotFound));
    assert!(!exists(seen.unwrap()));
}

#[test]
fn the_callers_own_failure_stops_it() {
    let host = Host::new();
    let mut seen = None;
    let error = jail::spawn(&host.spec("nothing", ""), Vec::new(), |pid| {
        seen = Some(pid);
        Err("no room in the cgroup".into())
    })
    .unwrap_err();
    assert!(matches!(&error, JailError::BeforeExec(why) if why.to_string() == "no room in the cgroup"));
    assert!(!exists(seen.unwrap()));
}

#[test]
fn a_program_that_is_no_helper_is_told() {
    let host = Host::new();
    let mut spec = host.spec("nothing", "");
    spec.entry = "/bin/true".into();
    assert!(matches!(jail::spawn(&spec, Vec::new(), |_| Ok(())), Err(JailError::Died(_))));
}

#[test]
fn descriptors_arrive_whatever_their_numbers_were() {
    let host = Host::new();
    // Swapped numbers: each descriptor has the number that another one gets.
    let (mut said, tell) = io::pipe().unwrap();
    let spare = fs::File::open("/dev/null").unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&tell);
    let fds = vec![(OwnedFd::from(spare), number), (OwnedFd::from(tell), 3)];
    let jailed = jail::spawn(&host.spec("nothing", ""), fds, |_| Ok(())).unwrap();
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("denied"), "{text}");
    end(&jailed);
}

#[test]
fn limits_are_those_asked_for() {
    let host = Host::new();
    let mut spec = host.spec("open-many", "20");
    spec.rlimits = Rlimits { nofile: 64, ..Rlimits::default() };
    assert_eq!(run(&spec), Outcome::Succeeded);
    spec.rlimits.nofile = 16;
    assert!(matches!(run(&spec), Outcome::Denied(_)));
}

#[test]
fn files_are_mounted_as_asked() {
    let host = Host::new();
    let file = host.folder.path().join("disk");
    fs::write(&file, "data").unwrap();
    std::os::unix::fs::chown(&file, Some(host.user), None).unwrap();
    let attack = |name, writable| {
        // Not the folder that the program lies in, which the mounts below /run would hide: /run is another one.
        let mut spec = host.spec(name, "/run/disks/a");
        spec.files = vec![FileMount { source: file.clone(), target: "/run/disks/a".into(), writable }];
        run(&spec)
    };
    assert_eq!(attack("read-file", false), Outcome::Succeeded);
    assert!(matches!(attack("open-for-writing", false), Outcome::Denied(_)));
    assert_eq!(attack("open-for-writing", true), Outcome::Succeeded);
    assert!(matches!(attack("exec", true), Outcome::Killed));
}

#[test]
fn devices_and_scratch_space_are_there_when_asked_for() {
    let host = Host::new();
    for harmless in ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"] {
        assert_eq!(run(&host.spec("open-device", harmless)), Outcome::Succeeded, "{harmless}");
    }
    let mut spec = host.spec("open-device", "/dev/kvm");
    assert!(
        matches!(run(&spec), Outcome::Denied(why) if why.contains("os error 2")),
        "there is no such device"
    );
    spec.kvm = true;
    // Where the host has none, the kernel says so; no layer does.
    assert!(!matches!(run(&spec), Outcome::Denied(why) if why.contains("ermission")));

    let mut spec = host.spec("create-file", "/tmp");
    spec.layers = Layers { seccomp: jail::SeccompLayer::Off, ..Layers::all() };
    assert!(matches!(run(&spec), Outcome::Denied(_)));
    spec.tmp_bytes = Some(4096);
    assert_eq!(run(&spec), Outcome::Succeeded);
}

#[test]
fn the_jail_ends_with_its_parent() {
    let host = Host::new();
    let (mut said, tell) = io::pipe().unwrap();
    // A program that spawns a jail whose program sleeps, tells its number, and is killed.
    let mut parent = Command::new(super::host::entry())
        .args(["spawn-and-hang", &host.base.display().to_string()])
        .arg(&host.program)
        .stdin(Stdio::null())
        .stdout(Stdio::from(OwnedFd::from(tell)))
        .spawn()
        .unwrap();
    let mut text = [0_u8; 16];
    let length = said.read(&mut text).unwrap();
    let pid = Pid::from_raw(String::from_utf8_lossy(&text[..length]).trim().parse().unwrap());
    assert!(runs(pid));
    parent.kill().unwrap();
    parent.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while runs(pid) {
        assert!(Instant::now() < deadline, "{pid} outlives its parent");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_jail_outlives_the_thread_that_spawned_it() {
    let host = Host::new();
    let mut spec = host.spec("hang", "");
    spec.argv.truncate(2);
    spec.argv.push(String::new());
    let jailed =
        std::thread::spawn(move || jail::spawn(&spec, Vec::new(), |_| Ok(())).unwrap()).join().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(runs(jailed.pid));
    jailed.kill(Signal::SIGKILL).unwrap();
    assert!(matches!(end(&jailed), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
}

#[test]
fn roots_are_built_once_and_kept_while_in_use() {
    let host = Host::new();
    let roots = host.base.parent().unwrap();
    assert_eq!(base::prepare(&host.program, &[OTHER_PROGRAM.into()], roots).unwrap(), host.base);
    let other = base::prepare(&host.program, &[], roots).unwrap();
    assert_ne!(other, host.base);
    let jailed = jail::spawn(&host.spec("hang", ""), Vec::new(), |_| Ok(())).unwrap();
    let soon = Duration::from_secs(600);
    assert_eq!(base::collect(roots, &[], soon).unwrap(), 0, "both were just asked for");
    assert_eq!(base::collect(roots, &[], Duration::ZERO).unwrap(), 1, "only the one that is not in use");
    assert!(host.base.is_dir() && !other.exists());
    jailed.kill(Signal::SIGKILL).unwrap();
    end(&jailed);
    drop(jailed);
    assert_eq!(
        base::collect(roots, std::slice::from_ref(&host.base), Duration::ZERO).unwrap(),
        0,
        "it is to be kept"
    );
    assert_eq!(base::collect(roots, &[], Duration::ZERO).unwrap(), 1);
}

#[test]
fn layers_cannot_be_read_from_a_file() {
    let host = Host::new();
    let mut spec = host.spec("nothing", "");
    spec.layers = Layers { seccomp: jail::SeccompLayer::Off, ..Layers::all() };
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<jail::JailSpec>(&text).unwrap().layers, Layers::all());
    let forged = text.replacen('{', "{\"layers\":{\"seccomp\":\"Off\"},", 1);
    assert!(serde_json::from_str::<jail::JailSpec>(&forged).is_err());
}

#[test]
fn nothing_of_the_jail_is_seen_on_the_host() {
    let host = Host::new();
    let jailed = jail::spawn(&host.spec("hang", ""), Vec::new(), |_| Ok(())).unwrap();
    let folder = host.folder.path().display().to_string();
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&folder));
    // Its own mounts are the base, /proc and /dev, in an empty root.
    let mounts =
        fs::read_to_string(Path::new("/proc").join(jailed.pid.to_string()).join("mountinfo")).unwrap();
    let mut points: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    points.sort_unstable();
    assert_eq!(points, ["/", "/dev", "/proc"]);
    jailed.kill(Signal::SIGKILL).unwrap();
    end(&jailed);
}

#[test]
fn a_program_that_cannot_be_executed_is_told_past_the_filter() {
    // The user has more processes than it may: the kernel refuses to execute another one's program.
    for role in [Role::Vmm, Role::ImageMaker] {
        let host = Host::with_role(role);
        let others = [(); 2].map(|()| jail::spawn(&host.spec("hang", ""), Vec::new(), |_| Ok(())).unwrap());
        let mut spec = host.spec("nothing", "");
        spec.rlimits.nproc = 1;
        let error = jail::spawn(&spec, Vec::new(), |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("execute"), "{role:?}: {error}");
        assert!(
            matches!(error, JailError::Step { source, .. } if source.raw_os_error() == Some(libc::EAGAIN))
        );
        for other in &others {
            other.kill(Signal::SIGKILL).unwrap();
            end(other);
        }
    }
}
