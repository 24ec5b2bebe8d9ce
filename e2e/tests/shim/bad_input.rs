//! What is wrong with the machine, the settings or the container is told in one error, and nothing is left (A8).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::ctr::Run;
use bailey_e2e::images::{Image, busybox};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::process::text_of;
use bailey_e2e::settings::{self, only_ours};

const QUICK: Duration = Duration::from_secs(30);
const GUEST_FILES: [&str; 3] = ["vmlinux", "initramfs.cpio", "manifest.json"];

/// An archive without files, in the form that kernels unpack.
fn empty_initramfs() -> Vec<u8> {
    let name = "TRAILER!!!\0";
    let mut archive = format!("070701{:0>88}{:08x}{:08}{name}", "", name.len(), 0).into_bytes();
    archive.resize(512, 0);
    archive
}

/// A test of what only our shim refuses.
fn ours(body: impl FnOnce(&mut Machine, &Image) -> Result<()>) -> Result<()> {
    if !only_ours("its settings and its checks") {
        return Ok(());
    }
    test_with(&busybox(), body)
}

/// Runs what cannot work; the one error that it ends with has all these words.
fn refused(run: Run<'_>, words: &[&str]) -> Result<String> {
    let output = run.output()?;
    let said = output.errors();
    ensure!(output.code != 0, "it ran: {output:?}");
    let errors = said.lines().filter(|line| line.starts_with("ctr: ")).count();
    ensure!(errors == 1 && output.stdout.is_empty(), "not one error, but: {output:?}");
    for word in words {
        ensure!(said.contains(word), "it does not say {word:?}: {said}");
    }
    Ok(said)
}

/// A copy of the guest that the machine's microVMs boot from now on, to be damaged.
fn copied_guest(machine: &Machine) -> Result<PathBuf> {
    let all = machine.containerd.folder().join("guest");
    let folder = all.join("bailey");
    fs::create_dir_all(&folder).context("making a folder for the guest")?;
    let given = settings::guest_dir()?;
    let flavour = ["bailey", "debian"].map(|flavour| given.join(flavour));
    let flavour = flavour.iter().find(|folder| folder.exists()).context("there is no guest")?;
    for name in GUEST_FILES {
        fs::copy(flavour.join(name), folder.join(name)).with_context(|| format!("copying {name}"))?;
    }
    machine.containerd.set_shim(&[("guest_dir", &format!("{all:?}"))])?;
    Ok(folder)
}

/// Makes the guest's kernel find no first process. `more` are boot parameters.
fn without_init(guest: &Path, more: &str) -> Result<()> {
    fs::write(guest.join("initramfs.cpio"), empty_initramfs()).context("writing an initramfs")?;
    let path = guest.join("manifest.json");
    let text = fs::read_to_string(&path).context("reading the manifest")?;
    let mut manifest: serde_json::Value = serde_json::from_str(&text).context("reading the manifest")?;
    let cmdline = format!("{} {more}", manifest["cmdline"].as_str().unwrap_or_default());
    manifest["cmdline"] = cmdline.into();
    fs::write(&path, manifest.to_string()).context("writing the manifest")
}

#[test]
fn no_guest() -> Result<()> {
    ours(|machine, image| {
        let empty = machine.containerd.folder().join("empty");
        fs::create_dir(&empty)?;
        machine.containerd.set_shim(&[("guest_dir", &format!("{empty:?}"))])?;
        let said = ["no guest kernel below", &empty.to_string_lossy(), "cargo xtask guest-image"];
        refused(machine.run(image).args(&["true"]), &said).map(drop)
    })
}

#[test]
fn a_guest_without_its_files() -> Result<()> {
    ours(|machine, image| {
        let guest = copied_guest(machine)?;
        fs::remove_file(guest.join("initramfs.cpio"))?;
        let said = ["initramfs.cpio is missing", "make the guest image again"];
        refused(machine.run(image).args(&["true"]), &said)?;
        fs::write(guest.join("manifest.json"), "{\"flavour\": ")?;
        let said = [guest.join("manifest.json").to_string_lossy().into_owned(), "EOF".to_owned()];
        refused(machine.run(image).args(&["true"]), &said.each_ref().map(String::as_str)).map(drop)
    })
}

#[test]
fn no_vmm() -> Result<()> {
    ours(|machine, image| {
        machine.containerd.set_shim(&[("qemu", "\"/no/such/qemu\"")])?;
        refused(machine.run(image).args(&["true"]), &["no QEMU at /no/such/qemu", "install", "or set qemu"])
            .map(drop)
    })
}

#[test]
fn wrong_settings() -> Result<()> {
    ours(|machine, image| {
        let path = machine.containerd.shim_config();
        let file = path.to_string_lossy().into_owned();
        machine.containerd.set_shim(&[("memory", "\"much\"")])?;
        refused(machine.run(image).args(&["true"]), &[&file, "memory", "much"])?;
        machine.containerd.set_shim(&[("memory", "\"512MiB\""), ("memroy", "1")])?;
        refused(machine.run(image).args(&["true"]), &[&file, "memroy"])?;
        // What looks for leftovers reads them, too.
        let text = fs::read_to_string(&path)?.replace("memroy = 1", "");
        fs::write(&path, text).context("mending the settings")
    })
}

#[test]
fn wrong_annotations() -> Result<()> {
    ours(|machine, image| {
        let wrong = [
            ("dev.bailey.sratch", "64MiB", "not known"),
            ("dev.bailey.scratch", "1MiB", "less than"),
            ("dev.bailey.scratch", "plenty", "such as 512MiB"),
            ("dev.bailey.class", "vm", "microvm"),
            ("dev.bailey.start", "hot", "cold"),
            ("dev.bailey.io.read-bps", "0", "zero"),
        ];
        for (name, value, why) in wrong {
            let run = machine.run(image).annotation(name, value).args(&["true"]);
            refused(run, &[name, value, why])?;
        }
        Ok(())
    })
}

#[test]
fn too_little_memory() -> Result<()> {
    ours(|machine, image| {
        let run = machine.run(image).memory_mib(1).args(&["true"]);
        refused(run, &["memory limit of 1048576 bytes is too small", "the least is"]).map(drop)
    })
}

#[test]
fn a_specification_without_a_root_folder() -> Result<()> {
    ours(|machine, image| {
        let missing = machine.containerd.folder().join("no-such-root");
        let run = machine.run(image).args(&["true"]).with_spec(&missing, |_| Ok(()))?;
        refused(run, &[&missing.to_string_lossy(), "not there"]).map(drop)
    })
}

#[test]
fn a_specification_without_its_parts() -> Result<()> {
    ours(|machine, image| {
        let root = machine.containerd.folder().to_path_buf();
        for part in ["linux", "process"] {
            let run = machine.run(image).args(&["true"]).with_spec(&root, |spec| {
                spec[part] = serde_json::Value::Null;
                Ok(())
            })?;
            refused(run, &[part])?;
        }
        Ok(())
    })
}

#[test]
fn an_image_changed_on_disk_is_not_read() -> Result<()> {
    ours(|machine, image| {
        let read = ["cat", "/bin/busybox"];
        let good = machine.run(image).args(&read).output()?.success()?.stdout;
        let path = only_image(machine)?;
        let bytes = fs::read(&path).context("reading the image")?;
        // A byte of a program's text, of which the image has one copy; and one of the filesystem's own.
        let part = &good[good.len() / 2..][..256];
        let at = bytes.windows(part.len()).position(|window| window == part).context("not in the image")?;
        for at in [at, 1024 + 16] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).context("changing the image")?;
            let output = machine.run(image).args(&read).output()?;
            ensure!(output.code != 0, "byte {at} was changed, and nobody noticed");
            ensure!(output.stdout != good && !output.errors().is_empty(), "byte {at}: {}", output.errors());
        }
        fs::write(&path, bytes).context("mending the image")?;
        machine.run(image).args(&read).output()?.success().map(drop)
    })
}

/// The one image that the shim has made.
fn only_image(machine: &Machine) -> Result<PathBuf> {
    let folder = machine.containerd.shim_cache_dir().join("images").join(machine.containerd.namespace());
    let files = fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?.flatten();
    let images = files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "img"));
    let images: Vec<PathBuf> = images.collect();
    ensure!(images.len() == 1, "not one image, but {images:?}");
    Ok(images.into_iter().next().unwrap_or_default())
}

#[test]
fn no_space_for_images() -> Result<()> {
    ours(|machine, image| {
        let cache = machine.containerd.shim_cache_dir();
        fs::create_dir_all(&cache)?;
        let mut mount = machine.containerd.command("mount");
        text_of(mount.args(["-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs"]).arg(&cache), QUICK)?;
        let said = refused(machine.run(image).args(&["true"]), &[&cache.to_string_lossy()]);
        text_of(machine.containerd.command("umount").arg(&cache), QUICK)?;
        let said = said?;
        ensure!(said.to_lowercase().contains("no space left"), "does not say what is full: {said}");
        // It goes on where there is space.
        machine.run(image).args(&["true"]).output()?.success().map(drop)
    })
}

#[test]
fn a_kernel_that_is_none() -> Result<()> {
    ours(|machine, image| {
        let guest = copied_guest(machine)?;
        fs::write(guest.join("vmlinux"), vec![0; 1 << 20])?;
        machine.containerd.set_shim(&[("boot_timeout_seconds", "5")])?;
        refused(machine.run(image).args(&["true"]), &["its last words: "]).map(drop)
    })
}

#[test]
fn a_guest_that_panics_is_quoted() -> Result<()> {
    ours(|machine, image| {
        without_init(&copied_guest(machine)?, "")?;
        refused(machine.run(image).args(&["true"]), &["Kernel panic - not syncing"]).map(drop)
    })
}

#[test]
fn a_guest_that_hangs_is_given_up() -> Result<()> {
    ours(|machine, image| {
        // It waits forever after its panic.
        without_init(&copied_guest(machine)?, "panic=0")?;
        machine.containerd.set_shim(&[("boot_timeout_seconds", "10"), ("start", "\"cold\"")])?;
        let begun = Instant::now();
        let said = ["has not booted within 10 s", "Kernel panic - not syncing"];
        refused(machine.run(image).args(&["true"]), &said)?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(40), "given up after {took:?}");
        Ok(())
    })
}
