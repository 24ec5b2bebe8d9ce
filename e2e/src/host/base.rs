//! The disk, kernel and initramfs of a host, made from Debian's packages and kept in the user's cache.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use sha2::{Digest as _, Sha256};

use super::load::make_disk;
use crate::images::{hex, rootfs};
use crate::process::text_of;
use crate::settings;

/// The releases of Debian that hosts are made of.
pub const SUITES: [&str; 2] = ["bookworm", "trixie"];

/// Raise when the making changes, so that hosts made before are made again.
const RECIPE: u32 = 1;
const ROOM_BYTES: u64 = 1 << 30;
const QUICK: Duration = Duration::from_secs(60);
const INITRAMFS: &str = include_str!("initramfs.sh");

/// What makes a folder of files a machine, and what the tests themselves use there. What the shim needs beside these,
/// `scripts/deps` says.
const MACHINE: [&str; 7] =
    ["linux-image-cloud-amd64", "kmod", "mount", "iproute2", "busybox-static", "procps", "strace"];
/// Debian's cloud kernel has these as modules. All else, its own root disk can give.
const DRIVERS: [&str; 2] = ["virtio_pci", "virtio_blk"];
/// The kernel's package would make an initramfs with all drivers there are, which takes long to make and to unpack.
const NO_INITRAMFS: &str = "--essential-hook=mkdir -p $1/etc/initramfs-tools && \
    echo update_initramfs=no > $1/etc/initramfs-tools/update-initramfs.conf";
/// The line above is one of the package's own settings, which stay as they are found.
const KEEP_SETTINGS: &str = "--dpkgopt=force-confold";

/// What a host boots from.
#[derive(Clone, Debug)]
pub struct Base {
    /// The kernel of its release.
    pub kernel: PathBuf,
    /// What finds its disks.
    pub initramfs: PathBuf,
    /// Its root disk; never written to.
    pub disk: PathBuf,
}

impl Base {
    /// The host of a release of Debian: from the cache, or made now.
    pub fn of(suite: &str) -> Result<Self> {
        ensure!(SUITES.contains(&suite), "hosts are made of {SUITES:?}, not of {suite}");
        let cache = settings::cache_dir()?.join("test-hosts");
        fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
        let packages = packages()?;
        let recipe = format!("{RECIPE} {suite} {packages:?} {DRIVERS:?} {NO_INITRAMFS} {INITRAMFS}");
        let name = format!("{suite}-{}", &hex(&Sha256::digest(recipe))[..16]);
        let lock = cache.join(format!("{suite}.lock"));
        let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
        lock.lock().context("locking a host")?;
        let folder = cache.join(&name);
        if !folder.exists() {
            remove_older(&cache, suite)?;
            make(suite, &packages, &cache, &folder).with_context(|| format!("making a host of {suite}"))?;
        }
        let [kernel, initramfs, disk] = ["kernel", "initramfs", "disk"].map(|file| folder.join(file));
        Ok(Self { kernel, initramfs, disk })
    }
}

/// The packages of a host: what the shim needs, by the list that people use, and what makes it a machine.
fn packages() -> Result<Vec<String>> {
    let mut deps = Command::new(settings::repository().join("scripts/deps"));
    let listed = text_of(deps.arg("--list-host"), QUICK).context("listing the packages of a host")?;
    let listed = listed.lines().map(str::to_owned);
    Ok(listed.chain(MACHINE.map(str::to_owned)).collect())
}

/// A host takes half a GiB: those of other recipes go.
fn remove_older(cache: &Path, suite: &str) -> Result<()> {
    for entry in fs::read_dir(cache).context("listing hosts")? {
        let path = entry.context("listing hosts")?.path();
        let of_suite = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(suite));
        if of_suite && path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

fn make(suite: &str, packages: &[String], cache: &Path, folder: &Path) -> Result<()> {
    let work = tempfile::Builder::new().prefix("making.").tempdir_in(cache).context("making a folder")?;
    let root = work.path().join("root");
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    rootfs::mmdebstrap(suite, "essential", &packages, &[NO_INITRAMFS, KEEP_SETTINGS], &root)?;
    let made = work.path().join("made");
    fs::create_dir(&made).context("making a folder")?;
    let release = only_entry(&root.join("usr/lib/modules"))?;
    let kernel = root.join("boot").join(format!("vmlinuz-{}", release.to_string_lossy()));
    fs::copy(&kernel, made.join("kernel")).with_context(|| format!("copying {}", kernel.display()))?;
    initramfs(&root, &release, work.path(), &made.join("initramfs"))?;
    make_disk(&root, &made.join("disk"), ROOM_BYTES)?;
    fs::rename(&made, folder).with_context(|| format!("moving {} into place", folder.display()))
}

fn only_entry(folder: &Path) -> Result<std::ffi::OsString> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    ensure!(names.len() == 1, "{} has not one entry, but {names:?}", folder.display());
    Ok(names.into_iter().next().unwrap_or_default())
}

/// An initramfs with busybox, the drivers of the disks, and one script.
fn initramfs(root: &Path, release: &OsStr, work: &Path, into: &Path) -> Result<()> {
    let tree = work.join("initramfs");
    for folder in ["bin", "proc", "sys", "dev", "root", "modules"] {
        fs::create_dir_all(tree.join(folder)).with_context(|| format!("creating {folder}"))?;
    }
    fs::copy(root.join("usr/bin/busybox"), tree.join("bin/busybox")).context("copying busybox")?;
    fs::write(tree.join("init"), INITRAMFS).context("writing init")?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).context("writing init")?;
    for (number, module) in modules(root, release)?.iter().enumerate() {
        unpack_module(module, number, &tree.join("modules"))?;
    }
    let mut cpio = Command::new("sh");
    cpio.args(["-c", "cd \"$1\" && find . | cpio --quiet --create --format=newc >\"$2\"", "sh"]);
    text_of(cpio.arg(&tree).arg(into), QUICK).context("packing an initramfs").map(drop)
}

/// The files of the drivers and of all that they need, in the order of loading.
fn modules(root: &Path, release: &OsStr) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = Vec::new();
    for driver in DRIVERS {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("--dirname").arg(root).arg("--set-version").arg(release);
        let listed = text_of(modprobe.args(["--show-depends", driver]), QUICK)?;
        for path in listed.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = PathBuf::from(path.trim());
            if !found.contains(&path) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

fn unpack_module(module: &Path, number: usize, folder: &Path) -> Result<()> {
    let name = module.file_name().ok_or_else(|| anyhow!("{} has no name", module.display()))?;
    let name = name.to_string_lossy();
    let into = folder.join(format!("{number:03}-{}", name.trim_end_matches(".xz")));
    if !name.ends_with(".xz") {
        return fs::copy(module, into).with_context(|| format!("copying {name}")).map(drop);
    }
    let mut unpack = Command::new("sh");
    unpack.args(["-c", "xz --decompress --stdout \"$1\" >\"$2\"", "sh"]).arg(module).arg(into);
    text_of(&mut unpack, QUICK).with_context(|| format!("unpacking {name}")).map(drop)
}
