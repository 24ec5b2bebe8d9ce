//! One sandbox: its VM, brought up from an image and a plan, and everything on the host that belongs to it.
//!
//! Whatever a sandbox owns goes when this value goes: the VMM, its cgroup, its user's lease. What has a name on the
//! host has it for as short as possible; what has none cannot be left behind.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use bailey_host::block::Disk;
use bailey_host::cgroup::{Cgroup, Limits};
use bailey_host::jail::uid::{self, UidLease};
use bailey_host::sys::tsc;
use bailey_types::guest::message::Request;
use bailey_types::guest::spec::{RootDisk, Scratch, Setup};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::bundle::{IoLimits, Plan};
use crate::config::{AccelChoice, Config, Start, VmmChoice};
use crate::error::{Context, Error, Kind, Result};
use crate::guest::{Event, Guest};
use crate::image::{Image, getrandom};
use crate::template::Spare;
use crate::vmm::firecracker::Firecracker;
use crate::vmm::qemu::Qemu;
use crate::vmm::qemu::args::Accel;
use crate::vmm::{Disks, Driver, GuestImage, Launch, Machine, Origin, Shape};
use crate::{clock, kvm, scratch, template, vmm};

/// Memory that the guest kernel and the guest take beside the workload's: a fixed part, and the kernel's own books,
/// one part in so many.
const GUEST_FIXED: u64 = 64 << 20;
const GUEST_PART: u64 = 32;

/// Size classes: powers of two from the smallest to the largest, then steps of the largest.
const CLASS_MIN: u64 = 64 << 20;
const CLASS_STEP: u64 = 512 << 20;

/// How long a guest that has failed is given to end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Longest time that a trial of KVM may take. Where KVM works, a guest is mostly up within a second, and where it fails,
/// QEMU mostly ends at once. What is found holds until the machine boots anew: a host that is busy, or is itself a
/// guest of emulation, must not be taken for one without KVM.
const KVM_TRIAL: Duration = Duration::from_secs(60);

pub(crate) struct Sandbox {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) guest: Guest,
    pub(crate) cgroup: OwnedCgroup,
    /// The most that the workload may ever be given, in bytes.
    pub(crate) memory_bytes: u64,
    _uid: UidLease,
    /// The image is in use for as long as this is open; a VMM may open it anew.
    _image: File,
}

/// A cgroup that is removed with this value.
#[derive(Debug)]
pub(crate) struct OwnedCgroup(pub(crate) Cgroup);

/// The cgroup above those that have no place of their own: templates and trials. It stays.
pub(crate) const CGROUP_TOP: &str = "/bailey";

impl OwnedCgroup {
    pub(crate) fn create(cgroup: Cgroup, limits: &Limits) -> Result<OwnedCgroup> {
        let owned = OwnedCgroup(cgroup);
        owned.0.create().context(|| "making the sandbox's cgroup".into())?;
        owned.0.set(limits).context(|| "limiting the sandbox's cgroup".into())?;
        Ok(owned)
    }
}

impl Drop for OwnedCgroup {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove_up_to(CGROUP_TOP.as_ref()) {
            tracing::warn!(
                "{}: {}",
                error,
                std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
            );
        }
    }
}

/// Leases a user for a VMM.
pub(crate) fn lease_uid(config: &Config) -> Result<UidLease> {
    uid::lease(config.uids.clone(), &config.state_dir.join("uids"))
        .context_as(Kind::Unavailable, || "taking a user for the VMM".into())
}

/// The VMM that the settings name, with KVM if it truly works.
pub(crate) async fn driver(config: &Config) -> Result<Box<dyn Driver>> {
    match known_driver(config)? {
        Some(driver) => Ok(driver),
        None => Ok(qemu(config, try_kvm(config).await?)),
    }
}

/// The VMM that the settings name; none if it has to be tried first whether KVM works.
pub(crate) fn known_driver(config: &Config) -> Result<Option<Box<dyn Driver>>> {
    if config.vmm == VmmChoice::Firecracker {
        return firecracker(config).map(Some);
    }
    let kvm = match config.accel {
        AccelChoice::Kvm => Some(true),
        AccelChoice::Tcg => Some(false),
        AccelChoice::Auto if !kvm::possible() => Some(false),
        AccelChoice::Auto => kvm::remembered(&config.state_dir),
    };
    Ok(kvm.map(|kvm| qemu(config, kvm)))
}

fn qemu(config: &Config, kvm: bool) -> Box<dyn Driver> {
    let accel = if kvm { Accel::Kvm } else { Accel::Tcg { tsc_khz: tsc_khz(&config.state_dir) } };
    Box::new(Qemu::new(&config.qemu, &config.cache_dir, accel))
}

/// Firecracker, where it can be: it emulates nothing.
fn firecracker(config: &Config) -> Result<Box<dyn Driver>> {
    if config.accel == AccelChoice::Tcg || !kvm::possible() {
        let why = if config.accel == AccelChoice::Tcg { "accel is set to tcg" } else { "this host has none" };
        let text = format!("Firecracker needs KVM, and {why}: set vmm = \"qemu\"");
        return Err(Error::new(Kind::Unavailable, text));
    }
    Ok(Box::new(Firecracker::new(config)?))
}

/// The rate of the host's time-stamp counter, measured once for each boot of the machine.
fn tsc_khz(state: &Path) -> u64 {
    let kept = state.join("tsc-khz");
    if let Some(khz) = std::fs::read_to_string(&kept).ok().and_then(|text| text.trim().parse().ok()) {
        return khz;
    }
    let khz = tsc::measure_khz();
    if let Err(error) = std::fs::write(&kept, khz.to_string()) {
        tracing::warn!("keeping the rate of the time-stamp counter in {}: {error}", kept.display());
    }
    khz
}

/// Boots a guest on KVM, to see whether it comes up.
async fn try_kvm(config: &Config) -> Result<bool> {
    let driver = Qemu::new(&config.qemu, &config.cache_dir, Accel::Kvm);
    let shape = Shape { guest: GuestImage::find(&config.guest_dir)?, memory_bytes: 128 << 20, vcpus: 1 };
    let lease = lease_uid(config)?;
    let name = format!("kvm-trial-{}", std::process::id());
    let cgroup = Cgroup::at(&Path::new(CGROUP_TOP).join(&name)).context(|| "naming a cgroup".into())?;
    let cgroup = OwnedCgroup::create(cgroup, &Limits::default())?;
    let uid = lease.uid();
    let launch = Launch {
        name: &name,
        shape: &shape,
        origin: Origin::Boot,
        disks: None,
        uid,
        cgroup: &cgroup.0,
        taps: Vec::new(),
    };
    let trial = async {
        let mut machine = driver.launch(launch).await?;
        let (guest, _no_events) = Guest::connect(machine.channel().await?);
        until_ready(config, &guest, &*machine).await
    };
    let failed = match timeout(KVM_TRIAL, trial).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.chain()),
        Err(_) => Some(format!("nothing within {} s", KVM_TRIAL.as_secs())),
    };
    if let Some(why) = &failed {
        tracing::warn!("KVM runs no guest here, so guests are emulated until the machine boots anew: {why}");
    }
    kvm::remember(&config.state_dir, failed.is_none());
    Ok(failed.is_none())
}

/// Waits for the guest's greeting, for its end, or for too long.
pub(crate) async fn until_ready(config: &Config, guest: &Guest, machine: &dyn Machine) -> Result<()> {
    let waited = timeout(config.boot_timeout, with_machine(machine, guest.ready()));
    waited.await.unwrap_or_else(|_| {
        let seconds = config.boot_timeout.as_secs();
        let text = format!("the guest has not booted within {seconds} s; {}", last_words(machine));
        Err(Error::new(Kind::Unavailable, text))
    })
}

/// Does something with the guest; if that fails, or its VMM ends first, says what both said last.
pub(crate) async fn with_machine<T>(
    machine: &dyn Machine,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        result = work => {
            let Err(error) = result else { return result };
            // A guest that fails mostly ends, and the reason is what it says last.
            let _goes_on = timeout(LAST_WORDS, machine.ended()).await;
            Err(match machine.last_words() {
                words if words.is_empty() => error,
                words => Error::new(error.kind(), format!("the guest failed; its last words: {words}")).because(error),
            })
        }
        end = machine.ended() => Err(Error::internal(format!("{end}; {}", last_words(machine)))),
    }
}

fn last_words(machine: &dyn Machine) -> String {
    match machine.last_words() {
        words if words.is_empty() => "its console has shown nothing".to_owned(),
        words => format!("its last words: {words}"),
    }
}

/// The size class of a workload, in bytes: what its VM gives it at most.
fn class(wanted: u64) -> u64 {
    if wanted <= CLASS_STEP {
        wanted.next_power_of_two().max(CLASS_MIN)
    } else {
        wanted.next_multiple_of(CLASS_STEP)
    }
}

impl Sandbox {
    /// Brings up the VM and its disks, ready for its container.
    pub(crate) async fn launch(
        config: &Config,
        namespace: &str,
        id: &str,
        plan: &Plan,
        image: Image,
        spare: Option<Spare>,
    ) -> Result<(Sandbox, mpsc::Receiver<Event>)> {
        let begun = Instant::now();
        let driver = driver(config).await?;
        let shape = shape(config, plan)?;
        let cgroup =
            Cgroup::at(&plan.cgroup).context_as(Kind::Invalid, || "naming the sandbox's cgroup".into())?;
        let memory_bytes = shape.memory_bytes + driver.describe().overhead_bytes;
        let cgroup = OwnedCgroup::create(cgroup, &limits(plan, memory_bytes))?;
        limit_io(&cgroup.0, &config.cache_dir, &plan.annotations.io);
        let scratch_bytes = plan.annotations.scratch_bytes.unwrap_or(config.scratch_bytes);
        let filesystem = scratch::filesystem(&config.cache_dir, scratch_bytes)?;
        let scratch = scratch::create(&config.cache_dir, scratch_bytes, config.scratch_overcommit)?;
        let image_in_use = image.file.try_clone().context(|| "copying a descriptor".into())?;
        let disks = Disks { root: image.file, scratch, io: plan.annotations.io };
        let waiting = match spare.filter(|_| start(config, plan) == Start::Warm) {
            Some(spare) => adopt(config, namespace, &*driver, &shape, spare, &cgroup.0, &disks).await,
            None => None,
        };
        let vm = match waiting {
            Some(vm) => vm,
            None => {
                let origin = match start(config, plan) {
                    Start::Cold => Origin::Boot,
                    Start::Warm => warm(config, namespace, &*driver, &shape).await,
                };
                let place = Place { name: id, shape: &shape, cgroup: &cgroup.0 };
                Vm::launch(config, &*driver, place, origin, Some(disks)).await?
            }
        };
        tracing::debug!("a VM runs after {:?}", begun.elapsed());
        let setup = Setup {
            hostname: plan.container.hostname.clone().unwrap_or_else(|| "localhost".to_owned()),
            ..setup(image.root, filesystem)?
        };
        with_machine(&*vm.machine, vm.guest.command(Request::Setup(Box::new(setup)))).await?;
        tracing::debug!("set up after {:?}", begun.elapsed());
        let Vm { machine, guest, events, uid } = vm;
        let memory_bytes = class_of(config, plan);
        Ok((Sandbox { machine, guest, cgroup, memory_bytes, _uid: uid, _image: image_in_use }, events))
    }

    /// Asks the guest, knowing that its VMM may end meanwhile.
    pub(crate) async fn request(&self, request: Request) -> Result<bailey_types::guest::message::Response> {
        tokio::select! {
            result = self.guest.request(request) => result,
            end = self.machine.ended() => Err(Error::internal(format!("{end}; {}", last_words(&*self.machine)))),
        }
    }
}

/// A VM, and what came with its start.
pub(crate) struct Vm {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) guest: Guest,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) uid: UidLease,
}

/// What a VM is on the host.
pub(crate) struct Place<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a Shape,
    pub(crate) cgroup: &'a Cgroup,
}

impl Vm {
    /// Starts a VM, of which nothing is asked yet.
    pub(crate) async fn launch(
        config: &Config,
        driver: &dyn Driver,
        place: Place<'_>,
        origin: Origin,
        disks: Option<Disks>,
    ) -> Result<Vm> {
        let boots = !matches!(origin, Origin::Clone(_));
        let uid = lease_uid(config)?;
        let Place { name, shape, cgroup } = place;
        let launch = Launch { name, shape, origin, disks, uid: uid.uid(), cgroup, taps: Vec::new() };
        let mut machine = driver.launch(launch).await?;
        let (guest, events) = Guest::connect(machine.channel().await?);
        if boots {
            until_ready(config, &guest, &*machine).await?;
        }
        Ok(Vm { machine, guest, events, uid })
    }
}

/// Makes the VM that waits the sandbox's. None if it does not fit or has failed: there are other ways to start.
async fn adopt(
    config: &Config,
    namespace: &str,
    driver: &dyn Driver,
    shape: &Shape,
    spare: Spare,
    cgroup: &Cgroup,
    disks: &Disks,
) -> Option<Vm> {
    let wanted = template::socket(config, namespace, &driver.describe(), shape);
    if wanted.ok()? != spare.template {
        return None;
    }
    let adopted = async {
        let disks = disks.try_clone().context(|| "copying a disk's descriptor".into())?;
        cgroup
            .add(Pid::from_raw(spare.vm.machine.pid().cast_signed()))
            .context(|| "limiting the VMM".into())?;
        // QEMU lets go of what it is told to only while the processors run. The guest does nothing until it is asked.
        spare.vm.machine.resume().await?;
        spare.vm.machine.set_disks(disks).await
    };
    match adopted.await {
        Ok(()) => Some(spare.vm),
        Err(error) => {
            tracing::warn!("the VM that was ready is of no use: {}", error.chain());
            None
        }
    }
}

/// What makes a VM a sandbox of its own now.
pub(crate) fn setup(root: RootDisk, scratch: Scratch) -> Result<Setup> {
    let mut entropy = [0; 32];
    getrandom(&mut entropy)?;
    Ok(Setup { entropy, realtime_ns: clock::realtime_ns(), hostname: "localhost".to_owned(), root, scratch })
}

/// How the sandbox starts.
pub(crate) fn start(config: &Config, plan: &Plan) -> Start {
    plan.annotations.start.unwrap_or(config.start)
}

fn class_of(config: &Config, plan: &Plan) -> u64 {
    class(plan.memory_bytes.unwrap_or(config.memory_bytes))
}

/// The shape of the VM that a plan needs.
pub(crate) fn shape(config: &Config, plan: &Plan) -> Result<Shape> {
    let class = class_of(config, plan);
    let memory_bytes = (class + GUEST_FIXED + class / GUEST_PART).next_multiple_of(1 << 20);
    Ok(Shape { guest: GuestImage::find(&config.guest_dir)?, memory_bytes, vcpus: plan.vcpus })
}

/// What the VMM may use on the host: the guest's memory and its own on top, the processors that were asked for.
fn limits(plan: &Plan, memory_bytes: u64) -> Limits {
    let inside = &plan.container.limits;
    Limits {
        memory_bytes: Some(memory_bytes),
        cpu_quota_us: inside.cpu_quota_us,
        cpu_period_us: inside.cpu_period_us,
        cpu_weight: inside.cpu_weight,
        pids: Some(vmm::threads(plan.vcpus)),
    }
}

/// Limits the VMM's I/O on the disk that has both files of the sandbox. QEMU holds the guest to the same; this holds
/// without it. Where the host cannot, QEMU's limits are the only ones.
fn limit_io(cgroup: &Cgroup, folder: &Path, io: &IoLimits) {
    if *io == IoLimits::default() {
        return;
    }
    let limits = bailey_host::cgroup::IoLimits {
        read_bytes: io.read_bytes_per_second,
        write_bytes: io.write_bytes_per_second,
        reads: io.reads_per_second,
        writes: io.writes_per_second,
    };
    match Disk::of(folder) {
        Ok(Some(disk)) => {
            if let Err(error) = cgroup.set_io(disk, &limits) {
                tracing::warn!("the VMM alone limits the sandbox's disks: {error}");
            }
        }
        Ok(None) => {
            tracing::warn!("the VMM alone limits the sandbox's disks: {} is on no one disk", folder.display())
        }
        Err(error) => tracing::warn!("the VMM alone limits the sandbox's disks: {error}"),
    }
}

/// A clone of the tenant's template; if there can be none, a boot, since a slow start is better than none.
async fn warm(config: &Config, namespace: &str, driver: &dyn Driver, shape: &Shape) -> Origin {
    let (config, namespace, shape) = (config.clone(), namespace.to_owned(), shape.clone());
    let description = driver.describe();
    let got =
        tokio::task::spawn_blocking(move || template::get(&config, &namespace, &description, &shape)).await;
    match got {
        Ok(Ok(saved)) => Origin::Clone(saved),
        Ok(Err(error)) => {
            tracing::warn!("starting cold: {}", error.chain());
            Origin::Boot
        }
        Err(error) => {
            tracing::warn!("starting cold: asking for a template: {error}");
            Origin::Boot
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_what_is_asked_and_little_more() {
        for mib in [1_u64, 64, 65, 128, 200, 512, 513, 1500, 4096] {
            let class = class(mib << 20) >> 20;
            assert!(class >= mib && (class <= 64 || class < 2 * mib), "{mib}: {class}");
        }
        assert_eq!(class(600 << 20), 1 << 30);
    }
}
