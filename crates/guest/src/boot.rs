//! From the kernel's hand-over to a VM that can be set up: filesystems of the kernel's own, modules.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use crate::error::{Context, Error, Result};
use crate::sys;

/// Where the VM's own root is put together, before it becomes the root.
const NEW_ROOT: &str = "/root.new";

/// Leaves the initramfs for a root of its own, with what the kernel itself offers mounted in it.
///
/// A container's root cannot be pivoted to from the initramfs, which is no ordinary mount.
pub(crate) fn make_root() -> Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let small = "mode=0755,size=8m";
    for (kind, target, flags, options) in [
        ("tmpfs", "", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, small),
        ("proc", "/proc", quiet, ""),
        ("sysfs", "/sys", quiet, ""),
        ("cgroup2", "/sys/fs/cgroup", quiet, ""),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0755"),
        ("tmpfs", "/run", quiet, small),
    ] {
        let target = format!("{NEW_ROOT}{target}");
        fs::create_dir_all(&target).context(|| format!("making {target}"))?;
        mount(Some(kind), target.as_str(), Some(kind), flags, Some(options))
            .context(|| format!("mounting {target}"))?;
    }
    Ok(())
}

/// Makes the new root the root.
pub(crate) fn enter_root() -> Result<()> {
    chdir(NEW_ROOT).context(|| format!("entering {NEW_ROOT}"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context(|| "moving the new root".into())?;
    chroot(".").context(|| "changing the root".into())?;
    chdir("/").context(|| "entering the root".into())
}

/// Loads the modules of the initramfs in their order, then forbids loading any more.
pub(crate) fn load_modules() -> Result<()> {
    let order = Path::new("/modules/order");
    if let Ok(names) = fs::read_to_string(order) {
        for name in names.lines().filter(|name| !name.is_empty()) {
            let path = Path::new("/modules").join(name);
            let file = fs::File::open(&path).context(|| format!("opening the module {name}"))?;
            match sys::finit_module(file.as_fd()) {
                Ok(()) => {}
                // Built in, or a driver for hardware that is not there: what is missed shows where it is needed.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENODEV)) => {}
                Err(error) => return Err(Error::new(format!("loading the module {name}"), error)),
            }
        }
        // The memory of a template is paid for by each of its clones' tenants.
        fs::remove_dir_all("/modules").context(|| "removing the loaded modules' files".into())?;
    }
    match fs::write(format!("{NEW_ROOT}/proc/sys/kernel/modules_disabled"), "1") {
        // A kernel without modules has no such switch.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.context(|| "forbidding further modules".into()),
    }
}
