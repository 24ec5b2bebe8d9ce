//! The sandbox's cgroup holds alone: a taken-over VMM, with the limits and filters of its own process off, eats what
//! it can, and the next sandbox has what it had.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use bailey_host::block::Disk;
use bailey_host::cgroup::{Cgroup, IoLimits, Limits};
use bailey_host::jail::{self, JailSpec, Jailed, Layers, SeccompLayer};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::host::{Host, end};

const MIB: u64 = 1 << 20;
const PERIOD_US: u64 = 100_000;

/// A cgroup for one test, removed at its end.
struct Group(Cgroup);

impl Group {
    fn new(host: &Host, name: &str, limits: &Limits) -> Self {
        let group = Cgroup::at(Path::new(&format!("/bailey-jail-test-{}-{name}", host.user))).unwrap();
        group.create().unwrap();
        group.set(limits).unwrap();
        Self(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.0.remove().expect("remove the test's cgroup");
    }
}

/// No layer that bounds what the process takes: neither limits nor filter nor a user with a limit.
fn unbounded(host: &Host, attack: &str, target: &str) -> JailSpec {
    let mut spec = host.spec(attack, target);
    spec.layers = Layers { rlimits: false, seccomp: SeccompLayer::Off, ..Layers::all() };
    spec
}

/// Starts the stand-in in a cgroup.
fn start(spec: &JailSpec, group: &Group) -> (Jailed, io::PipeReader) {
    let (said, tell) = io::pipe().unwrap();
    let add = |pid| group.0.add(pid).map_err(Into::into);
    (jail::spawn(spec, vec![(OwnedFd::from(tell), 3)], add).unwrap(), said)
}

/// Runs the stand-in in a cgroup to its end: what it said, and how it ended.
fn run(spec: &JailSpec, group: &Group) -> (String, WaitStatus) {
    let (jailed, mut said) = start(spec, group);
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    (text, end(&jailed))
}

/// A neighbour that runs all the time, in a cgroup of its own; the attack must not take anything from it.
fn beside_a_neighbour(host: &Host, attack: impl FnOnce()) {
    let group = Group::new(host, "neighbour", &Limits { memory_bytes: Some(64 * MIB), ..Limits::default() });
    let (neighbour, _said) = start(&host.spec("spin", ""), &group);
    let before = group.0.usage();
    attack();
    let deadline = Instant::now() + Duration::from_secs(60);
    // It goes on: it uses processor time, is alone in its cgroup, and nothing of it was killed.
    while group.0.usage().cpu_us <= before.cpu_us {
        assert!(Instant::now() < deadline, "the neighbour stands still");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((group.0.usage().pids, group.0.oom_kills()), (1, 0));
    neighbour.kill(Signal::SIGKILL).unwrap();
    assert!(matches!(end(&neighbour), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
}

#[test]
fn memory_is_bounded_by_the_cgroup_alone() {
    let host = Host::new();
    beside_a_neighbour(&host, || {
        let spec = unbounded(&host, "eat-memory", "256");
        let limits = |mib| Limits { memory_bytes: Some(mib * MIB), ..Limits::default() };
        let wide = Group::new(&host, "wide", &limits(512));
        assert_eq!(run(&spec, &wide).0, "succeeded", "so nothing but the cgroup stops it");
        let narrow = Group::new(&host, "narrow", &limits(64));
        let (said, status) = run(&spec, &narrow);
        assert_eq!((said.as_str(), narrow.0.oom_kills()), ("", 1));
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}");
    });
}

#[test]
fn open_descriptors_are_bounded_by_the_memory_of_the_cgroup() {
    let host = Host::new();
    beside_a_neighbour(&host, || {
        // Fewer than any host lets a process have, and more than fit into the memory of the narrow cgroup.
        let spec = unbounded(&host, "open-memory-files", "15000");
        let limits = |mib| Limits { memory_bytes: Some(mib * MIB), ..Limits::default() };
        let wide = Group::new(&host, "wide", &limits(256));
        assert_eq!(run(&spec, &wide).0, "succeeded", "so nothing but the cgroup stops it");
        let narrow = Group::new(&host, "narrow", &limits(8));
        let (said, status) = run(&spec, &narrow);
        // The kernel kills it, or refuses it the next descriptor.
        let killed =
            matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)) && narrow.0.oom_kills() == 1;
        assert!(killed || said.contains("os error 12"), "{said}, {status:?}");
    });
}

#[test]
fn processes_are_bounded_by_the_cgroup_alone() {
    let host = Host::new();
    beside_a_neighbour(&host, || {
        let spec = unbounded(&host, "fork-many", "200");
        let limits = |pids| Limits { pids: Some(pids), ..Limits::default() };
        let wide = Group::new(&host, "wide", &limits(300));
        assert_eq!(run(&spec, &wide).0, "succeeded", "so nothing but the cgroup stops it");
        let narrow = Group::new(&host, "narrow", &limits(81));
        let (said, _) = run(&spec, &narrow);
        assert!(said.contains("os error 11"), "{said}");
        // The host has processes left for everybody else.
        assert!(std::process::Command::new("true").status().unwrap().success());
    });
}

#[test]
fn processor_time_is_bounded_by_the_cgroup_alone() {
    let host = Host::new();
    beside_a_neighbour(&host, || {
        let (quota_us, watched) = (20_000, Duration::from_secs(2));
        let limits =
            Limits { cpu_quota_us: Some(quota_us), cpu_period_us: Some(PERIOD_US), ..Limits::default() };
        let group = Group::new(&host, "narrow", &limits);
        let spinning = [(); 3].map(|()| start(&unbounded(&host, "spin", ""), &group).0);
        let (begun, before) = (Instant::now(), group.0.usage().cpu_us);
        std::thread::sleep(watched);
        let used = group.0.usage().cpu_us - before;
        // The kernel fills a quota up at the beginning of each period, so one more may have begun; and each processor
        // may hold a slice of 5 ms that it has not given back.
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
        let elapsed = u64::try_from(begun.elapsed().as_micros()).unwrap();
        let most = (elapsed / PERIOD_US + 2) * quota_us + processors * 5_000;
        assert!(used <= most, "{used} us in {elapsed} us, at most {most}");
        assert!(used > quota_us, "they ran: {used} us");
        for one in &spinning {
            one.kill(Signal::SIGKILL).unwrap();
            end(one);
        }
    });
}

/// What one writer and one reader move past the kernel's cache, in bytes, and how slowly they are to do it.
const MOVED: u64 = 2 * MIB;
const RATE: u64 = MIB;

#[test]
fn the_rate_of_a_disk_is_bounded_by_the_cgroup() {
    let host = Host::new();
    let folder = host.folder.path();
    let Some(disk) = Disk::of(folder).unwrap() else {
        eprintln!("SKIPPED: {} is on no disk", folder.display());
        return;
    };
    let file = folder.join("moved");
    // What a taken-over VMM could do: its own limits of I/O are off.
    let write = format!("dd if=/dev/zero of={} bs=64k count=32 oflag=direct conv=fsync", file.display());
    let read = format!("dd if={} of=/dev/null bs=64k count=32 iflag=direct", file.display());
    let limited = IoLimits { read_bytes: Some(RATE), write_bytes: Some(RATE), ..IoLimits::default() };
    for (name, limits) in [("free", IoLimits::default()), ("bound", limited)] {
        let group = Group::new(&host, &format!("io-{name}"), &Limits::default());
        group.0.set_io(disk, &limits).unwrap();
        for command in [&write, &read] {
            let begun = Instant::now();
            run_in(&group, command);
            // The kernel lets the first tenth of a second through.
            let least = Duration::from_millis(MOVED * 1000 / RATE * 3 / 4);
            let took = begun.elapsed();
            if name == "bound" {
                assert!(took >= least, "{command}: {took:?}");
            }
        }
    }
}

/// Runs a command in a cgroup, which must succeed.
fn run_in(group: &Group, command: &str) {
    let mut shell = std::process::Command::new("sh");
    // It waits until it is in the cgroup.
    shell.args(["-c", &format!("read _go && exec {command}")]);
    shell.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let mut child = shell.spawn().unwrap();
    group.0.add(nix::unistd::Pid::from_raw(child.id().cast_signed())).unwrap();
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"go\n").unwrap();
    drop(input);
    assert!(child.wait().unwrap().success(), "{command}");
}
