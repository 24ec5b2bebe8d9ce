//! `cargo xtask guest-image`: what a microVM boots. One folder for each kernel ("flavour"), with the kernel, an
//! initramfs that holds bailey-guest as /init, and a manifest that tells the host how to boot them.

mod cpio;
mod modules;
pub(crate) mod packages;
pub(crate) mod vmlinux;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::tool::{self, say};
use packages::{Apt, Package};

/// Raise when the making changes, so that images made before are made again.
const RECIPE: u32 = 3;
/// Work that every kernel that we boot may leave out, a tenth of a second under emulation: rewriting all lock prefixes
/// on a machine with one processor, and testing the timer.
pub(crate) const QUICK_BOOT: &str = "noreplace-smp no_timer_check";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// How a kernel looks and wants to be booted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Kernel {
    /// The release, as `uname -r` tells it.
    pub(crate) kernel: String,
    /// "debian" (the distribution's own) or "bailey" (from `cargo xtask guest-kernel`).
    pub(crate) flavour: String,
    /// "elf", which QEMU boots by its PVH note, or "bzimage", where the kernel has none.
    pub(crate) format: String,
    /// What this kernel needs on its command line, besides what the host puts there for every kernel.
    pub(crate) cmdline: String,
    /// Whether the machine must have ACPI, because the kernel finds its devices by it.
    pub(crate) acpi: bool,
    /// Whether the kernel finds virtio devices by its command line.
    pub(crate) virtio_mmio_cmdline: bool,
    /// The modules in the initramfs, in the order of loading.
    pub(crate) modules: Vec<String>,
}

/// What is written beside the kernel and the initramfs.
#[derive(Serialize, Deserialize)]
struct Manifest {
    #[serde(flatten)]
    kernel: Kernel,
    sha256: Hashes,
    /// A hash over all that went in: equal means that making it again would change nothing.
    inputs: String,
}

#[derive(Serialize, Deserialize)]
struct Hashes {
    vmlinux: String,
    initramfs: String,
}

/// What `kernel.json` says in a folder with a kernel that is ready to be put into an image; beside it are `vmlinux`
/// and, where the kernel has modules, `modules/`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Staged {
    #[serde(flatten)]
    pub(crate) kernel: Kernel,
    pub(crate) vmlinux_sha256: String,
    /// What it was made from; equal means that making it again would change nothing.
    pub(crate) made_from: String,
}

pub(crate) const KERNEL_JSON: &str = "kernel.json";

/// Makes the image of every flavour: always with the distribution's kernel, and with our own where that was built.
pub(crate) fn make(guest_dir: &Path, if_missing: bool) -> Result<()> {
    let debian = guest_dir.join("debian");
    let bailey = guest_dir.join("bailey");
    if if_missing && is_complete(&debian) && (is_complete(&bailey) || !bailey.join(KERNEL_JSON).exists()) {
        say(format_args!("guest image: {} is there", guest_dir.display()));
        return Ok(());
    }
    let work = tool::work_dir(guest_dir)?;
    let _lock = tool::lock(&work, "image.lock")?;
    let guest = build_guest()?;
    let mut apt = Apt::new(&work);
    let packages = apt.newest_kernel()?;
    assemble(&stage_packages(&work, &mut apt, &packages)?, &debian, &guest)?;
    if bailey.join(KERNEL_JSON).exists() {
        assemble(&bailey, &bailey, &guest)?;
    }
    Ok(())
}

/// Makes the image with our own kernel, which guest-kernel has just put there.
pub(crate) fn make_bailey(guest_dir: &Path) -> Result<()> {
    let _lock = tool::lock(&tool::work_dir(guest_dir)?, "image.lock")?;
    let bailey = guest_dir.join("bailey");
    assemble(&bailey, &bailey, &build_guest()?)
}

fn is_complete(dir: &Path) -> bool {
    ["vmlinux", "initramfs.cpio", "manifest.json"].iter().all(|name| dir.join(name).exists())
}

/// Builds bailey-guest, linked statically, in a target folder of its own so that its flags disturb no other build.
fn build_guest() -> Result<Vec<u8>> {
    let root = tool::repository();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let target = target.join("guest-image");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = tool::command(cargo);
    build.args(["build", "--quiet", "--locked", "--profile", "guest", "--package", "bailey-guest"]);
    build.args(["--target", TARGET, "--target-dir"]).arg(&target);
    // Paths of this machine would make the binary differ from one that was built elsewhere.
    let flags = format!("-C target-feature=+crt-static --remap-path-prefix={}=/bailey", root.display());
    build.current_dir(root).env("RUSTFLAGS", flags).env_remove("CARGO_ENCODED_RUSTFLAGS");
    tool::run(&mut build).context("building bailey-guest")?;
    tool::read(&target.join(TARGET).join("guest/bailey-guest"))
}

/// Takes kernel and modules out of the distribution's packages. What it makes is kept until the packages or the
/// wanted modules change: our own code has no part in it.
fn stage_packages(work: &Path, apt: &mut Apt, packages: &[Package]) -> Result<PathBuf> {
    let ids: Vec<String> = packages.iter().map(Package::id).collect();
    let key = tool::sha256(format!("{RECIPE} {ids:?} {}", modules::wanted_names()).as_bytes());
    let stages = work.join("stages");
    let stage = stages.join(&key);
    if stage.exists() {
        return Ok(stage);
    }
    tool::remove_dir(&stages)?;
    let unpacked = work.join("unpacked");
    tool::remove_dir(&unpacked)?;
    for package in packages {
        apt.unpack(package, &unpacked)?;
    }
    let half_made = stages.join("new");
    let ids = ids.join(", ");
    stage_kernel(&unpacked, &half_made, &ids).with_context(|| format!("preparing the kernel of {ids}"))?;
    tool::remove_dir(&unpacked)?;
    fs::rename(&half_made, &stage).with_context(|| format!("moving {} into place", stage.display()))?;
    Ok(stage)
}

fn stage_kernel(root: &Path, into: &Path, made_from: &str) -> Result<()> {
    let (image, release) = find_kernel(root)?;
    // Distributions with a merged /usr ship modules in /usr/lib; depmod looks into /lib.
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("linking lib to usr/lib")?;
    }
    let modules = modules::stage(root, &release, &into.join("modules"))?;
    let image = tool::read(&image)?;
    let path = into.join("vmlinux");
    let mut vmlinux = vmlinux::extract(&image)?;
    tool::write(&path, &vmlinux)?;
    let mut format = "elf";
    if !vmlinux::has_pvh_note(&path)? {
        (format, vmlinux) = ("bzimage", image);
        tool::write(&path, &vmlinux)?;
    }
    let kernel = Kernel {
        kernel: release,
        flavour: "debian".into(),
        format: format.into(),
        // Testing every cipher takes another quarter of a second.
        cmdline: format!("cryptomgr.notests {QUICK_BOOT}"),
        acpi: true,
        virtio_mmio_cmdline: false,
        modules,
    };
    describe(into, kernel, &vmlinux, made_from)
}

/// Writes down what kernel is in a folder.
pub(crate) fn describe(dir: &Path, kernel: Kernel, vmlinux: &[u8], made_from: &str) -> Result<()> {
    let staged = Staged { kernel, vmlinux_sha256: tool::sha256(vmlinux), made_from: made_from.to_owned() };
    tool::write(&dir.join(KERNEL_JSON), &serde_json::to_vec_pretty(&staged)?)
}

/// The bzImage in an unpacked package, and its release.
fn find_kernel(root: &Path) -> Result<(PathBuf, String)> {
    let boot = root.join("boot");
    for entry in fs::read_dir(&boot).with_context(|| format!("listing {}", boot.display()))? {
        let entry = entry.with_context(|| format!("listing {}", boot.display()))?;
        if let Some(release) = entry.file_name().to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
            return Ok((entry.path(), release.to_owned()));
        }
    }
    Err(anyhow!("looking for a kernel: the package has no boot/vmlinuz-…"))
}

/// Puts kernel, modules and init together, unless that was done with the same inputs before.
fn assemble(stage: &Path, out: &Path, guest: &[u8]) -> Result<()> {
    let staged = tool::read(&stage.join(KERNEL_JSON))?;
    let inputs = [&staged[..], tool::sha256(guest).as_bytes(), &RECIPE.to_le_bytes()].concat();
    let inputs = tool::sha256(&inputs);
    let Staged { kernel, vmlinux_sha256, .. } = serde_json::from_slice(&staged)
        .with_context(|| format!("reading {}", stage.join(KERNEL_JSON).display()))?;
    let label = format!("guest image: {} ({}, kernel {})", out.display(), kernel.flavour, kernel.kernel);
    if is_complete(out) && made_from(out).is_some_and(|before| before == inputs) {
        say(format_args!("{label} is up to date"));
        return Ok(());
    }
    let initramfs = initramfs(&kernel, stage, guest)?;
    // The manifest goes first and comes last: while it is there, it is true.
    let manifest_path = out.join("manifest.json");
    if manifest_path.exists() {
        fs::remove_file(&manifest_path).with_context(|| format!("removing {}", manifest_path.display()))?;
    }
    let vmlinux = tool::read(&stage.join("vmlinux"))?;
    if stage != out {
        tool::write(&out.join("vmlinux"), &vmlinux)?;
    }
    tool::write(&out.join("initramfs.cpio"), &initramfs)?;
    let sha256 = Hashes { vmlinux: vmlinux_sha256, initramfs: tool::sha256(&initramfs) };
    let modules = kernel.modules.len();
    let manifest = serde_json::to_vec_pretty(&Manifest { kernel, sha256, inputs })?;
    tool::write(&manifest_path, &manifest)?;
    let (kernel_size, initramfs_size) = (vmlinux.len() >> 10, initramfs.len() >> 10);
    say(format_args!(
        "{label} made: kernel {kernel_size} KiB, initramfs {initramfs_size} KiB, {modules} modules"
    ));
    Ok(())
}

fn made_from(out: &Path) -> Option<String> {
    let manifest: Manifest = serde_json::from_slice(&fs::read(out.join("manifest.json")).ok()?).ok()?;
    Some(manifest.inputs)
}

fn initramfs(kernel: &Kernel, stage: &Path, guest: &[u8]) -> Result<Vec<u8>> {
    let mut archive = cpio::Archive::default();
    for directory in ["dev", "etc", "modules", "proc", "run", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, guest.to_vec());
    let mut order = String::new();
    for name in &kernel.modules {
        let module = tool::read(&stage.join("modules").join(name))?;
        archive.file(&format!("modules/{name}"), 0o644, module);
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.into_bytes());
    archive.write()
}
