//! VMMs: one small trait, a driver for each program. What only one of them can do stays in its driver.

pub(crate) mod console;
pub(crate) mod firecracker;
pub(crate) mod memory;
pub(crate) mod qemu;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use bailey_host::cgroup::Cgroup;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::bundle::IoLimits;
use crate::error::{Context, Error, Kind, Result};

/// A kernel and an initramfs with the guest in it, as `cargo xtask guest-image` makes them.
#[derive(Debug, Clone)]
pub(crate) struct GuestImage {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) manifest: Manifest,
}

/// What is written beside a guest image. Fields that only people read are left out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) flavour: String,
    /// Boot parameters that this kernel wants.
    pub(crate) cmdline: String,
    /// Whether it finds its devices through ACPI.
    pub(crate) acpi: bool,
    pub(crate) sha256: Digests,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Digests {
    pub(crate) vmlinux: String,
    pub(crate) initramfs: String,
}

/// Flavours of guest images, the better first.
const FLAVOURS: [&str; 2] = ["bailey", "debian"];

impl GuestImage {
    /// Finds the best guest image in a folder.
    pub(crate) fn find(folder: &std::path::Path) -> Result<GuestImage> {
        for flavour in FLAVOURS {
            let folder = folder.join(flavour);
            let manifest = folder.join("manifest.json");
            let Ok(text) = std::fs::read(&manifest) else { continue };
            let manifest: Manifest = serde_json::from_slice(&text)
                .context_as(Kind::Unavailable, || format!("reading {}", manifest.display()))?;
            let image = GuestImage {
                kernel: folder.join("vmlinux"),
                initramfs: folder.join("initramfs.cpio"),
                manifest,
            };
            for file in [&image.kernel, &image.initramfs] {
                if !file.is_file() {
                    let text =
                        format!("the guest's {} is missing: make the guest image again", file.display());
                    return Err(Error::new(Kind::Unavailable, text));
                }
            }
            return Ok(image);
        }
        Err(Error::new(
            Kind::Unavailable,
            format!(
                "there is no guest kernel below {}: make it with `cargo xtask guest-image`, or set guest_dir",
                folder.display()
            ),
        ))
    }
}

/// Threads and processes that a VMM may have beside one for each processor: QEMU's pool for I/O, which is at most 64,
/// its own few, and the process above Firecracker. One number for two walls: the limit of the VMM's user holds where
/// the cgroup's fails, and the other way round, and neither leaves room that the other one would not.
const THREADS: u64 = 80;

/// The most threads and processes of a VMM.
pub(crate) fn threads(vcpus: u32) -> u64 {
    THREADS + u64::from(vcpus)
}

/// The shape of a VM: what a template and its clones have in common.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) guest: GuestImage,
    /// The guest's memory, in bytes.
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
}

/// Where a VM's memory and devices start from.
pub(crate) enum Origin {
    /// The kernel boots.
    Boot,
    /// The kernel boots, and will be saved as a template.
    Template,
    /// Everything is as a template was saved.
    Clone(Saved),
}

/// A saved template: its memory and its devices, as files without names on the host that nobody can write to any
/// more. What `memory` is the driver knows: the file itself, or the mount namespace that has both.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) memory: File,
    pub(crate) devices: File,
}

/// Size of a disk that is not there yet, in bytes: the largest that one may have.
pub(crate) const DISK_MAX: u64 = 1 << 40;

/// The VM's two disks. A template has neither: its stand-ins are empty and of the largest size.
pub(crate) struct Disks {
    pub(crate) root: File,
    pub(crate) scratch: File,
    pub(crate) io: IoLimits,
}

impl Disks {
    /// The same disks once more.
    pub(crate) fn try_clone(&self) -> std::io::Result<Disks> {
        Ok(Disks { root: self.root.try_clone()?, scratch: self.scratch.try_clone()?, io: self.io })
    }
}

/// All that a driver needs to start a VM.
pub(crate) struct Launch<'a> {
    /// What the process is called.
    pub(crate) name: &'a str,
    pub(crate) shape: &'a Shape,
    pub(crate) origin: Origin,
    pub(crate) disks: Option<Disks>,
    /// The user that the VMM runs as, leased to this VM alone.
    pub(crate) uid: u32,
    pub(crate) cgroup: &'a Cgroup,
    /// Descriptors of taps made elsewhere. Without any, the VM has no network device at all.
    pub(crate) taps: Vec<OwnedFd>,
}

/// What a driver is, for people and for the host's books.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) name: &'static str,
    /// How guest code runs: `kvm` or `tcg`.
    pub(crate) accel: &'static str,
    /// Memory that the VMM itself takes at most, beside the guest's, in bytes.
    pub(crate) overhead_bytes: u64,
    /// Whether a clone can be started without disks and be given them later.
    pub(crate) late_disks: bool,
}

/// A program that runs VMs.
#[async_trait]
pub(crate) trait Driver: Send + Sync {
    fn describe(&self) -> Description;

    /// Starts a VM in its jail. After an error nothing is left behind.
    async fn launch(&self, launch: Launch<'_>) -> Result<Box<dyn Machine>>;
}

/// A VM that was started. Dropping it ends it.
#[async_trait]
pub(crate) trait Machine: Send + Sync {
    /// The VMM's process.
    fn pid(&self) -> u32;

    /// The byte stream to the guest; given once.
    async fn channel(&mut self) -> Result<UnixStream>;

    /// Stops the guest's processors.
    async fn pause(&self) -> Result<()>;

    /// Lets them go on.
    async fn resume(&self) -> Result<()>;

    /// Puts these in the place of the disks that it has. The guest must not be using any. Only where the driver says
    /// that disks may come late.
    async fn set_disks(&self, _: Disks) -> Result<()> {
        Err(Error::internal("this VMM takes its disks when it starts, and no others later"))
    }

    /// Stops the guest for good and saves it. Only for one that was started as a template.
    async fn save(&self) -> Result<Saved>;

    /// Ends the VMM.
    fn kill(&self);

    /// Waits until the VMM has ended and is reaped; gives how it ended, in words.
    async fn ended(&self) -> String;

    /// The last lines of the guest's console and of the VMM itself.
    fn last_words(&self) -> String;
}
