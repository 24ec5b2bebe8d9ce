//! A false jailer and a false Firecracker, as processes: this test program, started by a script that stands where
//! the real jailer would. The false Firecracker holds every request against the published API ([`table`]) and has
//! the real one's side effects as far as the driver sees them: it opens what it is told to, refuses what comes in
//! the wrong order, and has a guest behind its vsock.

mod guest;
mod jailer;
mod server;
mod table;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use self::jailer::Arguments;
use super::parent::tests::exit;

/// How the false Firecracker misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Good,
    /// The jailer fails.
    Jailer,
    /// The process ends before it listens.
    Dies,
    /// It never listens.
    Deaf,
    /// It is of this version.
    Old,
    /// It refuses to boot, for want of KVM.
    NoKvm,
    /// It refuses the scratch disk.
    Refuses,
    /// It crashes at `/boot-source`, with a word why.
    Crashes,
    /// From `/boot-source` on it never answers,
    Silent,
    /// or closes the connection,
    Closes,
    /// or answers with nonsense,
    Garbage,
    /// or with headers without end.
    Huge,
    /// The guest takes half a second to listen,
    Slow,
    /// or never does.
    Never,
    /// The vsock answers with nonsense,
    BadVsock,
    /// or is a link to a socket of the host.
    Link,
}

const MODES: [Mode; 16] = [
    Mode::Good,
    Mode::Jailer,
    Mode::Dies,
    Mode::Deaf,
    Mode::Old,
    Mode::NoKvm,
    Mode::Refuses,
    Mode::Crashes,
    Mode::Silent,
    Mode::Closes,
    Mode::Garbage,
    Mode::Huge,
    Mode::Slow,
    Mode::Never,
    Mode::BadVsock,
    Mode::Link,
];

/// Where the link of [`Mode::Link`] leads to, in the folder of the false programs.
pub(super) const TRAP: &str = "trap.sock";

/// The false programs, in a folder of their own.
pub(super) struct Programs {
    pub(super) firecracker: PathBuf,
    pub(super) jailer: PathBuf,
    log: PathBuf,
}

impl Programs {
    pub(super) fn make(folder: &Path, mode: Mode) -> Programs {
        let programs = Programs {
            firecracker: folder.join("firecracker"),
            jailer: folder.join("jailer"),
            log: folder.join("log"),
        };
        fs::write(&programs.firecracker, "the false one is in the jailer").unwrap();
        File::create(&programs.log).unwrap();
        let (this, log) = (std::env::current_exe().unwrap(), programs.log.display());
        let entry = "vmm::firecracker::fake::entry";
        let script = format!(
            "#!/bin/sh\nexec '{}' --exact --nocapture {entry} -- '{mode:?}' '{log}' \"$@\"\n",
            this.display()
        );
        fs::write(&programs.jailer, script).unwrap();
        fs::set_permissions(&programs.jailer, fs::Permissions::from_mode(0o755)).unwrap();
        programs
    }

    /// What happened so far, line by line.
    pub(super) fn log(&self) -> Vec<String> {
        fs::read_to_string(&self.log).unwrap().lines().map(str::to_owned).collect()
    }
}

/// What the false programs write down, opened before the jail is entered.
struct Log(Mutex<File>);

impl Log {
    fn add(&self, line: &str) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// What stands after `--` makes this test the false jailer, and then the false Firecracker.
#[test]
fn entry() {
    let mut words = std::env::args().skip_while(|word| word != "--").skip(1);
    let (Some(mode), Some(log)) = (words.next(), words.next()) else { return };
    let mode = MODES.into_iter().find(|known| format!("{known:?}") == mode).unwrap();
    let trap = Path::new(&log).with_file_name(TRAP);
    let log = Log(Mutex::new(File::options().append(true).open(log).unwrap()));
    match jail(mode, words, &log) {
        Ok(extra) => server::run(mode, &extra, log, &trap),
        Err(error) => {
            writeln!(std::io::stderr(), "Jailer error: {error}").unwrap();
            exit(1);
        }
    }
}

fn jail(mode: Mode, words: impl Iterator<Item = String>, log: &Log) -> Result<Vec<String>, String> {
    let words: Vec<String> = words.collect();
    log.add(&format!("jailer {}", words.join(" ")));
    let arguments = Arguments::parse(words.into_iter())?;
    if mode == Mode::Jailer {
        return Err("Failed to mknod /dev/kvm".into());
    }
    let interfaces = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let interfaces: Vec<&str> =
        interfaces.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
    log.add(&format!("pid {} interfaces {}", std::process::id(), interfaces.join(" ")));
    let found = arguments.enter()?;
    log.add(&format!("jail {found}"));
    Ok(arguments.extra)
}
