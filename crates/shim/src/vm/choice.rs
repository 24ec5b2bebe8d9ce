//! Which VMM runs VMs here, and how: what the settings say, and what is found by trying.

use std::path::Path;
use std::time::Duration;

use bailey_host::cgroup::{Cgroup, Limits};
use bailey_host::sys::tsc;
use tokio::time::timeout;

use super::{CGROUP_TOP, OwnedCgroup, Place, Vm};
use crate::config::{AccelChoice, Config, VmmChoice};
use crate::error::{Context, Error, Kind, Result};
use crate::kvm;
use crate::vmm::firecracker::Firecracker;
use crate::vmm::qemu::Qemu;
use crate::vmm::qemu::args::Accel;
use crate::vmm::{Driver, GuestImage, Origin, Shape};

/// Longest time that a trial of KVM may take. Where KVM works, a guest is mostly up within a second, and where it fails,
/// QEMU mostly ends at once. What is found holds until the machine boots anew: a host that is busy, or is itself a
/// guest of emulation, must not be taken for one without KVM.
const KVM_TRIAL: Duration = Duration::from_secs(60);

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
    let name = format!("kvm-trial-{}", std::process::id());
    let cgroup = Cgroup::at(&Path::new(CGROUP_TOP).join(&name)).context(|| "naming a cgroup".into())?;
    let cgroup = OwnedCgroup::create(cgroup, &Limits::default())?;
    let place = Place { name: &name, shape: &shape, cgroup: &cgroup.0 };
    let trial = async { Vm::launch(config, &driver, place, Origin::Boot, None).await.map(drop) };
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
