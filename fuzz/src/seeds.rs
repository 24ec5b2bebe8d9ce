//! Inputs to begin with: small ones, of each kind that there is. They are made, not kept, so that they follow the
//! protocol when it changes.

use std::path::PathBuf;

use bailey_types::guest::ProcessId;
use bailey_types::guest::frame::{CONTROL, encode as frame};
use bailey_types::guest::message::{
    ErrorKind, FromGuest, GuestError, Request, Response, Stats, ToGuest, encode,
};
use bailey_types::guest::spec::{
    Capabilities, Container, Extent, InjectedFile, Limits, Mount, Process, Rlimit, RootDisk, Scratch, Setup,
};

use crate::frames::BOUNDS;

/// Names the folder that the seeds are written to.
const FOLDER: &str = "BAILEY_FUZZ_SEEDS";

/// Writes the seeds to the folder that the environment names, if it names one.
///
/// # Panics
/// When one cannot be written, or the target does not accept it: then it would be a seed of errors only.
pub fn write(seeds: &[Vec<u8>], accepts: fn(&[u8]) -> bool) {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    for (number, seed) in seeds.iter().enumerate() {
        assert!(accepts(seed), "seed {number} is refused: {seed:?}");
        let path = folder.join(format!("seed-{number}"));
        std::fs::write(&path, seed).unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
    }
}

/// Streams of a few frames, for each bound, cut in several ways.
pub fn frames() -> Vec<Vec<u8>> {
    let cuts: [&[u8]; 4] = [&[], &[0], &[6, 0, 8], &[255, 30]];
    let mut seeds = Vec::new();
    for (bound, max) in (0..).zip(BOUNDS) {
        for cuts in cuts {
            let mut seed = vec![bound, u8::try_from(cuts.len()).unwrap_or_default()];
            seed.extend_from_slice(cuts);
            frame(CONTROL, &encode(&FromGuest::OutOfMemory)[..max.min(1)], &mut seed);
            frame(4 | 1, &vec![b'x'; max.min(300)], &mut seed);
            frame(4 | 1, &[], &mut seed);
            seeds.push(seed);
        }
    }
    seeds
}

/// Every message of a guest.
pub fn from_guest() -> Vec<Vec<u8>> {
    let id = ProcessId::INIT;
    let error = GuestError { kind: ErrorKind::NotFound, text: "no such process".into() };
    let results = [
        Ok(Response::Done),
        Ok(Response::Started { pid: 77 }),
        Ok(Response::Pids(vec![1, 300, 70_000])),
        Ok(Response::Stats(Stats { memory_bytes: 1 << 40, ..Stats::default() })),
        Err(error),
    ];
    let mut messages = vec![
        FromGuest::Ready { version: bailey_types::guest::VERSION },
        FromGuest::Exited { id, status: 137 },
        FromGuest::OutOfMemory,
        FromGuest::Credit { channel: 4, bytes: 65_536 },
    ];
    messages.extend(results.map(|result| FromGuest::Reply { seq: 300, result }));
    messages.iter().map(encode).collect()
}

/// Every message of a host.
pub fn to_guest() -> Vec<Vec<u8>> {
    let id = ProcessId(2);
    let requests = [
        Request::Rehearse { setup: Box::new(setup()), container: Box::new(container()) },
        Request::Setup(Box::new(setup())),
        Request::Create(Box::new(container())),
        Request::Start,
        Request::Exec { id, process: Box::new(process()) },
        Request::Signal { id, signal: -9, all: true },
        Request::Resize { id, columns: 80, rows: 25 },
        Request::Pids,
        Request::Stats,
        Request::Update(limits()),
        Request::Clock { realtime_ns: u64::MAX },
    ];
    let mut messages = vec![ToGuest::Credit { channel: 5, bytes: 1 }];
    messages.extend((1..).zip(requests).map(|(seq, request)| ToGuest::Request { seq, request }));
    messages.iter().map(encode).collect()
}

/// A text of each kind of id, and those at the ends of what is allowed.
pub fn ids() -> Vec<Vec<u8>> {
    let longest = "a".repeat(40);
    let texts = ["a1", "acme-2", &longest, "abcdefgh2345", "abcdefghijklmnop2345"];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

fn setup() -> Setup {
    Setup {
        entropy: [7; 32],
        realtime_ns: 1 << 60,
        hostname: "h".into(),
        root: RootDisk { data_blocks: 300, root_hash: [1; 32], salt: [2; 32] },
        scratch: Scratch {
            bytes: 1 << 30,
            filesystem: vec![Extent { offset: 1024, data: vec![0x53, 0xef], zeros: 4096 }],
        },
    }
}

fn container() -> Container {
    Container {
        hostname: Some("c".into()),
        readonly_root: true,
        mounts: vec![Mount {
            kind: "proc".into(),
            source: "proc".into(),
            target: "/proc".into(),
            options: vec!["nosuid".into()],
        }],
        files: vec![InjectedFile {
            target: "/etc/hosts".into(),
            mode: 0o644,
            data: b"::1".to_vec(),
            readonly: false,
        }],
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        sysctls: vec![("kernel.shm_rmid_forced".into(), "1".into())],
        all_devices: false,
        init: true,
        limits: limits(),
        process: process(),
    }
}

fn limits() -> Limits {
    Limits { memory_bytes: Some(1 << 28), pids: Some(100), ..Limits::default() }
}

fn process() -> Process {
    Process {
        args: vec!["sh".into()],
        env: vec!["A=b".into()],
        cwd: "/".into(),
        uid: 1000,
        gid: 1000,
        groups: vec![7],
        umask: Some(0o22),
        capabilities: Capabilities { bounding: 0xa80_425fb, ..Capabilities::default() },
        no_new_privileges: true,
        rlimits: vec![Rlimit { resource: 7, soft: 1024, hard: u64::MAX }],
        oom_score_adj: Some(-5),
        terminal: Some((80, 25)),
        stdin: true,
        stdout: true,
        stderr: false,
    }
}
