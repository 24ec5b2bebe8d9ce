//! A jailer with the flags of the real one (`docs/jailer.md` of Firecracker 1.17) and its order of steps: parse, copy
//! the program, enter the root, make devices, change the user, run. It refuses what the real one refuses, and the
//! leftovers that the real one would follow.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, chown, fchown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, pivot_root, setgid, setgroups, setuid};

/// Flags that take a value, whether they are needed, and whether they may come more than once.
const VALUES: [(&str, bool, bool); 9] = [
    ("--id", true, false),
    ("--exec-file", true, false),
    ("--uid", true, false),
    ("--gid", true, false),
    ("--cgroup-version", false, false),
    ("--cgroup", false, true),
    ("--parent-cgroup", false, false),
    ("--chroot-base-dir", false, false),
    ("--resource-limit", false, true),
];
const FLAGS: [&str; 2] = ["--daemonize", "--new-pid-ns"];

const ID_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Arguments {
    values: HashMap<String, String>,
    /// What goes to Firecracker.
    pub(super) extra: Vec<String>,
}

impl Arguments {
    pub(super) fn parse(words: impl Iterator<Item = String>) -> Result<Arguments, String> {
        let mut words = words;
        let mut values = HashMap::new();
        while let Some(word) = words.next() {
            if word == "--" {
                break;
            }
            if FLAGS.contains(&word.as_str()) {
                continue;
            }
            let Some((_, _, many)) = VALUES.iter().find(|(name, ..)| *name == word) else {
                return Err(format!("Found argument '{word}' which wasn't expected"));
            };
            let value = words.next().ok_or_else(|| format!("The argument '{word}' requires a value"))?;
            if values.insert(word.clone(), value).is_some() && !many {
                return Err(format!("The argument '{word}' was provided more than once."));
            }
        }
        let arguments = Arguments { values, extra: words.collect() };
        arguments.check()?;
        Ok(arguments)
    }

    fn check(&self) -> Result<(), String> {
        if let Some((missing, ..)) =
            VALUES.iter().find(|(name, needed, _)| *needed && self.value(name).is_empty())
        {
            return Err(format!("Argument '{missing}' required, but not found."));
        }
        let id = self.value("--id");
        if id.len() > ID_MAX || !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return Err(format!("Invalid instance ID: {id}"));
        }
        let parent = Path::new(self.value("--parent-cgroup"));
        if parent.is_absolute() || parent.components().any(|part| part == std::path::Component::ParentDir) {
            return Err("The parent cgroup path should not be absolute or leave the hierarchy".into());
        }
        match (
            self.value("--cgroup-version"),
            self.value("--uid").parse::<u32>(),
            self.value("--gid").parse::<u32>(),
        ) {
            ("" | "1" | "2", Ok(_), Ok(_)) => Ok(()),
            other => Err(format!("Invalid cgroup version, uid or gid: {other:?}")),
        }
    }

    fn value(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }

    fn root(&self) -> Result<(PathBuf, PathBuf), String> {
        let base = match self.value("--chroot-base-dir") {
            "" => "/srv/jailer",
            base => base,
        };
        let program = fs::canonicalize(self.value("--exec-file"))
            .map_err(|e| format!("Failed to canonicalize: {e}"))?;
        let name = program.file_name().unwrap_or_default().to_owned();
        let base = fs::canonicalize(base).map_err(|e| format!("Failed to canonicalize: {e}"))?;
        Ok((base.join(name).join(self.value("--id")).join("root"), program))
    }

    /// Enters the jail, as far as that goes in a process that goes on. Gives how it found the jail.
    pub(super) fn enter(&self) -> Result<String, String> {
        let (root, program) = self.root()?;
        let uid: u32 = self.value("--uid").parse().map_err(|e| format!("{e}"))?;
        let gid: u32 = self.value("--gid").parse().map_err(|e| format!("{e}"))?;
        fs::create_dir_all(&root)
            .map_err(|e| format!("Failed to create directory {}: {e}", root.display()))?;
        let found = describe(&root);
        let steps = || -> std::io::Result<()> {
            let copy = root.join(program.file_name().unwrap_or_default());
            let mut copy = OpenOptions::new()
                .write(true)
                .create_new(true)
                .custom_flags(libc::O_NOFOLLOW)
                .mode(0o755)
                .open(copy)?;
            fchown(&copy, Some(uid), Some(gid))?;
            std::io::copy(&mut File::open(&program)?, &mut copy)?;
            drop(copy);
            enter_root(&root)?;
            for folder in ["/", "/dev", "/dev/net", "/run"] {
                fs::create_dir_all(folder)?;
                fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
                chown(folder, Some(uid), Some(gid))?;
            }
            setgroups(&[])?;
            setgid(Gid::from_raw(gid))?;
            setuid(Uid::from_raw(uid))?;
            Ok(())
        };
        steps().map_err(|e| format!("Failed to enter the jail: {e}"))?;
        Ok(found)
    }
}

/// Whose the root is, and what is in it.
fn describe(root: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::symlink_metadata(root);
    let (owner, mode) = metadata.map_or((u32::MAX, 0), |metadata| (metadata.uid(), metadata.mode() & 0o7777));
    let mut names: Vec<String> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    format!("owner {owner} mode {mode:o} files {}", names.join(" "))
}

fn enter_root(root: &Path) -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
    mount(Some(root), root, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    std::env::set_current_dir(root)?;
    fs::create_dir("old_root")?;
    pivot_root(".", "old_root")?;
    std::env::set_current_dir("/")?;
    umount2("old_root", MntFlags::MNT_DETACH)?;
    fs::remove_dir("old_root")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn only_documented_flags_are_taken() {
        let line = "--id a-1 --exec-file /f --uid 1 --gid 1";
        assert_eq!(parse(&format!("{line} -- --api-sock x")).unwrap().extra, ["--api-sock", "x"]);
        for (line, why) in [
            (format!("{line} --netns-fd 3"), "wasn't expected"),
            (format!("{line} --id b"), "more than once"),
            (format!("{line} --cgroup-version"), "requires a value"),
            (format!("{line} --cgroup-version 3"), "cgroup version"),
            (format!("{line} --parent-cgroup ../x"), "parent cgroup"),
            (format!("{line} --parent-cgroup /x"), "parent cgroup"),
            ("--id a --exec-file /f --uid 1".into(), "'--gid' required"),
            (line.replace("a-1", "a_1"), "Invalid instance ID"),
            (line.replace("a-1", &"a".repeat(65)), "Invalid instance ID"),
        ] {
            let error = parse(&line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }
}
