//! Root folders of images, from Debian packages and from files written down here.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use super::{Base, Entry, Layer};
use crate::process::text_of;

/// Downloading and unpacking packages on a slow line and a busy machine.
const INSTALL_LIMIT: Duration = Duration::from_secs(1200);
const QUICK: Duration = Duration::from_secs(60);
/// The release whose packages images are made of.
pub(crate) const SUITE: &str = "bookworm";

/// What no test reads. Two thirds of PostgreSQL are a compiler for long queries, which it does without.
const USELESS: [&str; 8] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/i18n/*",
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/x86_64-linux-gnu/libz3*",
    "/usr/lib/x86_64-linux-gnu/perl/*/CORE/*",
];

/// Makes the folder of a layer.
pub(super) fn make(layer: &Layer, root: &Path) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("creating {}", root.display()))?;
    match layer.base {
        Base::Empty => {}
        Base::Busybox => busybox(root)?,
        Base::Debian(packages) => debian(root, packages)?,
    }
    for (path, entry) in &layer.files {
        write(&root.join(path), entry).with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}

fn write(path: &Path, entry: &Entry) -> Result<()> {
    let parent = path.parent().ok_or_else(|| anyhow!("it has no folder"))?;
    fs::create_dir_all(parent)?;
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    match entry {
        Entry::File(permissions, content) => {
            fs::write(path, content)?;
            mode(path, *permissions)?;
        }
        Entry::Program(from) => {
            fs::copy(from, path).with_context(|| format!("copying {}", from.display()))?;
        }
        Entry::Folder(permissions, owner) => {
            fs::create_dir_all(path)?;
            chown(path, Some(*owner), Some(*owner))?;
            mode(path, *permissions)?;
        }
        Entry::Link(to) => symlink(to, path)?,
        Entry::Whiteout => {
            let name = path.file_name().ok_or_else(|| anyhow!("it has no name"))?.to_string_lossy();
            fs::write(parent.join(format!(".wh.{name}")), "")?;
        }
        Entry::Opaque => {
            fs::create_dir_all(path)?;
            fs::write(path.join(".wh..wh..opq"), "")?;
        }
    }
    Ok(())
}

/// A root folder with a static busybox under the names of all its applets.
fn busybox(root: &Path) -> Result<()> {
    let unpacked = tempfile::tempdir().context("making a folder")?;
    mmdebstrap(SUITE, "extract", &["busybox-static"], &[], unpacked.path())?;
    for folder in ["bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr/bin", "var/tmp"] {
        fs::create_dir_all(root.join(folder)).with_context(|| format!("creating {folder}"))?;
    }
    for (folder, mode) in [("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o700)] {
        fs::set_permissions(root.join(folder), fs::Permissions::from_mode(mode)).context("setting a mode")?;
    }
    let found = ["bin/busybox", "usr/bin/busybox"].map(|path| unpacked.path().join(path));
    let found =
        found.iter().find(|path| path.exists()).ok_or_else(|| anyhow!("busybox-static has no busybox"))?;
    let busybox = root.join("bin/busybox");
    fs::copy(found, &busybox).context("copying busybox")?;
    let applets = text_of(Command::new(&busybox).arg("--list"), QUICK)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).with_context(|| format!("linking {applet}"))?;
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).context("writing passwd")?;
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n").context("writing group")
}

/// Debian with these packages, without what no test reads.
fn debian(root: &Path, packages: &[&str]) -> Result<()> {
    // Its package would make a cluster that no test uses.
    let no_cluster = "--essential-hook=mkdir -p $1/etc/postgresql-common && \
        echo create_main_cluster=false > $1/etc/postgresql-common/createcluster.conf";
    let has_cluster = packages.iter().any(|package| package.starts_with("postgresql"));
    let more: &[&str] = if has_cluster { &[no_cluster] } else { &[] };
    mmdebstrap(SUITE, "essential", packages, more, root)?;
    for path in ["var/cache/apt", "var/lib/apt/lists", "var/log", "var/cache/debconf", "dev"] {
        empty(&root.join(path))?;
    }
    for path in ["etc/machine-id", "etc/resolv.conf", "etc/hostname"] {
        match fs::remove_file(root.join(path)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {path}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes all files below a folder; programs expect the folders themselves, with their owners.
fn empty(folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", folder.display()))?;
        let path = entry.path();
        if entry.file_type().with_context(|| format!("looking at {}", path.display()))?.is_dir() {
            empty(&path)?;
        } else {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Unpacks packages of a Debian release into a folder, and sets them up unless the variant is not to.
pub(crate) fn mmdebstrap(
    suite: &str,
    variant: &str,
    packages: &[&str],
    more: &[&str],
    root: &Path,
) -> Result<()> {
    let mut command = Command::new("nice");
    command.args(["mmdebstrap", "--mode=root", "--quiet", "--variant", variant]);
    command.arg(format!("--include={}", packages.join(",")));
    for path in USELESS {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=APT::Install-Recommends \"false\""]);
    command.args(more).arg(suite).arg(root);
    // Where the machine says from where it gets Debian, that mirror is the one that can be reached.
    if let Some(sources) = sources(suite) {
        command.arg(sources);
    }
    command.env("LC_ALL", "C").env("SOURCE_DATE_EPOCH", "1577836800");
    text_of(&mut command, INSTALL_LIMIT)
        .with_context(|| format!("installing {}", packages.join(" ")))
        .map(drop)
}

fn sources(suite: &str) -> Option<PathBuf> {
    let candidates = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"].map(PathBuf::from);
    let has_suite = |path: &PathBuf| fs::read_to_string(path).is_ok_and(|text| text.contains(suite));
    candidates.into_iter().find(has_suite)
}
