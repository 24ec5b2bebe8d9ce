//! Runs `mkfs.erofs` over the merged layers, in a mount namespace of a thread's own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::Layers;
use crate::error::{Context, Error, Result};

/// Makes the filesystem image `target` from `layers`, merged at `rootfs`.
pub(super) fn make(target: &Path, rootfs: &Path, layers: &Layers) -> Result<()> {
    let (target, rootfs, layers) = (target.to_owned(), rootfs.to_owned(), layers.clone());
    // Namespaces belong to threads: this one's mounts are seen by nobody else, and end with it.
    let thread = thread::Builder::new().name("image".into()).spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).context(|| "making a mount namespace".into())?;
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).context(|| "hiding our mounts".into())?;
        merge(&rootfs, &layers.folders)?;
        run_mkfs(&target, &rootfs)
    });
    let done = thread.context(|| "starting a thread".into())?.join();
    done.unwrap_or_else(|_| Err(Error::internal("making the image of the root filesystem ended in a panic")))
}

/// Mounts the folders, the first on top, read-only at `rootfs`.
fn merge(rootfs: &Path, folders: &[PathBuf]) -> Result<()> {
    if let [one] = folders {
        if one == rootfs {
            return Ok(());
        }
        let bind = MsFlags::MS_BIND;
        return mount(Some(one), rootfs, None::<&str>, bind, None::<&str>)
            .context(|| format!("binding {}", one.display()));
    }
    let names: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let options = format!("lowerdir={}", names.join(":"));
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(Some("overlay"), rootfs, Some("overlay"), flags, Some(options.as_str()))
        .context(|| format!("merging the {} layers of the image", folders.len()))
}

fn run_mkfs(target: &Path, rootfs: &Path) -> Result<()> {
    let doing = || format!("making the image of the root filesystem, {}", target.display());
    let output = Command::new("mkfs.erofs")
        // The same files make the same bytes.
        .args(["-U", "00000000-0000-0000-0000-000000000000", "--"])
        .args([target, rootfs])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            Error::internal("running mkfs.erofs, of Debian's package erofs-utils").because(error)
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned();
    Err(Error::internal(format!("{}: mkfs.erofs ended with {}: {last}", doing(), output.status)))
}
