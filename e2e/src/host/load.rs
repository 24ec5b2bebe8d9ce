//! The second disk of a host: what is to be run there, and what that needs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tempfile::TempDir;

use crate::process::text_of;
use crate::settings;

/// What the host may write beside what it was given.
const ROOM_BYTES: u64 = 2 << 30;
const MAKE_LIMIT: Duration = Duration::from_secs(120);
const PREFIX: &str = "host.";
/// No test takes this long.
const ABANDONED: Duration = Duration::from_secs(2 * 3600);
/// The host's first program; it starts `run`.
const INIT: &str = include_str!("init.sh");

/// Files for a host, and its program.
pub struct Load {
    folder: TempDir,
}

impl Load {
    /// One whose program is this script for bash. Its outputs are what comes back, its exit code is the host's.
    pub fn new(script: &str) -> Result<Self> {
        let cache = settings::cache_dir()?;
        fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
        remove_abandoned(&cache)?;
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(cache).context("making a folder")?;
        let load = Self { folder };
        load.write("init", INIT)?;
        load.write("run", script)?;
        Ok(load)
    }

    /// Writes a file that may be executed.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.place(name)?;
        fs::write(&path, text).with_context(|| format!("writing {name}"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("writing {name}"))
    }

    /// Adds a file, or a folder with all that is in it.
    pub fn add(&self, from: &Path, to: &str) -> Result<()> {
        let place = self.place(to)?;
        if !from.is_dir() {
            return fs::copy(from, &place).with_context(|| format!("copying {}", from.display())).map(drop);
        }
        fs::create_dir_all(&place).with_context(|| format!("creating {to}"))?;
        for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
            let entry = entry.with_context(|| format!("listing {}", from.display()))?;
            self.add(&entry.path(), &format!("{to}/{}", entry.file_name().to_string_lossy()))?;
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<PathBuf> {
        let path = self.files().join(name);
        let parent = path.parent().ok_or_else(|| anyhow!("{name} is in no folder"))?;
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        Ok(path)
    }

    fn files(&self) -> PathBuf {
        self.folder.path().join("files")
    }

    /// The disk, in a folder that goes with the returned value.
    pub(super) fn into_disk(self) -> Result<(TempDir, PathBuf)> {
        let disk = self.folder.path().join("disk");
        make_disk(&self.files(), &disk, ROOM_BYTES)?;
        fs::remove_dir_all(self.files()).context("removing what is on the disk now")?;
        Ok((self.folder, disk))
    }
}

/// Removes what was left by tests that were killed.
fn remove_abandoned(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).context("listing the cache")?.flatten() {
        let is_load = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if is_load && age.is_some_and(|age| age > ABANDONED) {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("removing {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Makes a file with an ext4 of this folder's files and so much room. Mounts nothing.
pub(super) fn make_disk(folder: &Path, disk: &Path, room_bytes: u64) -> Result<()> {
    let mut du = Command::new("du");
    let sizes = text_of(du.args(["--summarize", "--block-size=1"]).arg(folder), MAKE_LIMIT)?;
    let used: u64 = sizes.split_whitespace().next().unwrap_or_default().parse().context("reading a size")?;
    let kib = (used + used / 8 + room_bytes).div_ceil(1024);
    let mut command = Command::new("mke2fs");
    // What is thrown away needs no journal.
    command.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d"]).arg(folder);
    command.arg(disk).arg(format!("{kib}k"));
    text_of(&mut command, MAKE_LIMIT).context("making a disk").map(drop)
}
