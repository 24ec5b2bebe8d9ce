//! The VM's two disks: the image, read-only and verified; the scratch disk, writable and encrypted.
//!
//! They are told apart by their direction alone: the read-only one is the image. A template has stand-ins of the
//! largest size in both places; what a clone really has is what [`Setup`](bailey_types::guest::spec::Setup) says.

mod dm;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bailey_types::guest::spec::{RootDisk, Scratch};
use nix::mount::{MsFlags, mount, umount};

use crate::error::{Context, Error, Result};

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;

/// Zeros that are written at once, in bytes.
const ZEROS_MAX: usize = 64 * 1024;

/// Where the image's files and the scratch disk are, before they become one root.
pub(crate) const LOWER: &str = "/run/lower";
pub(crate) const SCRATCH: &str = "/run/scratch";
/// The container's root filesystem.
pub(crate) const ROOT: &str = "/run/root";

/// The VM's disks before they are anybody's: found, and as far prepared as can be without knowing what is on them.
/// A template has all of this done, once for all of its clones.
pub(crate) struct Disks {
    control: dm::Control,
    image: Disk,
    scratch: Disk,
    lower: dm::Device,
    upper: dm::Device,
}

impl Disks {
    /// Finds the disks and makes their mapped devices.
    pub(crate) fn prepare() -> Result<Disks> {
        let (image, scratch) = find()?;
        let control = dm::Control::open()?;
        let (lower, upper) = (control.create("root")?, control.create("scratch")?);
        let disks = Disks { control, image, scratch, lower, upper };
        let nothing = RootDisk { data_blocks: 1, root_hash: [0; 32], salt: [0; 32] };
        disks.control.rehearse(&disks.lower, &verity(&disks.image, &nothing)?, true)?;
        let nothing = Scratch { bytes: BLOCK, filesystem: Vec::new() };
        disks.control.rehearse(&disks.upper, &crypt(&disks.scratch, &nothing)?, false)?;
        Ok(disks)
    }

    /// Mounts both disks and the overlay of one on the other at [`ROOT`].
    pub(crate) fn mount_root(&self, root: &RootDisk, scratch: &Scratch) -> Result<()> {
        self.control.start(&self.lower, &verity(&self.image, root)?, true)?;
        mount_at(&self.lower.path, LOWER, "erofs", MsFlags::MS_RDONLY | MsFlags::MS_NODEV, "")?;
        self.control.start(&self.upper, &crypt(&self.scratch, scratch)?, false)?;
        write_filesystem(&self.upper.path, scratch)?;
        // Nothing of it outlives the VM, so nothing has to reach the disk in any order.
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount_at(&self.upper.path, SCRATCH, "ext4", flags, "nobarrier,noinit_itable")?;
        let (upper, work) = (Path::new(SCRATCH).join("upper"), Path::new(SCRATCH).join("work"));
        for folder in [&upper, &work] {
            fs::create_dir(folder).context(|| format!("making {}", folder.display()))?;
        }
        let options =
            format!("lowerdir={LOWER},upperdir={},workdir={},volatile", upper.display(), work.display());
        mount_at(Path::new("overlay"), ROOT, "overlay", MsFlags::empty(), &options)
    }

    /// Undoes [`Disks::mount_root`]: afterwards nothing that was on the disks is known any more.
    pub(crate) fn unmount_root(&mut self) -> Result<()> {
        for target in [ROOT, SCRATCH, LOWER] {
            umount(target).context(|| format!("unmounting {target}"))?;
        }
        self.control.remove(&self.lower)?;
        self.control.remove(&self.upper)?;
        *self = Disks::prepare()?;
        Ok(())
    }
}

fn mount_at(source: &Path, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(target).context(|| format!("making {target}"))?;
    mount(Some(source), target, Some(kind), flags, Some(options))
        .context(|| format!("mounting {kind} at {target}"))
}

/// The image's disk and the scratch disk.
fn find() -> Result<(Disk, Disk)> {
    let (mut image, mut scratch) = (None, None);
    let entries = fs::read_dir("/sys/block").context(|| "listing the VM's disks".into())?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("vd") {
            continue;
        }
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let disk = Disk { number: read("dev").trim().to_owned() };
        let place = if read("ro").trim() == "1" { &mut image } else { &mut scratch };
        if place.replace(disk).is_some() {
            return Err(Error::new("looking for the VM's disks", "two of a kind, where one is expected"));
        }
    }
    match (image, scratch) {
        (Some(image), Some(scratch)) => Ok((image, scratch)),
        (None, _) => {
            Err(Error::new("looking for the VM's disks", "there is no read-only disk with the image"))
        }
        (_, None) => Err(Error::new("looking for the VM's disks", "there is no writable disk for scratch")),
    }
}

struct Disk {
    /// `major:minor`, as device-mapper takes it.
    number: String,
}

/// dm-verity over the image: what does not match the root hash cannot be read.
/// Parameters as in the kernel's `admin-guide/device-mapper/verity.rst`.
fn verity(disk: &Disk, root: &RootDisk) -> Result<dm::Target> {
    let Disk { number } = disk;
    let RootDisk { data_blocks, root_hash, salt } = root;
    let parameters = format!(
        "1 {number} {number} {BLOCK} {BLOCK} {data_blocks} {data_blocks} sha256 {} {}",
        hex(root_hash),
        hex(salt)
    );
    let sectors = data_blocks
        .checked_mul(BLOCK / SECTOR)
        .ok_or_else(|| Error::invalid("setting up the image's disk", "its size is beyond any disk"))?;
    Ok(dm::Target { kind: "verity", sectors, parameters })
}

/// dm-crypt over the scratch disk, with a key that is made here, is never told to anyone, and ends with the VM.
/// Parameters as in the kernel's `admin-guide/device-mapper/dm-crypt.rst`.
fn crypt(disk: &Disk, scratch: &Scratch) -> Result<dm::Target> {
    let mut key = [0u8; 64];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut key))
        .context(|| "making the scratch disk's key".into())?;
    let options = "3 sector_size:4096 no_read_workqueue no_write_workqueue";
    let parameters = format!("aes-xts-plain64 {} 0 {} 0 {options}", hex(&key), disk.number);
    Ok(dm::Target { kind: "crypt", sectors: scratch.bytes / SECTOR, parameters })
}

/// Writes the blocks of an empty filesystem. Blocks that are not written hold noise, which ext4 never reads.
fn write_filesystem(device: &Path, scratch: &Scratch) -> Result<()> {
    let file = OpenOptions::new().write(true).open(device).context(|| "opening the scratch disk".into())?;
    let zeros = vec![0; ZEROS_MAX];
    for extent in &scratch.filesystem {
        file.write_all_at(&extent.data, extent.offset).context(|| "formatting the scratch disk".into())?;
        let (mut at, end) = (extent.offset + extent.data.len() as u64, extent.end());
        while at < end {
            let count = ZEROS_MAX.min(usize::try_from(end - at).unwrap_or(ZEROS_MAX));
            file.write_all_at(&zeros[..count], at).context(|| "formatting the scratch disk".into())?;
            at += count as u64;
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
