//! A whole Debian host in a virtual machine of its own, which a test boots, uses and throws away.
//!
//! The machine that runs the tests may have no KVM, other cgroups, and no AppArmor. This host has them all: QEMU's
//! emulated processor (`accel=tcg`) has AMD's virtualisation, so that the host's own `/dev/kvm` truly runs guests,
//! slowly. Its disk is made once from Debian's packages ([`base`]); what changes from run to run comes on a second disk
//! ([`Load`]). Nothing of the machine is mounted, changed or asked for, and the host's end is the end of one process.

mod base;
mod load;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bailey_host::sys::tsc;

pub use self::base::{Base, SUITES};
pub use self::load::Load;
use crate::process::{Running, shortened};

/// Memory of the host, in MiB: for two sandboxes at a time, with a template each.
const MEMORY_MIB: u32 = 3072;
const PROCESSORS: u32 = 2;
/// All that QEMU can emulate, but for two things. Emulated string moves (`erms`) are slow: without the flag, kernels copy
/// by loops. QEMU 7.2 spoils the flags register on `cmpxchg16b` (`cx16`), on which Linux 6.12 dies.
const PROCESSOR: &str = "max,-erms,-cx16";
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What is left for a host that has used up its time: it is killed.
const END_LIMIT: Duration = Duration::from_secs(1);
/// The last line of a host that has run its program; the exit code follows.
const DONE: &str = "the host is done: ";

/// What a host did.
#[derive(Debug)]
pub struct Outcome {
    /// What its program wrote to both of its outputs.
    pub said: String,
    /// The last lines of its kernel's console.
    pub console: String,
    /// The exit code of its program; none if it did not get that far.
    pub code: Option<i32>,
    /// How long all of it took.
    pub took: Duration,
}

/// Boots a host with this load, lets it run the load's program to its end, and ends it, at the latest after `limit`.
/// `hear` is called with each line that the program writes, soon after.
pub fn run(base: &Base, load: Load, limit: Duration, mut hear: impl FnMut(&str)) -> Result<Outcome> {
    let begun = Instant::now();
    let (folder, disk) = load.into_disk()?;
    let console = folder.path().join("console");
    let mut machine = Running::start(&mut command(base, &disk, &console)).context("starting a host")?;
    let mut heard = 0;
    while !machine.has_ended() && begun.elapsed() < limit {
        std::thread::sleep(LOOK_EVERY);
        let said = machine.heard();
        let lines: Vec<&str> = said.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
        lines.iter().skip(heard).for_each(|line| hear(line.trim_end()));
        heard = lines.len();
    }
    // Whether it ends by itself or not, what it said until then is what there is to know.
    let so_far = machine.heard();
    let said = match machine.wait_open(END_LIMIT) {
        Ok(output) => format!("{}{}", output.text(), output.errors()),
        Err(error) => format!("{so_far}\n{error:#}\n"),
    };
    let code = said.lines().rev().find_map(|line| line.trim().strip_prefix(DONE)?.parse().ok());
    let console = std::fs::read(&console).unwrap_or_default();
    let console = shortened(&String::from_utf8_lossy(&console)).to_owned();
    Ok(Outcome { said, console, code, took: begun.elapsed() })
}

/// QEMU, tied to this process's life. Both disks are thrown away: what the host writes goes to files without names.
fn command(base: &Base, load: &Path, console: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-name", "bailey-test-host"]);
    command.args(["-M", "q35,accel=tcg", "-cpu", PROCESSOR]);
    command.args(["-smp", &PROCESSORS.to_string(), "-m", &MEMORY_MIB.to_string()]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.arg("-kernel").arg(&base.kernel).arg("-initrd").arg(&base.initramfs);
    // The counter's rate is given, since measuring it fails on a busy machine, and the kernel hangs.
    let khz = tsc::measure_khz();
    let line = format!(
        "console=ttyS0 quiet panic=-1 tsc_early_khz={khz} tsc=reliable mitigations=off cryptomgr.notests"
    );
    command.args(["-append", &line]);
    // The first line is the kernel's, the second one what the program says.
    command.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
    for disk in [&base.disk, load] {
        let drive = format!("file={},format=raw,if=virtio,snapshot=on,cache=unsafe", disk.display());
        command.arg("-drive").arg(drive);
    }
    command
}

/// A path in the load as the host sees it.
pub fn inside(path: &str) -> PathBuf {
    Path::new("/mnt").join(path)
}
