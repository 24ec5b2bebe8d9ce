//! Images for tests, made from Debian packages and kept in the user's cache under a hash of their recipe.

mod catalogue;
mod layout;
pub(crate) mod rootfs;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

pub use self::catalogue::{base, busybox, layered, nginx, postgresql, redis, unprivileged, with_program};
use crate::settings;

/// Raise when the making changes, so that images made before are made again.
const RECIPE: u32 = 3;

/// An image, ready to be imported.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name in containerd.
    pub reference: String,
    /// An OCI image layout in a tar file.
    pub archive: PathBuf,
}

/// One layer: a folder made by packages, by files, or both.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    /// Where the layer's files come from.
    pub base: Base,
    /// Files to be written, by their path.
    pub files: BTreeMap<&'static str, Entry>,
}

/// What a layer starts from.
#[derive(Clone, Debug, Default)]
pub enum Base {
    /// Nothing.
    #[default]
    Empty,
    /// busybox with all its applets, and the few files and folders that any image has.
    Busybox,
    /// Debian with these packages.
    Debian(&'static [&'static str]),
}

/// One file of a layer.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A file with these permissions and that content.
    File(u32, &'static str),
    /// A copy of a program of this machine.
    Program(PathBuf),
    /// A folder with these permissions and that owner.
    Folder(u32, u32),
    /// A symbolic link.
    Link(&'static str),
    /// The file of a lower layer with this name is gone.
    Whiteout,
    /// The folder shows nothing of lower layers.
    Opaque,
}

/// What the image says about how to run it.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Program and first arguments.
    pub entrypoint: &'static [&'static str],
    /// Arguments, or all.
    pub cmd: &'static [&'static str],
    /// Environment.
    pub env: &'static [&'static str],
    /// User, as a number, a name, or either with a group.
    pub user: &'static str,
    /// Working folder.
    pub working_dir: &'static str,
    /// What ends it in good order.
    pub stop_signal: &'static str,
}

/// All that decides what an image is.
#[derive(Clone, Debug, Default)]
pub struct Recipe {
    /// A short name.
    pub name: &'static str,
    /// From the lowest to the highest.
    pub layers: Vec<Layer>,
    /// How to run it.
    pub config: Config,
}

impl Recipe {
    /// The image: from the cache, or made now.
    pub fn image(&self) -> Result<Image> {
        let folder = settings::cache_dir()?.join("test-images");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let archive = folder.join(format!("{}-{}.tar", self.name, &self.key()[..16]));
        let reference = format!("test.invalid/{}:latest", self.name);
        let lock = folder.join(format!("{}.lock", self.name));
        let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
        lock.lock().context("locking an image")?;
        if !archive.exists() {
            self.make(&folder, &archive, &reference)
                .with_context(|| format!("making image {}", self.name))?;
        }
        Ok(Image { reference, archive })
    }

    /// The files of the lowest layer, unpacked, for runs that bring a root folder.
    pub fn unpack_lowest(&self, into: &Path) -> Result<()> {
        layout::unpack_lowest(&self.image()?.archive, into)
            .with_context(|| format!("unpacking image {}", self.name))
    }

    /// What makes it this image. Of a program that is what is in it, wherever it lies: the same image is found in
    /// the cache of another machine.
    fn key(&self) -> String {
        let mut recipe = self.clone();
        let mut programs = Sha256::new();
        for entry in recipe.layers.iter_mut().flat_map(|layer| layer.files.values_mut()) {
            if let Entry::Program(path) = entry {
                // One that cannot be read fails when it is to be copied.
                programs.update(fs::read(&path).unwrap_or_default());
                *path = PathBuf::new();
            }
        }
        let mut hash = Sha256::new_with_prefix(format!("{RECIPE} {recipe:?}"));
        hash.update(programs.finalize());
        hex(&hash.finalize())
    }

    fn make(&self, folder: &Path, archive: &Path, reference: &str) -> Result<()> {
        let work =
            tempfile::Builder::new().prefix("making.").tempdir_in(folder).context("making a folder")?;
        let mut layers = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let root = work.path().join(format!("root{number}"));
            rootfs::make(layer, &root)?;
            let tar = work.path().join(format!("layer{number}.tar"));
            layout::pack(&root, &tar)?;
            layers.push(tar);
        }
        let half_made = work.path().join("image.tar");
        layout::write(&work.path().join("layout"), &layers, &self.config, reference, &half_made)?;
        fs::rename(&half_made, archive).with_context(|| format!("moving {} into place", archive.display()))
    }
}

/// Bytes as text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
