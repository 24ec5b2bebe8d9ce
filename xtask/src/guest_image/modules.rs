//! Which kernel modules the guest loads, and in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::tool::{command, filter, read, text_of};

/// What the guest uses. A name marked "optional" may be missing: some kernels have its work built in under another
/// name, or the generic code does.
const WANTED: [(&str, Need); 23] = [
    ("virtio_mmio", Need::Must),
    ("virtio_blk", Need::Must),
    ("virtio_console", Need::Must),
    ("virtio_net", Need::Must),
    ("virtio_rng", Need::Must),
    ("crc32c_intel", Need::Optional),
    ("jbd2", Need::Must),
    ("ext4", Need::Must),
    ("erofs", Need::Must),
    ("overlay", Need::Must),
    ("vsock", Need::Must),
    ("vmw_vsock_virtio_transport", Need::Must),
    ("cryptd", Need::Must),
    ("aesni_intel", Need::Must),
    ("ecb", Need::Must),
    ("xts", Need::Must),
    ("sha256_generic", Need::Optional),
    ("sha256_ssse3", Need::Optional),
    ("dm_mod", Need::Must),
    ("dm_crypt", Need::Must),
    ("dm_verity", Need::Must),
    ("tun", Need::Must),
    ("fuse", Need::Optional),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Must,
    Optional,
}

/// The names of what is wanted: a part of what decides whether an image is up to date.
pub(super) fn wanted_names() -> String {
    WANTED.map(|(name, _)| name).join(" ")
}

/// Unpacks the wanted modules of the kernel in `root` as `NNN-name.ko`, numbered in the order of loading.
pub(super) fn stage(root: &Path, release: &str, into: &Path) -> Result<Vec<String>> {
    let modules = root.join("lib/modules").join(release);
    text_of(command("/sbin/depmod").arg("-b").arg(root).arg(release)).context("resolving modules")?;
    let dependencies = read(&modules.join("modules.dep"))?;
    let built_in = read(&modules.join("modules.builtin"))?;
    let order = load_order(&String::from_utf8_lossy(&dependencies), &String::from_utf8_lossy(&built_in))?;
    fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    let mut names = Vec::new();
    for (number, path) in order.iter().enumerate() {
        let name = format!("{number:03}-{}.ko", stem(path));
        let target = into.join(&name);
        fs::write(&target, content(&modules.join(path))?)
            .with_context(|| format!("writing {}", target.display()))?;
        names.push(name);
    }
    Ok(names)
}

/// A module's content, decompressed if it is compressed.
fn content(path: &Path) -> Result<Vec<u8>> {
    let packed = read(path)?;
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("zst") => "zstd",
        Some("xz") => "xz",
        Some("gz") => "gzip",
        _ => return Ok(packed),
    };
    filter(command(program).arg("-dc"), packed).with_context(|| format!("unpacking {}", path.display()))
}

/// A module's name from its path, as the kernel spells it: dashes are underscores.
fn stem(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The paths of the wanted modules, each after all that it depends upon.
fn load_order(dependencies: &str, built_in: &str) -> Result<Vec<String>> {
    let built_in: BTreeSet<String> = built_in.lines().map(stem).collect();
    let mut known = BTreeMap::new();
    for line in dependencies.lines() {
        let (path, needs) = line.split_once(':').ok_or_else(|| anyhow!("reading modules.dep: {line}"))?;
        known.insert(stem(path), (path, needs.split_whitespace().map(stem).collect::<Vec<_>>()));
    }
    let mut order = Vec::new();
    let mut done = BTreeSet::new();
    for (name, need) in WANTED {
        if known.contains_key(name) {
            visit(name, &known, &mut done, &mut order)?;
        } else if need == Need::Must && !built_in.contains(name) {
            bail!("choosing modules: this kernel has no {name}, neither as a module nor built in");
        }
    }
    Ok(order)
}

fn visit(
    name: &str,
    known: &BTreeMap<String, (&str, Vec<String>)>,
    done: &mut BTreeSet<String>,
    order: &mut Vec<String>,
) -> Result<()> {
    if !done.insert(name.to_owned()) {
        return Ok(());
    }
    let (path, needs) =
        known.get(name).ok_or_else(|| anyhow!("choosing modules: {name} is needed but is not there"))?;
    for need in needs {
        visit(need, known, done, order)?;
    }
    order.push((*path).to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILT_IN: &str = "kernel/a/jbd2.ko\nkernel/a/ext4.ko\nkernel/a/erofs.ko\nkernel/a/overlay.ko\n\
        kernel/a/vsock.ko\nkernel/a/vmw_vsock_virtio_transport.ko\nkernel/a/cryptd.ko\nkernel/a/aesni-intel.ko\n\
        kernel/a/ecb.ko\nkernel/a/xts.ko\nkernel/a/dm-mod.ko\nkernel/a/dm-crypt.ko\nkernel/a/dm-verity.ko\n\
        kernel/a/tun.ko\n";
    const DEPENDENCIES: &str = "k/virtio_mmio.ko: k/virtio.ko.xz k/virtio_ring.ko\nk/virtio_ring.ko:\n\
        k/virtio.ko.xz: k/virtio_ring.ko\nk/virtio_blk.ko:\nk/virtio_console.ko:\nk/virtio-rng.ko:\n\
        k/virtio_net.ko: k/net_failover.ko k/failover.ko\nk/net_failover.ko: k/failover.ko\nk/failover.ko:\n";

    #[test]
    fn modules_come_after_what_they_need() {
        let order = load_order(DEPENDENCIES, BUILT_IN).unwrap();
        let names: Vec<_> = order.iter().map(|path| stem(path)).collect();
        let wanted = ["virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "failover"];
        assert_eq!(names[..6], wanted);
        assert_eq!(names[6..], ["net_failover", "virtio_net", "virtio_rng"]);
    }

    #[test]
    fn missing_module_is_named() {
        let error = load_order(DEPENDENCIES, "").unwrap_err();
        assert!(error.to_string().contains("no jbd2"), "{error}");
    }
}
