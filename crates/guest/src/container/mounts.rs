//! Mounts and devices of the container. Called inside its root: plain paths cannot leave it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use bailey_types::guest::spec::{Container, Mount};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};

use super::terminal::ChildStdio;
use crate::error::{Context, Error, Result};

/// Mounts everything that the specification lists, and fills `/dev`.
pub(super) fn mount_all(spec: &Container) -> Result<()> {
    // Modes are meant as they are written below.
    umask(Mode::empty());
    for wanted in &spec.mounts {
        let all = spec.all_devices && wanted.target.trim_end_matches('/') == "/dev";
        if all {
            let vm = Mount { kind: "devtmpfs".into(), source: "devtmpfs".into(), ..wanted.clone() };
            mount_one(&Mount { options: vec!["nosuid".into(), "mode=755".into()], ..vm })?;
        } else {
            mount_one(wanted)?;
        }
    }
    devices(spec.all_devices)
}

fn mount_one(wanted: &Mount) -> Result<()> {
    let Mount { kind, source, target, options } = wanted;
    let (flags, data) = parse_options(options);
    fs::create_dir_all(target).context(|| format!("making the mount point {target}"))?;
    // The guest has version 2 alone, whatever the host has.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind.as_str() };
    let data = if kind == "cgroup2" { String::new() } else { data };
    mount(Some(source.as_str()), target.as_str(), Some(kind), flags, Some(data.as_str()))
        .map_err(|cause| Error::invalid(format!("mounting {kind} at {target}"), cause))
}

/// Splits fstab-like options into flags and the filesystem's own.
fn parse_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "rw" | "suid" | "dev" | "exec" | "atime" | "async" | "defaults" | "private" | "rprivate" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// The devices that every container has, and the links that programs expect beside them.
fn devices(all: bool) -> Result<()> {
    let usual =
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    let mode = Mode::from_bits_truncate(0o666);
    for (name, major, minor) in usual.into_iter().filter(|_| !all) {
        let path = format!("/dev/{name}");
        match mknod(path.as_str(), SFlag::S_IFCHR, mode, makedev(major, minor)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(cause) => return Err(Error::new(format!("making {path}"), cause)),
        }
    }
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ];
    for (to, link) in links {
        if link == "/dev/ptmx" {
            // The VM's own terminal multiplexer would give terminals that the container cannot see.
            match fs::remove_file(link) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::new(format!("replacing {link}"), cause));
                }
                _ => {}
            }
        }
        match symlink(to, link) {
            Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::new(format!("linking {link}"), cause));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Makes the container's terminal its console, too.
pub(super) fn bind_console(stdio: &ChildStdio) -> Result<()> {
    let Some(terminal) = &stdio.terminal else { return Ok(()) };
    if !fs::exists("/dev/console").unwrap_or(false) {
        File::create("/dev/console").context(|| "making /dev/console".into())?;
    }
    mount(Some(terminal.as_str()), "/dev/console", None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context(|| "making the terminal the console".into())
}

/// Makes one path read-only. What is not there needs nothing.
pub(super) fn make_readonly(path: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    match mount(Some(path), path, None::<&str>, flags, None::<&str>) {
        Err(nix::Error::ENOENT) => return Ok(()),
        other => other.context(|| format!("binding {}", path.display()))?,
    }
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        .context(|| format!("making {} read-only", path.display()))
}

/// Hides one path: a file behind the null device, a folder behind an empty one. What is not there needs nothing.
pub(super) fn mask(path: &Path) -> Result<()> {
    let hidden = match fs::metadata(path) {
        Ok(about) if about.is_dir() => {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0"))
        }
        Ok(_) => mount(Some("/dev/null"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>),
        Err(_) => return Ok(()),
    };
    hidden.context(|| format!("hiding {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_the_filesystems_own() {
        let options = ["nosuid", "ro", "mode=755", "rw", "size=65536k"].map(String::from);
        let (flags, data) = parse_options(&options);
        assert_eq!(flags, MsFlags::MS_NOSUID | MsFlags::MS_RDONLY);
        assert_eq!(data, "mode=755,size=65536k");
    }
}
