//! Mounts of the bundle: those that a kernel of its own can make, and the few small files that stand for the host's.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use bailey_types::guest::spec::{InjectedFile, Mount};
use oci_spec::runtime;

use crate::error::{Context, Error, Kind, Result};

/// Filesystems that need nothing of the host.
const OWN: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Files that callers bind from the host to tell a container its name and its names' servers. Their text is copied.
const COPIED: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// Largest such file, in bytes.
const COPIED_MAX: u64 = 256 << 10;

/// Splits the bundle's mounts into those of the guest and files to copy.
pub(super) fn convert(mounts: &[runtime::Mount]) -> Result<(Vec<Mount>, Vec<InjectedFile>)> {
    let (mut own, mut files) = (Vec::new(), Vec::new());
    for mount in mounts {
        let target = text(mount.destination())?;
        let options = mount.options().clone().unwrap_or_default();
        let kind = mount.typ().clone().unwrap_or_default();
        let source = mount.source().as_deref().map(text).transpose()?.unwrap_or_else(|| kind.clone());
        if kind == "bind" || options.iter().any(|option| option == "bind" || option == "rbind") {
            files.push(copy(&source, &target, options.iter().any(|option| option == "ro"))?);
        } else if OWN.contains(&kind.as_str()) {
            own.push(Mount { kind, source, target, options });
        } else {
            return Err(Error::invalid(format!(
                "the mount at {target} is of the type {kind}; a sandbox can have {}",
                OWN.join(", ")
            )));
        }
    }
    Ok((own, files))
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str();
    text.map(str::to_owned).ok_or_else(|| Error::invalid(format!("the path {} is not UTF-8", path.display())))
}

fn copy(source: &str, target: &str, readonly: bool) -> Result<InjectedFile> {
    if !COPIED.contains(&target) {
        return Err(Error::invalid(format!(
            "the mount of {source} at {target} asks for a path of the host, which no sandbox can see"
        )));
    }
    let doing = || format!("copying {source} for {target}");
    // Not a pipe that would be waited for, nor a device.
    let file =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(source);
    let file = file.context_as(Kind::Invalid, doing)?;
    let about = file.metadata().context_as(Kind::Invalid, doing)?;
    if !about.is_file() || about.len() > COPIED_MAX {
        let text = format!("{source}, for {target}, is no file of at most {COPIED_MAX} bytes");
        return Err(Error::invalid(text));
    }
    let mut data = Vec::new();
    file.take(COPIED_MAX).read_to_end(&mut data).context_as(Kind::Invalid, doing)?;
    Ok(InjectedFile { target: target.to_owned(), mode: about.permissions().mode() & 0o777, data, readonly })
}
