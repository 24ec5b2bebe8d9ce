//! The container's root filesystem: entered first, so that every path after that is resolved inside of it, however
//! the image's symbolic links point.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bailey_types::guest::spec::{Container, InjectedFile};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root, sethostname};

use super::mounts;
use crate::disk::ROOT;
use crate::error::{Context, Result};
use crate::sys;

/// Pivots into the image's root and mounts what the container asks for.
pub(super) fn enter(spec: &Container) -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context(|| "making the mounts private".into())?;
    chdir(ROOT).context(|| "entering the image".into())?;
    pivot_root(".", ".").context(|| "making the image the root".into())?;
    umount2(".", MntFlags::MNT_DETACH).context(|| "letting go of the VM's own root".into())?;
    chdir("/").context(|| "entering the root".into())?;
    mounts::mount_all(spec)?;
    for file in &spec.files {
        inject(file)?;
    }
    sys::loopback_up().context(|| "setting up the loopback interface".into())?;
    if let Some(name) = &spec.hostname {
        sethostname(name).context(|| format!("setting the host name {name}"))?;
    }
    Ok(())
}

/// Takes away what the container must not change or see, once everything else is in place.
pub(super) fn seal(spec: &Container) -> Result<()> {
    for (name, value) in &spec.sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).context(|| format!("setting the sysctl {name} to {value}"))?;
    }
    for path in &spec.readonly_paths {
        mounts::make_readonly(Path::new(path))?;
    }
    for path in &spec.masked_paths {
        mounts::mask(Path::new(path))?;
    }
    if spec.readonly_root {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .context(|| "making the root read-only".into())?;
    }
    Ok(())
}

fn inject(file: &InjectedFile) -> Result<()> {
    let target = Path::new(&file.target);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).context(|| format!("making {}", parent.display()))?;
    }
    fs::write(target, &file.data).context(|| format!("writing {}", target.display()))?;
    fs::set_permissions(target, fs::Permissions::from_mode(file.mode))
        .context(|| format!("setting the mode of {}", target.display()))?;
    if file.readonly { mounts::make_readonly(target) } else { Ok(()) }
}
