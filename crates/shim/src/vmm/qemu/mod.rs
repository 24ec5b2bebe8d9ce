//! QEMU's `microvm` machine, in a jail: with KVM where it works, emulated where not.

pub(crate) mod args;
mod disks;
mod hung;
mod qmp;

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bailey_host::cgroup::Cgroup;
use bailey_host::jail::apparmor::{self, AppArmor, VMM_PROFILE};
use bailey_host::jail::{self, FileMount, JailSpec, Jailed, Profile, Reopen};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

use self::args::{Accel, Descriptors, DiskFile, INITRAMFS, KERNEL, Line, Memory};
use self::hung::Hung;
use self::qmp::Monitor;
use super::console::{self, Tail};
use super::{Description, Disks, Driver, Launch, Machine, Origin, Saved, Shape, memory, threads};
use crate::error::{Context, Error, Kind, Result};

/// Memory that QEMU takes beside the guest's: its own, and under emulation the translated code (`tb-size`).
const OVERHEAD_KVM: u64 = 96 << 20;
const OVERHEAD_TCG: u64 = 224 << 20;

/// What QEMU reads or loads besides its libraries, wherever a distribution puts it.
const DATA: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
    "/usr/share/qemu/bios-microvm.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/seabios/bios-microvm.bin",
];

pub(crate) struct Qemu {
    program: PathBuf,
    /// Where roots for jails are kept.
    roots: PathBuf,
    accel: Accel,
}

impl Qemu {
    pub(crate) fn new(program: &Path, cache: &Path, accel: Accel) -> Qemu {
        Qemu { program: program.to_owned(), roots: cache.join("jail"), accel }
    }

    /// The jail's root: QEMU with its libraries and firmware.
    fn root(&self) -> Result<PathBuf> {
        if !self.program.is_file() {
            let text = format!(
                "there is no QEMU at {}: install Debian's package qemu-system-x86, or set qemu",
                self.program.display()
            );
            return Err(Error::new(Kind::Unavailable, text));
        }
        jail_root(&self.program, &self.roots)
    }
}

/// The jail's root below `roots`, made if need be.
pub(crate) fn jail_root(program: &Path, roots: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(roots).context(|| format!("making {}", roots.display()))?;
    let data: Vec<PathBuf> = DATA.iter().map(PathBuf::from).filter(|path| path.exists()).collect();
    jail::base::prepare(program, &data, roots).context(|| "preparing QEMU's jail".into())
}

#[async_trait]
impl Driver for Qemu {
    fn describe(&self) -> Description {
        let overhead_bytes = if self.accel == Accel::Kvm { OVERHEAD_KVM } else { OVERHEAD_TCG };
        Description { name: "qemu", accel: self.accel.name(), overhead_bytes, late_disks: true }
    }

    async fn launch(&self, launch: Launch<'_>) -> Result<Box<dyn Machine>> {
        let doing = || "starting QEMU".to_owned();
        let pair = || -> io::Result<(StdStream, OwnedFd)> {
            let (ours, theirs) = StdStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((ours, theirs.into()))
        };
        let ((monitor, its_monitor), (channel, its_channel)) =
            (pair().context(doing)?, pair().context(doing)?);
        let (console, its_console) = Tail::listen().context(doing)?;
        let (complaints, its_complaints) = Tail::listen().context(doing)?;
        let mut fds = Descriptors::default();
        let (monitor_fd, channel_fd) = (fds.give(its_monitor), fds.give(its_channel));
        let console_fd = fds.give(its_console);
        let (memory, incoming, template) = origin(launch.origin, launch.shape.memory_bytes, &mut fds)?;
        let disks = launch.disks.map(|disks| disk_files(disks, &mut fds)).transpose()?;
        let taps = launch.taps.into_iter().map(|tap| fds.give(tap)).collect();
        let line = Line {
            name: launch.name,
            shape: launch.shape,
            accel: self.accel,
            memory,
            monitor: monitor_fd,
            channel: channel_fd,
            console: console_fd,
            disks,
            incoming: incoming.is_some(),
            taps,
        };
        let mut spec = JailSpec::new(launch.uid, self.root()?, self.program.clone(), self.profile());
        spec.argv = line.build();
        spec.rlimits.nproc = threads(launch.shape.vcpus);
        spec.kvm = self.accel == Accel::Kvm;
        spec.files = boot_files(launch.shape);
        spec.apparmor = apparmor_profile();
        spec.reopen = match memory {
            Memory::Anonymous => Vec::new(),
            Memory::Shared(fd) | Memory::Private(fd) => vec![Reopen { fd, writable: true }],
        };
        let mut fds = fds.into_inner();
        fds.push((its_complaints, libc::STDERR_FILENO));
        let jailed = spawn(spec, fds, launch.cgroup.clone()).await?;
        let monitor = Mutex::new(Monitor::new(UnixStream::from_std(monitor).context(doing)?));
        let watched = watch(&jailed).context(doing)?;
        let channel = Some(channel);
        let hung = Mutex::new(Hung::new(disks.as_ref()));
        let vm = Vm { jailed, watched, monitor, channel, console, complaints, template, hung };
        if let Some(fd) = incoming {
            let loaded = vm.monitor.lock().await.load(fd).await;
            loaded.map_err(|error| {
                Error::internal(format!("cloning the VM; {}", vm.last_words())).because(error)
            })?;
        }
        Ok(Box::new(vm))
    }
}

impl Qemu {
    fn profile(&self) -> Profile {
        match self.accel {
            Accel::Kvm => Profile::QemuKvm,
            Accel::Tcg { .. } => Profile::QemuTcg,
        }
    }
}

/// The disks' files, by the numbers that their descriptors will have.
fn disk_files(disks: Disks, fds: &mut Descriptors) -> Result<[DiskFile; 2]> {
    let io = disks.io;
    let mut give = |file: File| {
        let bytes = size(&file)?;
        Ok(DiskFile { fd: fds.give(file.into()), bytes, io })
    };
    Ok([give(disks.root)?, give(disks.scratch)?])
}

fn size(file: &File) -> Result<u64> {
    Ok(file.metadata().context(|| "reading the size of a disk".into())?.len())
}

/// The machine's memory, the descriptor of the devices that it starts from, and its memory if it is a template's.
fn origin(
    origin: Origin,
    bytes: u64,
    fds: &mut Descriptors,
) -> Result<(Memory, Option<RawFd>, Option<File>)> {
    Ok(match origin {
        Origin::Boot => (Memory::Anonymous, None, None),
        Origin::Template => {
            let memory = memory::create("bailey-template-memory", bytes)?;
            let shared = memory.try_clone().context(|| "copying a descriptor".into())?;
            (Memory::Shared(fds.give(shared.into())), None, Some(memory))
        }
        Origin::Clone(saved) => {
            let memory = Memory::Private(fds.give(saved.memory.into()));
            (memory, Some(fds.give(saved.devices.into())), None)
        }
    })
}

/// The AppArmor profile that VMMs are put under, where the host has it loaded. The other layers hold without it.
fn apparmor_profile() -> Option<String> {
    let profile = VMM_PROFILE.to_owned();
    match apparmor::look(VMM_PROFILE) {
        AppArmor::Enforced => Some(profile),
        AppArmor::Absent => {
            tracing::debug!("the jail does without AppArmor: the host's kernel has it not, or has it off");
            None
        }
        AppArmor::Otherwise(mode) => {
            tracing::warn!("AppArmor has the profile {profile} loaded to {mode}, not to enforce");
            Some(profile)
        }
        AppArmor::Unusable(why) => {
            tracing::warn!("the jail does without AppArmor: {why}; see docs/shim.md");
            None
        }
    }
}

fn boot_files(shape: &Shape) -> Vec<FileMount> {
    let guest = &shape.guest;
    [(&guest.kernel, KERNEL), (&guest.initramfs, INITRAMFS)]
        .map(|(source, target)| FileMount { source: source.clone(), target: target.into(), writable: false })
        .into()
}

async fn spawn(spec: JailSpec, fds: Vec<(OwnedFd, i32)>, cgroup: Cgroup) -> Result<Jailed> {
    let spawned = tokio::task::spawn_blocking(move || {
        jail::spawn(&spec, fds, |pid| cgroup.add(pid).map_err(Into::into))
    });
    let jailed =
        spawned.await.context(|| "starting QEMU".into())?.context(|| "starting QEMU in its jail".into())?;
    for missing in &jailed.report.missing {
        tracing::debug!("the jail does without: {missing}");
    }
    Ok(jailed)
}

/// A process descriptor in the runtime's event loop. It is no pipe, but all that is asked of it is whether it is
/// readable, and this is the runtime's only wrapper that takes any descriptor safely.
fn watch(jailed: &Jailed) -> io::Result<pipe::Receiver> {
    pipe::Receiver::from_file_unchecked(File::from(jailed.pidfd.try_clone()?))
}

/// A QEMU in its jail.
struct Vm {
    jailed: Jailed,
    /// Becomes readable when the process ends.
    watched: pipe::Receiver,
    monitor: Mutex<Monitor>,
    channel: Option<StdStream>,
    console: Tail,
    complaints: Tail,
    /// Its memory, if it will be saved.
    template: Option<File>,
    hung: Mutex<Hung>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        // It has been reaped already, or is about to be.
        let _reaped = self.jailed.wait();
    }
}

#[async_trait]
impl Machine for Vm {
    fn pid(&self) -> u32 {
        self.jailed.pid.as_raw().cast_unsigned()
    }

    async fn channel(&mut self) -> Result<UnixStream> {
        let stream =
            self.channel.take().ok_or_else(|| Error::internal("the guest's channel was taken already"))?;
        UnixStream::from_std(stream).context(|| "opening the guest's channel".into())
    }

    async fn pause(&self) -> Result<()> {
        self.monitor.lock().await.ask("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        self.monitor.lock().await.ask("cont", json!({})).await.map(drop)
    }

    async fn set_disks(&self, disks: Disks) -> Result<()> {
        let mut monitor = self.monitor.lock().await;
        self.hung.lock().await.replace(&mut monitor, &disks).await
    }

    async fn save(&self) -> Result<Saved> {
        let memory = self.template.as_ref().ok_or_else(|| Error::internal("only a template can be saved"))?;
        let memory = memory.try_clone().context(|| "copying a descriptor".into())?;
        let devices = memory::create("bailey-template-devices", 0)?;
        {
            let mut monitor = self.monitor.lock().await;
            monitor.ask("stop", json!({})).await?;
            monitor.save(&devices).await?;
        }
        // Sealing needs that nobody has it mapped for writing any more.
        self.kill();
        self.ended().await;
        memory::seal(&memory)?;
        memory::seal(&devices)?;
        Ok(Saved { memory, devices })
    }

    fn kill(&self) {
        // It has ended already, which is as good.
        let _ended = self.jailed.kill(Signal::SIGKILL);
    }

    async fn ended(&self) -> String {
        if let Err(error) = self.watched.readable().await {
            return format!("QEMU could not be watched: {error}");
        }
        self.console.drained().await;
        self.complaints.drained().await;
        match self.jailed.wait() {
            Ok(status) => format!("QEMU ended: {}", describe(status)),
            Err(_) => "QEMU has ended".to_owned(),
        }
    }

    fn last_words(&self) -> String {
        console::last_words(&self.complaints, &self.console)
    }
}

fn describe(status: nix::sys::wait::WaitStatus) -> String {
    use nix::sys::wait::WaitStatus;
    match status {
        WaitStatus::Exited(_, code) => format!("exit code {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
        other => format!("{other:?}"),
    }
}
