//! What containerd says the root filesystem is: mounts, of which only the files in them matter here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Kind, Result};

/// One mount, as the task API hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootfsMount {
    pub(crate) kind: String,
    pub(crate) source: String,
    pub(crate) options: Vec<String>,
}

/// The folders whose files, the first on top, make the root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layers {
    /// Topmost first.
    pub(crate) folders: Vec<PathBuf>,
    /// Whether all are committed: then their files never change, and what is made of them can be kept.
    committed: bool,
}

impl Layers {
    /// Layers that never change, the topmost first.
    pub(super) fn committed(folders: Vec<PathBuf>) -> Layers {
        Layers { folders, committed: true }
    }

    /// Reads containerd's mounts: an overlay, or a bind of one folder. Without any, `root` is it.
    pub(crate) fn from_mounts(mounts: &[RootfsMount], root: &Path) -> Result<Layers> {
        let layers = match mounts {
            [] => Layers { folders: vec![root.to_owned()], committed: false },
            [one] if one.kind == "overlay" => overlay(one)?,
            [one] if one.kind == "bind" || one.options.iter().any(|o| o == "bind" || o == "rbind") => {
                Layers { folders: vec![PathBuf::from(&one.source)], committed: false }
            }
            [one, ..] => {
                return Err(Error::invalid(format!(
                    "the root filesystem is {} mounts, the first of the type {}; one overlay or one bind is understood: \
                     use containerd's overlayfs or native snapshotter",
                    mounts.len(),
                    one.kind
                )));
            }
        };
        for folder in &layers.folders {
            if !folder.is_dir() {
                let text = format!("the root filesystem's folder {} is not there", folder.display());
                return Err(Error::invalid(text));
            }
        }
        Ok(layers)
    }

    /// A name for these layers' files, or none when they may change.
    pub(crate) fn key(&self) -> Result<Option<String>> {
        if !self.committed {
            return Ok(None);
        }
        let mut hash = Sha256::new();
        // What the tools that make the image do is part of what it is.
        hash.update(b"erofs 1\0");
        for folder in &self.folders {
            let about = fs::metadata(folder).context(|| format!("reading {}", folder.display()))?;
            hash.update(folder.as_os_str().as_encoded_bytes());
            let (seconds, nanoseconds) = (about.ctime(), about.ctime_nsec());
            for number in [about.dev(), about.ino(), seconds.cast_unsigned(), nanoseconds.cast_unsigned()] {
                hash.update(number.to_le_bytes());
            }
        }
        Ok(Some(hash.finalize().iter().take(20).map(|byte| format!("{byte:02x}")).collect()))
    }
}

fn overlay(mount: &RootfsMount) -> Result<Layers> {
    let option = |name: &str| {
        mount
            .options
            .iter()
            .find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let lower = option("lowerdir")
        .ok_or_else(|| Error::invalid("the overlay of the root filesystem has no lowerdir"))?;
    let mut folders: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
    let mut committed = true;
    if let Some(upper) = option("upperdir").map(PathBuf::from) {
        let mut entries =
            fs::read_dir(&upper).context_as(Kind::Invalid, || format!("listing {}", upper.display()))?;
        if entries.next().is_some() {
            folders.insert(0, upper);
            committed = false;
        }
    }
    Ok(Layers { folders, committed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> RootfsMount {
        RootfsMount {
            kind: kind.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).into()).collect(),
        }
    }

    #[test]
    fn an_overlay_with_an_empty_upper_is_its_lower_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a", "b", "upper"] {
            fs::create_dir(path(name)).unwrap();
        }
        let lower = format!("lowerdir={}:{}", path("a").display(), path("b").display());
        let upper = format!("upperdir={}", path("upper").display());
        let mounts = [mount("overlay", "overlay", &[&lower, &upper, "workdir=/w"])];
        let layers = Layers::from_mounts(&mounts, folder.path()).unwrap();
        assert_eq!(layers.folders, [path("a"), path("b")]);
        let key = layers.key().unwrap();
        assert!(key.is_some());
        fs::write(path("upper").join("file"), "").unwrap();
        let layers = Layers::from_mounts(&mounts, folder.path()).unwrap();
        assert_eq!(layers.folders[0], path("upper"));
        assert_eq!(layers.key().unwrap(), None, "what may change is not kept");
    }

    #[test]
    fn what_is_no_root_filesystem_is_refused_by_name() {
        let error = Layers::from_mounts(&[mount("bind", "/no/such", &["rbind"])], "/".as_ref()).unwrap_err();
        assert!(error.to_string().contains("/no/such"));
        let error = Layers::from_mounts(&[mount("btrfs", "/dev/x", &[])], "/".as_ref()).unwrap_err();
        assert!(error.to_string().contains("btrfs"));
    }
}
