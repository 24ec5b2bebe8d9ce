//! Spares: clones of a template that are up before it is known what they will run.
//!
//! A spare is a process of its own, a shim without a sandbox. It clones the template, lets the guest rehearse a start,
//! stops its processors, and waits. `start` asks the keeper for one and makes it the sandbox's shim: it hands over
//! the socket and the bundle's folder, and the spare serves from there on as any other shim does. Nothing of the
//! rehearsal is left in the guest, and the sandbox's own setup, reseeding first, comes after it as after a boot.
//!
//! A spare that nobody took ends with its keeper. One that cannot serve a sandbox says so, and a shim is started in
//! the usual way.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use bailey_host::cgroup::{Cgroup, Limits};
use bailey_host::sys::process::inherited;
use bailey_types::guest::spec::RootDisk;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{SPARE, hand_over, rehearsal, shape_of, socket};
use crate::app;
use crate::args::Args;
use crate::bundle;
use crate::config::{Config, FromContainerd, Start};
use crate::error::{Context, Error, Result};
use crate::vm::{self, OwnedCgroup, Place, Vm};
use crate::vmm::Origin;

/// What a keeper hears when a spare waits; anything else is why there is none.
pub(super) const WAITS: &[u8] = b"waits";

/// How long a spare may take to answer, in milliseconds: it only has to look at what it is asked.
const ANSWER_MS: u16 = 2000;

/// The socket to the keeper, and later to whoever wants the spare.
type Control = tokio::net::UnixStream;

/// A VM that waits for its sandbox.
pub(crate) struct Spare {
    pub(crate) vm: Vm,
    /// The template that it is a clone of, by its keeper's socket.
    pub(crate) template: PathBuf,
    /// Where it is until it has a sandbox's cgroup.
    pub(crate) cgroup: OwnedCgroup,
}

/// What `start` says to a spare.
#[derive(Debug, Serialize, Deserialize)]
struct Adoption {
    id: String,
    debug: bool,
    ttrpc_address: Option<String>,
    /// The settings' file, which must be the spare's own.
    config: Option<PathBuf>,
    /// The mount namespace, by its inode, which must be the spare's own.
    mounts: u64,
}

/// What a spare answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Serves { pid: u32 },
    Refuses(String),
}

/// What the spare is given first: the template's two files, the rehearsal's image, and how that is read.
pub(super) fn offer(
    control: &UnixStream,
    saved: &crate::vmm::Saved,
    image: &File,
    root: &RootDisk,
) -> Result<()> {
    let text = serde_json::to_vec(root).context(|| "writing an offer".into())?;
    let fds = [saved.memory.as_raw_fd(), saved.devices.as_raw_fd(), image.as_raw_fd()];
    hand_over::send(control.as_fd(), &text, &fds).context(|| "handing a template to a spare".into())
}

/// The process of a spare.
pub(crate) fn wait(args: &Args) -> Result<()> {
    // Not a member of the keeper's session: it may outlive that.
    nix::unistd::setsid().context(|| "leaving the session".into())?;
    let control = inherited(libc::STDIN_FILENO).context(|| "taking the keeper's socket".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context(|| "starting the runtime".into())?.block_on(async {
        let control = socket_of(control).context(|| "watching the keeper's socket".into())?;
        let config = Config::load(None)?;
        let brought_up = bring_up(args, &config, &control).await;
        name("bailey-spare");
        let word = brought_up.as_ref().map_or_else(|error| error.chain().into_bytes(), |_| WAITS.to_vec());
        hand_over::send(control.as_fd(), &word, &[]).context(|| "telling the keeper".into())?;
        serve_when_adopted(args, &config, &control, brought_up?).await
    })
}

/// The cgroup of a spare's VMM, until it has a sandbox's.
pub(super) fn cgroup(namespace: &str, pid: u32) -> Result<Cgroup> {
    let path = Path::new(vm::CGROUP_TOP).join(namespace).join(format!("spare-{pid}"));
    Cgroup::at(&path).context(|| "naming a cgroup".into())
}

/// Clones the template and lets the guest rehearse.
async fn bring_up(args: &Args, config: &Config, control: &Control) -> Result<Spare> {
    let driver = vm::driver(config).await?;
    let shape = shape_of(config, &args.id)?;
    let offer = hand_over::next(control).await?;
    let root: RootDisk = hand_over::parse(&offer)?;
    let (saved, rest) = hand_over::saved(offer.fds)?;
    let (Some(saved), Some(image)) = (saved, rest.into_iter().next()) else {
        return Err(Error::internal("the keeper has handed over too little"));
    };
    let (disks, request) = rehearsal::request(config, image.into(), root)?;
    let cgroup = cgroup(&args.namespace, std::process::id())?;
    let memory_bytes = shape.memory_bytes + driver.describe().overhead_bytes;
    let limits = Limits { memory_bytes: Some(memory_bytes), ..Limits::default() };
    let cgroup = OwnedCgroup::create(cgroup, &limits)?;
    let place = Place { name: &format!("spare-{}", std::process::id()), shape: &shape, cgroup: &cgroup.0 };
    let vm = Vm::launch(config, &*driver, place, Origin::Clone(saved), None).await?;
    let template = socket(config, &args.namespace, &driver.describe(), &shape)?;
    let rehearsed = async {
        vm.machine.set_disks(disks).await?;
        vm::with_machine(&*vm.machine, vm.guest.command(request)).await?;
        vm.machine.pause().await
    };
    timeout(config.boot_timeout, rehearsed).await.context(|| "rehearsing a start".into())??;
    Ok(Spare { vm, template, cgroup })
}

/// Waits for a sandbox and serves it; ends if there is none to come.
async fn serve_when_adopted(args: &Args, config: &Config, control: &Control, spare: Spare) -> Result<()> {
    let message = tokio::select! {
        message = hand_over::next(control) => message?,
        end = spare.vm.machine.ended() => return Err(Error::internal(end)),
    };
    if message.bytes.is_empty() {
        return Ok(());
    }
    let adoption: Adoption = hand_over::parse(&message)?;
    let mut fds = message.fds.into_iter();
    let (Some(listener), Some(bundle)) = (fds.next(), fds.next()) else {
        return Err(Error::internal("the sandbox's socket and folder have not come"));
    };
    let refusal = refusal(&adoption, config);
    let answer = match &refusal {
        Some(why) => Answer::Refuses(why.clone()),
        None => {
            nix::unistd::fchdir(&bundle).context(|| "entering the bundle".into())?;
            Answer::Serves { pid: std::process::id() }
        }
    };
    let text = serde_json::to_vec(&answer).context(|| "writing an answer".into())?;
    // Who asked has gone if this fails, and has nobody else to serve its socket with.
    hand_over::send(control.as_fd(), &text, &[]).context(|| "answering".into())?;
    if refusal.is_some() {
        return Ok(());
    }
    name(&format!("shim-{}", adoption.id));
    let args = Args { id: adoption.id, debug: adoption.debug, ..args.clone() };
    crate::log::to_containerd(args.debug);
    app::run(&args, UnixListener::from(listener), adoption.ttrpc_address, Some(spare)).await
}

/// What people see in a list of processes: its command line was written before it had a sandbox.
fn name(name: &str) {
    // The kernel cuts it where it is too long; without a name it does as well.
    if let Ok(name) = CString::new(name) {
        let _nameless = nix::sys::prctl::set_name(&name);
    }
}

/// Why a spare cannot serve, if it cannot.
fn refusal(adoption: &Adoption, config: &Config) -> Option<String> {
    match mounts() {
        Ok(mounts) if mounts == adoption.mounts => {}
        Ok(_) => return Some("it sees other mounts".into()),
        Err(error) => return Some(error.chain()),
    }
    (adoption.config != config.file).then(|| "it has other settings".into())
}

/// This process's mount namespace.
fn mounts() -> Result<u64> {
    let path = "/proc/self/ns/mnt";
    Ok(std::fs::metadata(path).context(|| format!("reading {path}"))?.ino())
}

fn socket_of(fd: OwnedFd) -> io::Result<Control> {
    let socket = UnixStream::from(fd);
    socket.set_nonblocking(true)?;
    Control::from_std(socket)
}

/// Makes a spare the shim of a sandbox, and gives its process id. None if there is none that could be.
pub(crate) fn adopt(
    config: &Config,
    args: &Args,
    spec: &Spec,
    listener: &UnixListener,
) -> Result<Option<u32>> {
    let plan = bundle::plan(spec, &args.namespace, &args.id, false)?;
    if config.spares == 0 || plan.start(config) == Start::Cold {
        return Ok(None);
    }
    let Some(driver) = vm::known_driver(config)? else { return Ok(None) };
    let shape = vm::shape(config, &plan)?;
    let keeper = socket(config, &args.namespace, &driver.describe(), &shape)?;
    let Ok(keeper) = UnixStream::connect(keeper) else { return Ok(None) };
    let Some(given) = hand_over::ask(&keeper, SPARE) else { return Ok(None) };
    let Some(spare) = given.fds.into_iter().next() else { return Ok(None) };
    let doing = || "handing the sandbox to a spare".to_owned();
    let adoption = Adoption {
        id: args.id.clone(),
        debug: args.debug,
        ttrpc_address: FromContainerd::read().ttrpc_address,
        config: config.file.clone(),
        mounts: mounts()?,
    };
    let bundle = File::open(".").context(doing)?;
    let text = serde_json::to_vec(&adoption).context(doing)?;
    if hand_over::send(spare.as_fd(), &text, &[listener.as_raw_fd(), bundle.as_raw_fd()]).is_err() {
        return Ok(None);
    }
    answer(&spare)
}

/// What the spare says. One that says nothing in time finds the socket closed, and ends.
fn answer(spare: &OwnedFd) -> Result<Option<u32>> {
    let mut polled = [PollFd::new(spare.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut polled, PollTimeout::from(ANSWER_MS)).map_err(io::Error::from);
    if ready.context(|| "waiting for a spare".into())? == 0 {
        return Ok(None);
    }
    let message = hand_over::receive(spare.as_fd()).context(|| "reading the answer of a spare".into())?;
    if message.bytes.is_empty() {
        return Ok(None);
    }
    match hand_over::parse(&message)? {
        Answer::Serves { pid } => Ok(Some(pid)),
        Answer::Refuses(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adoption() -> Adoption {
        Adoption {
            id: "a".into(),
            debug: false,
            ttrpc_address: None,
            config: None,
            mounts: mounts().unwrap(),
        }
    }

    #[test]
    fn a_spare_serves_only_who_sees_and_sets_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("shim.toml");
        std::fs::write(&file, "spares = 2").unwrap();
        let config = Config::load(Some(&file)).unwrap();
        let same = Adoption { config: Some(file), ..adoption() };
        assert_eq!(refusal(&same, &config), None);
        let elsewhere = Adoption { mounts: 1, config: config.file.clone(), ..adoption() };
        assert_eq!(refusal(&elsewhere, &config).as_deref(), Some("it sees other mounts"));
        let other = Adoption { config: Some("/other".into()), ..adoption() };
        assert_eq!(refusal(&other, &config).as_deref(), Some("it has other settings"));
    }
}
