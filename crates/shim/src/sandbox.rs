//! One sandbox: its VM, brought up from an image and a plan, and everything on the host that belongs to it.
//!
//! Whatever a sandbox owns goes when this value goes: the VMM, its cgroup, its user's lease. What has a name on the
//! host has it for as short as possible; what has none cannot be left behind.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use bailey_host::block::Disk;
use bailey_host::cgroup::{Cgroup, Limits};
use bailey_host::jail::uid::UidLease;
use bailey_types::guest::message::Request;
use bailey_types::guest::spec::Setup;
use tokio::sync::mpsc;

use crate::bundle::{IoLimits, Plan};
use crate::config::{Config, Start};
use crate::error::{Context, Error, Kind, Result};
use crate::guest::{Event, Guest};
use crate::image::Image;
use crate::scratch;
use crate::template::{self, Spare};
use crate::vm::{self, OwnedCgroup, Place, Vm};
use crate::vmm::{self, Disks, Driver, Machine, Origin, Shape};

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
        let driver = vm::driver(config).await?;
        let shape = vm::shape(config, plan)?;
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
        let waiting = match spare.filter(|_| plan.start(config) == Start::Warm) {
            Some(spare) => adopt(config, namespace, &*driver, &shape, spare, &cgroup.0, &disks).await,
            None => None,
        };
        let vm = match waiting {
            Some(vm) => vm,
            None => {
                let origin = match plan.start(config) {
                    Start::Cold => Origin::Boot,
                    Start::Warm => warm(config, namespace, &*driver, &shape).await,
                };
                tracing::debug!("prepared after {:?}", begun.elapsed());
                let place = Place { name: id, shape: &shape, cgroup: &cgroup.0 };
                Vm::launch(config, &*driver, place, origin, Some(disks)).await?
            }
        };
        tracing::debug!("a VM runs after {:?}", begun.elapsed());
        let setup = Setup {
            hostname: plan.container.hostname.clone().unwrap_or_else(|| "localhost".to_owned()),
            ..vm::setup(image.root, filesystem)?
        };
        vm::with_machine(&*vm.machine, vm.guest.command(Request::Setup(Box::new(setup)))).await?;
        tracing::debug!("set up after {:?}", begun.elapsed());
        let Vm { machine, guest, events, uid } = vm;
        let memory_bytes = vm::class_of(config, plan);
        Ok((Sandbox { machine, guest, cgroup, memory_bytes, _uid: uid, _image: image_in_use }, events))
    }

    /// Asks the guest, knowing that its VMM may end meanwhile.
    pub(crate) async fn request(&self, request: Request) -> Result<bailey_types::guest::message::Response> {
        tokio::select! {
            result = self.guest.request(request) => result,
            end = self.machine.ended() => Err(Error::internal(format!("{end}; {}", vm::last_words(&*self.machine)))),
        }
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
        spare.cgroup.0.move_to(cgroup).context(|| "limiting the VMM".into())?;
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
