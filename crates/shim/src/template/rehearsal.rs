//! What a spare rehearses with: an image of one tiny program, and a container as containerd's clients usually ask for.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use bailey_types::guest::message::Request;
use bailey_types::guest::spec::RootDisk;
use oci_spec::runtime::Spec;

use crate::bundle::{self, IoLimits};
use crate::config::Config;
use crate::error::{Context, Result};
use crate::image::{self, Image, Layers, Maker};
use crate::scratch;
use crate::vm::{self, CGROUP_TOP};
use crate::vmm::Disks;

/// The scratch disk's size, in bytes: what is done with it does not depend on it.
const SCRATCH: u64 = 16 << 20;

/// A program for Linux on x86-64 that says `.` and ends: an ELF header, one segment, the code.
#[rustfmt::skip]
const PROGRAM: [u8; 158] = [
    // ELF, 64 bits, little-endian, version 1; executable, x86-64.
    0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x3e, 0, 1, 0, 0, 0,
    // Entry at 0x400078; program headers at 64, section headers nowhere.
    0x78, 0, 0x40, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // Sizes: this header 64, one program header of 56.
    0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    // Load, readable and executable, the whole file at 0x400000, in pages of 4 KiB.
    1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0,
    158, 0, 0, 0, 0, 0, 0, 0, 158, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,
    // write(1, ".", 1): mov eax, 1; mov edi, eax; lea rsi, [rip + 20]; mov edx, eax; syscall
    0xb8, 1, 0, 0, 0, 0x89, 0xc7, 0x48, 0x8d, 0x35, 20, 0, 0, 0, 0x89, 0xc2, 0x0f, 0x05,
    // exit_group(0): xor edi, edi; mov eax, 231; syscall; int3 …
    0x31, 0xff, 0xb8, 231, 0, 0, 0, 0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, b'.', 0xcc, 0xcc, 0xcc,
];

/// Makes the image.
pub(super) fn image(config: &Config, namespace: &str) -> Result<Image> {
    let doing = || "making the image of a rehearsal".to_owned();
    fs::create_dir_all(&config.cache_dir).context(doing)?;
    let name = format!("rehearsal-{}", std::process::id());
    let bundle = config.cache_dir.join(&name);
    let cgroup = Path::new(CGROUP_TOP).join(namespace).join(&name);
    let maker =
        Maker { config: config.clone(), namespace: namespace.to_owned(), cgroup, bundle: bundle.clone() };
    let made = write_root(&bundle.join("rootfs")).context(doing).and_then(|()| {
        let layers = Layers::from_mounts(&[], &bundle.join("rootfs"))?;
        image::prepare(&maker, &layers)
    });
    let removed = fs::remove_dir_all(&bundle);
    let made = made?;
    removed.context(doing)?;
    Ok(made)
}

fn write_root(root: &Path) -> std::io::Result<()> {
    let mut folders = DirBuilder::new();
    folders.recursive(true).mode(0o755);
    for folder in ["bin", "dev", "proc", "sys", "etc"] {
        folders.create(root.join(folder))?;
    }
    let mut program = File::options().write(true).create_new(true).mode(0o755).open(root.join("bin/true"))?;
    program.write_all(&PROGRAM)
}

/// The disks of a rehearsal, and what is asked of the guest.
pub(super) fn request(config: &Config, image: File, root: RootDisk) -> Result<(Disks, Request)> {
    let filesystem = scratch::filesystem(&config.cache_dir, SCRATCH)?;
    let disks = Disks {
        root: image,
        scratch: scratch::create(&config.cache_dir, SCRATCH, 1)?,
        io: IoLimits::default(),
    };
    let mut plan = bundle::plan(&specification()?, "rehearsal", "rehearsal", false)?;
    plan.container.process.stdout = true;
    let request = Request::Rehearse {
        setup: Box::new(vm::setup(root, filesystem)?),
        container: Box::new(plan.container),
    };
    Ok((disks, request))
}

/// The usual mounts, masks and capabilities, and our program.
fn specification() -> Result<Spec> {
    let doing = || "writing the specification of a rehearsal".to_owned();
    let mut spec = Spec::default();
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(vec!["/bin/true".to_owned()])).set_terminal(Some(false));
    spec.set_process(Some(process));
    // A path that containerd would name; there is no container whose cgroup it could be.
    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_cgroups_path(Some("/rehearsal".into()));
    spec.set_linux(Some(linux));
    let text = serde_json::to_vec(&spec).context(doing)?;
    serde_json::from_slice(&text).context(doing)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_runs_says_something_and_ends_well() {
        let folder = tempfile::tempdir().unwrap();
        write_root(folder.path()).unwrap();
        let output = Command::new(folder.path().join("bin/true")).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"."[..]));
    }

    #[test]
    fn what_is_rehearsed_is_a_container_like_any_other() {
        let plan = bundle::plan(&specification().unwrap(), "rehearsal", "rehearsal", false).unwrap();
        let kinds: Vec<_> = plan.container.mounts.iter().map(|mount| mount.kind.as_str()).collect();
        for kind in ["proc", "tmpfs", "devpts", "sysfs"] {
            assert!(kinds.contains(&kind), "{kinds:?}");
        }
        assert!(!plan.container.masked_paths.is_empty());
    }
}
