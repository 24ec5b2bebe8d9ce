//! What the platform adds to a cold start (goal P1): our shim from its order to the guest's greeting, beside a bare
//! QEMU with the same kernel, initramfs, flags and disks from exec to the first byte of the same greeting.
//!
//! `tax [ROUNDS]`. The bare QEMU's command line is that of a running sandbox, with sockets and files in place of the
//! descriptors that only the jail has. The shim's times are those that it logs: its order is taken as accepted once the
//! specification is read and the image is there.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use bailey_bench::figures::{Samples, milliseconds};
use bailey_bench::machine::{log_steps, logged};
use bailey_bench::meter::children_ms;
use bailey_bench::{count, say, say_machine};
use bailey_e2e::images::{self, Image};
use bailey_e2e::machine::{self, Machine};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const COLD: (&str, &str) = ("dev.bailey.start", "cold");
/// What the shim logs of a start, each followed by how long after the order it was.
const STEPS: [&str; 2] = ["prepared after ", "a VM runs after "];
/// The sockets of the command line: each is a character device.
const SOCKETS: [&str; 3] = ["monitor", "console", "channel"];

#[derive(Default)]
struct Figures {
    bare: Samples,
    bare_cpu: Samples,
    ours: Samples,
    /// The part of ours before QEMU is started.
    prepared: Samples,
}

fn main() -> Result<()> {
    let rounds = count(9)?;
    say_machine();
    machine::test_with(&images::busybox(), |machine, image| {
        log_steps(machine)?;
        let folder = machine.containerd.folder().to_owned();
        let bare = Bare::of_running(machine, image, &folder)?;
        let mut figures = Figures::default();
        for round in 0..=rounds {
            let (wall, cpu) = bare.boot()?;
            let [prepared, ours] = cold_start(machine, image)?;
            // The first round fills caches.
            if round > 0 {
                figures.bare.add_time(wall);
                figures.bare_cpu.add(cpu);
                figures.prepared.add_time(prepared);
                figures.ours.add_time(ours);
            }
        }
        report(rounds, &bare, &figures);
        Ok(())
    })
}

fn report(rounds: usize, bare: &Bare, figures: &Figures) {
    let Figures { bare: alone, bare_cpu, ours, prepared } = figures;
    let tax = ours.with(alone, |ours, bare| ours - bare);
    let ratio = ours.median() / alone.median();
    let ratios = ours.with(alone, |ours, bare| ours / bare);
    say(format_args!("accelerator: {}", bare.option("-accel").unwrap_or("?")));
    say(format_args!("{rounds} rounds in turns; milliseconds: median, min, max"));
    say(format_args!("  bare QEMU, exec to greeting      {alone}"));
    say(format_args!("  its processor time               {bare_cpu}"));
    say(format_args!("  Bailey cold, order to greeting   {ours}"));
    say(format_args!("  of it before QEMU is started     {prepared}"));
    say(format_args!("  tax: differences of the rounds   {tax}"));
    say(format_args!("  difference of the medians        {:8.1}", ours.median() - alone.median()));
    let (low, high) = (ratios.min(), ratios.max());
    say(format_args!("  ratio of the medians {ratio:.3}; ratios of the rounds {low:.3} to {high:.3}"));
}

/// Runs a sandbox that boots, and gives what the shim logged of it.
fn cold_start(machine: &Machine, image: &Image) -> Result<[Duration; 2]> {
    logged(machine, STEPS, || {
        machine.run(image).annotation(COLD.0, COLD.1).args(&["/bin/true"]).output()?.success().map(drop)
    })
}

/// A QEMU without a platform around it.
struct Bare {
    args: Vec<String>,
    listeners: Vec<(&'static str, UnixListener)>,
    /// The running sandbox's disks, which have no names.
    disks: Vec<File>,
}

impl Bare {
    /// The same as a sandbox that is started for this, and ended.
    fn of_running(machine: &Machine, image: &Image, folder: &Path) -> Result<Self> {
        let mut task = machine.run(image).annotation(COLD.0, COLD.1).args(&["sleep", "1000"]).start()?;
        let pid = task.pid()?.ok_or_else(|| anyhow!("containerd knows no process"))?;
        let made = Self::of_process(&pid, folder);
        task.end()?;
        made
    }

    fn of_process(pid: &str, folder: &Path) -> Result<Self> {
        let line = fs::read(format!("/proc/{pid}/cmdline")).context("reading QEMU's command line")?;
        let line = String::from_utf8_lossy(&line);
        let found: Vec<&str> = line.split('\0').filter(|arg| !arg.is_empty()).collect();
        if found.first() != Some(&"qemu") {
            bail!("process {pid} is no QEMU: {found:?}");
        }
        let mut bare = Self { args: Vec::new(), listeners: Vec::new(), disks: Vec::new() };
        for pair in found[1..].chunk_by(|_, next| !next.starts_with('-')) {
            bare.take(pid, pair, folder)?;
        }
        if bare.listeners.len() != SOCKETS.len() {
            bail!("QEMU's command line has other sockets: {found:?}");
        }
        Ok(bare)
    }

    /// Takes over one option and its value.
    fn take(&mut self, pid: &str, option: &[&str], folder: &Path) -> Result<()> {
        let (name, mut value) = (option[0], option.get(1).map(|value| (*value).to_owned()));
        match (name, value.as_deref()) {
            ("-add-fd", _) => return Ok(()),
            ("-chardev", Some(text)) => {
                let socket = SOCKETS.into_iter().find(|id| text.contains(&format!("id={id},")));
                let socket = socket.ok_or_else(|| anyhow!("an unknown socket: {text}"))?;
                let path = folder.join(format!("bare-{socket}"));
                let listener = UnixListener::bind(&path).context("listening for QEMU")?;
                self.listeners.push((socket, listener));
                value = Some(format!("socket,id={socket},path={}", path.display()));
            }
            ("-blockdev", Some(text)) if text.contains("/dev/fdset/") => {
                let mut node: Value = serde_json::from_str(text).context("reading a disk of QEMU's")?;
                let disk = disk_of(pid, node["read-only"] != true)?;
                let name = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
                self.disks.push(disk);
                node["filename"] = name.into();
                value = Some(node.to_string());
            }
            ("-kernel" | "-initrd", Some(text)) => {
                let copy = folder.join(format!("bare{name}"));
                fs::copy(format!("/proc/{pid}/root{text}"), &copy)
                    .with_context(|| format!("copying {text}"))?;
                value = Some(copy.display().to_string());
            }
            _ => {}
        }
        self.args.push(name.to_owned());
        self.args.extend(value);
        Ok(())
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.args.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].as_str())
    }

    /// Boots it until the first byte from the guest, and ends it; gives the time and the processor time until then.
    fn boot(&self) -> Result<(Duration, f64)> {
        let before = children_ms()?;
        let begun = Instant::now();
        let mut qemu = Command::new(QEMU);
        qemu.args(&self.args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut qemu = Killed(qemu.spawn().context("starting QEMU")?);
        let mut streams = Vec::new();
        for (name, listener) in &self.listeners {
            streams.push((*name, accept(listener, &mut qemu.0)?));
        }
        let channel = streams.iter_mut().find(|(name, _)| *name == "channel");
        let (_, channel) = channel.ok_or_else(|| anyhow!("QEMU has no channel"))?;
        channel.set_read_timeout(Some(LIMIT)).context("waiting for the guest")?;
        channel.read_exact(&mut [0]).context("waiting for the guest's greeting")?;
        let wall = begun.elapsed();
        drop(qemu);
        Ok((wall, children_ms()? - before))
    }
}

/// The disk of a running QEMU: the only file that it has open for reading alone, or for writing, too.
fn disk_of(pid: &str, writable: bool) -> Result<File> {
    let folder = format!("/proc/{pid}/fd");
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))?.flatten() {
        let is_file = fs::metadata(entry.path()).is_ok_and(|data| data.is_file());
        let info = Path::new("/proc").join(pid).join("fdinfo").join(entry.file_name());
        let info = fs::read_to_string(&info).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default().trim();
        // The last octal digit is the access mode: 0 for reading, 2 for both.
        let mode = if writable { '2' } else { '0' };
        if is_file && flags.ends_with(mode) {
            let disk = File::options().read(true).write(writable).open(entry.path());
            return disk.with_context(|| format!("opening a disk of {pid}"));
        }
    }
    bail!("process {pid} has no disk that is {}", if writable { "writable" } else { "read-only" })
}

/// A process that is killed and asked for its end with this value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It has ended already, which is as good.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Waits for QEMU at one of its sockets, but not if it has ended.
fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<std::os::unix::net::UnixStream> {
    listener.set_nonblocking(true).context("listening for QEMU")?;
    let begun = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).context("listening for QEMU")?;
                return Ok(stream);
            }
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                return Err(error).context("listening for QEMU");
            }
            Err(_) => {}
        }
        if let Some(status) = qemu.try_wait().context("looking at QEMU")? {
            bail!("QEMU ended: {status}");
        }
        if begun.elapsed() > LIMIT {
            bail!("QEMU did not connect within {:.0} ms", milliseconds(LIMIT));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
