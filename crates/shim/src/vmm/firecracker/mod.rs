//! Firecracker, under its own jailer, driven over its API socket. It needs KVM.
//!
//! What Firecracker works on has names: it opens disks, kernel and saved states by path, in the jail. On the host
//! they have none: the jail is a file system in memory that only the VMM's processes see ([`place`]), disks are
//! mounted into it by their descriptors ([`disks`]), and a template's files are in a mount namespace that no process
//! is in ([`store`]). So all of it goes with the process that stands above Firecracker ([`parent`]), which goes with
//! the shim, and nothing has to be cleaned up after a shim that was killed.
//!
//! Must never follow a path that Firecracker can have changed, nor wait for it without a limit: its guest may have
//! taken it over.

mod api;
mod disks;
#[cfg(test)]
mod fake;
pub(crate) mod parent;
mod place;
mod requests;
mod store;
#[cfg(test)]
mod tests;
mod vsock;

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bailey_host::cgroup::Cgroup;
use nix::unistd::Pid;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use self::api::{Api, Request};
use self::disks::Names;
use self::parent::{Entry, Order, Parent};
use self::place::{Bind, Place, Root};
use self::requests::{API, DEVICES, INITRAMFS, KERNEL, MEMORY, ROOT, SCRATCH};
use self::store::{Store, Trees};
use super::console::{self, Tail};
use super::{Description, Driver, Launch, Machine, Origin, Saved, Shape};
use crate::bundle::IoLimits;
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};

/// Memory that Firecracker, the copy of its program, and the process above it take beside the guest's.
const OVERHEAD: u64 = 64 << 20;

/// Longest wait for Firecracker to answer, and to save or load a VM: with its memory, that depends on the host.
const ANSWER: Duration = Duration::from_secs(10);
const WHOLE_VM: Duration = Duration::from_secs(120);

/// How long one that has broken off its API may take to end.
const ENDING: Duration = Duration::from_millis(200);

pub(crate) struct Firecracker {
    program: PathBuf,
    jailer: PathBuf,
    /// Where jails are mounted; on the host it stays empty.
    place: PathBuf,
    /// Where disks have names for a moment: on the file system of the disks.
    names: PathBuf,
    /// Longest time that a guest may take until it listens.
    boot_timeout: Duration,
    answer_timeout: Duration,
    entry: Entry,
}

impl Firecracker {
    pub(crate) fn new(config: &Config) -> Result<Firecracker> {
        let find = |key: &str, path: Option<&PathBuf>| {
            let text = || {
                let at = path.map_or("any place that is set".into(), |path| path.display().to_string());
                format!("there is no {key} at {at}: install a Firecracker release, or set {key}")
            };
            // The jailer names the jail after the program's true name.
            let found = path.and_then(|path| path.canonicalize().ok()).filter(|path| path.is_file());
            found.ok_or_else(|| Error::new(Kind::Unavailable, text()))
        };
        Ok(Firecracker {
            program: find("firecracker", config.firecracker.as_ref())?,
            jailer: find("jailer", config.jailer.as_ref())?,
            place: config.state_dir.join("firecracker"),
            names: config.cache_dir.join("firecracker"),
            boot_timeout: config.boot_timeout,
            answer_timeout: ANSWER,
            entry: parent::entry(),
        })
    }

    /// The jail's name. Its user is leased to this VM alone.
    fn id(uid: u32) -> String {
        format!("vm-{uid}")
    }

    /// The jail's root, where the jailer makes it.
    fn root(&self, uid: u32) -> PathBuf {
        let program = self.program.file_name().unwrap_or_default();
        self.place.join(program).join(Firecracker::id(uid)).join("root")
    }

    /// The jailer's arguments, and Firecracker's.
    fn arguments(&self, uid: u32, cgroup: &Cgroup) -> Vec<OsString> {
        let (id, uid) = (OsString::from(Firecracker::id(uid)), OsString::from(uid.to_string()));
        let mut arguments: Vec<OsString> = vec!["--id".into(), id];
        let mut add = |flag: &str, value: &Path| arguments.extend([flag.into(), value.into()]);
        add("--exec-file", &self.program);
        add("--uid", Path::new(&uid));
        add("--gid", Path::new(&uid));
        add("--chroot-base-dir", &self.place);
        match cgroup.unified() {
            None => add("--cgroup-version", Path::new("1")),
            // Without this it would look for a cgroup of its own choice to move to.
            Some(path) => {
                add("--cgroup-version", Path::new("2"));
                add("--parent-cgroup", &path);
            }
        }
        arguments.extend(["--", "--api-sock", API, "--level", "Warning"].map(OsString::from));
        arguments
    }
}

#[async_trait]
impl Driver for Firecracker {
    fn describe(&self) -> Description {
        Description { name: "firecracker", accel: "kvm", overhead_bytes: OVERHEAD, late_disks: false }
    }

    async fn launch(&self, launch: Launch<'_>) -> Result<Box<dyn Machine>> {
        if !launch.taps.is_empty() {
            let text = "Firecracker opens taps by name and takes none that is open: \
                        set vmm = \"qemu\" for sandboxes with a network";
            return Err(Error::new(Kind::Unavailable, text));
        }
        let io = launch.disks.as_ref().map_or_else(IoLimits::default, |disks| disks.io);
        let plan = match launch.origin {
            Origin::Clone(_) => requests::load(io),
            Origin::Boot | Origin::Template => requests::boot(launch.shape, io)?,
        };
        let doing = || "starting Firecracker".to_owned();
        let (console, stdout) = Tail::listen().context(doing)?;
        let (complaints, stderr) = Tail::listen().context(doing)?;
        let order = Order {
            entry: self.entry.clone(),
            program: self.jailer.clone(),
            arguments: self.arguments(launch.uid, launch.cgroup),
            stdout,
            stderr,
        };
        let parts = Parts::of(self, &launch);
        let (cgroup, origin, disks) = (launch.cgroup.clone(), launch.origin, launch.disks);
        let started = tokio::task::spawn_blocking(move || {
            let (place, store) = parts.gather(origin, disks)?;
            let (parent, root, mut release) = parent::start(order, || place.make())?;
            cgroup.add(Pid::from_raw(parent.pid.cast_signed())).context(|| "limiting Firecracker".into())?;
            release.write_all(b"1").context(|| "releasing the process above Firecracker".into())?;
            Ok((parent, root, store))
        });
        let (parent, root, store) = started
            .await
            .context(doing)?
            .map_err(|error: Error| Error::new(error.kind(), doing()).because(error))?;
        let mut vm = Vm {
            parent,
            root,
            api: None,
            store,
            console,
            complaints,
            boot_timeout: self.boot_timeout,
            answer_timeout: self.answer_timeout,
            connected: false,
        };
        vm.bring_up(&plan).await?;
        Ok(Box::new(vm))
    }
}

/// What goes into the jail, taken out of what was asked for.
struct Parts {
    base: PathBuf,
    root: PathBuf,
    names: PathBuf,
    uid: u32,
    shape: Shape,
}

impl Parts {
    fn of(driver: &Firecracker, launch: &Launch<'_>) -> Parts {
        Parts {
            base: driver.place.clone(),
            root: driver.root(launch.uid),
            names: driver.names.clone(),
            uid: launch.uid,
            shape: launch.shape.clone(),
        }
    }

    /// Opens everything, while the host's mounts are in sight. Blocks.
    fn gather(self, origin: Origin, disks: Option<super::Disks>) -> Result<(Place, Option<Store>)> {
        disks::make_folder(&self.base)?;
        let mut binds = Vec::new();
        let mut bind = |name, writable, tree: OwnedFd| binds.push(Bind { tree, name, writable });
        let mut store = None;
        match origin {
            Origin::Clone(saved) => {
                let Trees { memory, devices } = store::open(saved, &self.base)?;
                bind(MEMORY, false, memory);
                bind(DEVICES, false, devices);
            }
            Origin::Boot | Origin::Template => {
                bind(KERNEL, false, disks::named(&self.shape.guest.kernel)?);
                bind(INITRAMFS, false, disks::named(&self.shape.guest.initramfs)?);
                if matches!(origin, Origin::Template) {
                    let (made, trees) = Store::create(&self.base, self.uid, self.shape.memory_bytes)?;
                    store = Some(made);
                    bind(MEMORY, true, trees.memory);
                    bind(DEVICES, true, trees.devices);
                }
            }
        }
        let stand_ins = disks.is_none();
        let mut names = None;
        if let Some(disks) = disks {
            disks::make_folder(&self.names)?;
            let image = disks::image(disks.root, &self.names)?;
            disks::scratch(&disks.scratch, self.uid)?;
            let mut given = Names::take(&self.names)?;
            bind(ROOT, false, given.tree(&image)?);
            bind(SCRATCH, true, given.tree(&disks.scratch)?);
            names = Some(given);
        }
        let Parts { base, root, uid, .. } = self;
        Ok((Place { base, root, uid, binds, stand_ins, names }, store))
    }
}

/// A Firecracker in its jail.
struct Vm {
    parent: Parent,
    root: Root,
    /// None until Firecracker listens.
    api: Option<Mutex<Api>>,
    /// Where it will be saved, if it will be.
    store: Option<Store>,
    console: Tail,
    complaints: Tail,
    boot_timeout: Duration,
    answer_timeout: Duration,
    /// Whether the channel was given.
    connected: bool,
}

impl Vm {
    /// Connects to the API and makes the requests, one after the other.
    async fn bring_up(&mut self, plan: &[Request]) -> Result<()> {
        let connected =
            self.unless_ended("starting Firecracker", self.answer_timeout, self.root.connect(API));
        let mut api = Api::new(connected.await?);
        api.check_version(self.answer_timeout).await.map_err(|error| self.blame(error))?;
        self.api = Some(Mutex::new(api));
        for request in plan {
            self.ask(request).await?;
        }
        Ok(())
    }

    async fn ask(&self, request: &Request) -> Result<()> {
        let api = self.api.as_ref().ok_or_else(|| Error::internal("Firecracker is not up"))?;
        let patience = if request.path.starts_with("/snapshot/") {
            self.answer_timeout.max(WHOLE_VM)
        } else {
            self.answer_timeout
        };
        let mut api = api.lock().await;
        let asked = api.ask(request, patience).await;
        if api.is_lost() {
            // It may just be ending, and say why. If it is not, it has had its time.
            let _runs = timeout(ENDING, self.last_heard()).await;
        }
        asked.map(drop).map_err(|error| self.blame(error))
    }

    /// Waits until Firecracker has ended and all that it said was read; gives how it ended.
    async fn last_heard(&self) -> String {
        let end = self.parent.ended().await;
        self.complaints.drained().await;
        self.console.drained().await;
        end
    }

    /// Waits for something, but not for too long, and not for a Firecracker that has ended.
    async fn unless_ended<T>(
        &self,
        doing: &str,
        patience: Duration,
        wanted: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let outcome = tokio::select! {
            outcome = timeout(patience, wanted) => outcome.unwrap_or_else(|_| {
                let text = format!("nothing has come for {} s", patience.as_secs_f32());
                Err(Error::new(Kind::Unavailable, text))
            }),
            end = self.last_heard() => Err(Error::new(Kind::Unavailable, end)),
        };
        outcome.map_err(|error| self.blame(Error::new(error.kind(), doing).because(error)))
    }

    /// Adds what Firecracker and its guest said last.
    fn blame(&self, error: Error) -> Error {
        match self.last_words() {
            words if words.is_empty() => error,
            words => {
                let text = format!("Firecracker failed; its last words: {words}");
                Error::new(error.kind(), text).because(error)
            }
        }
    }
}

#[async_trait]
impl Machine for Vm {
    /// That of the process above Firecracker: it ends when Firecracker does, and the other way round.
    fn pid(&self) -> u32 {
        self.parent.pid
    }

    async fn channel(&mut self) -> Result<UnixStream> {
        if std::mem::replace(&mut self.connected, true) {
            return Err(Error::internal("the guest's channel was taken already"));
        }
        let connecting = vsock::connect(&self.root);
        self.unless_ended("waiting for the guest to listen", self.boot_timeout, connecting).await
    }

    async fn pause(&self) -> Result<()> {
        self.ask(&requests::state("Paused")).await
    }

    async fn resume(&self) -> Result<()> {
        self.ask(&requests::state("Resumed")).await
    }

    async fn save(&self) -> Result<Saved> {
        let store = self.store.as_ref().ok_or_else(|| Error::internal("only a template can be saved"))?;
        self.pause().await?;
        self.ask(&requests::save()).await?;
        // Read-only it can only be when nobody has it open for writing any more.
        self.kill();
        self.ended().await;
        store.protect()
    }

    fn kill(&self) {
        self.parent.kill();
    }

    async fn ended(&self) -> String {
        self.parent.ended().await
    }

    fn last_words(&self) -> String {
        console::last_words(&self.complaints, &self.console)
    }
}
