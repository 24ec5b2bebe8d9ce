//! From containerd's mounts of an image to a block device: one EROFS filesystem, a dm-verity tree behind it.
//!
//! Made once for each stack of committed layers and namespace, and kept; an image is never shared between
//! namespaces, so that no two tenants ever read through the same page cache.

mod erofs;
mod layers;
mod verity;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bailey_types::guest::spec::RootDisk;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::unistd::linkat;
use serde::{Deserialize, Serialize};

pub(crate) use self::erofs::Maker;
pub(crate) use self::layers::{Layers, RootfsMount};
use crate::error::{Context, Result};

/// An image that is ready to be a VM's first disk.
#[derive(Debug)]
pub(crate) struct Image {
    /// The disk, open for reading. Its name may be gone already.
    pub(crate) file: File,
    pub(crate) root: RootDisk,
}

/// What is kept beside an image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Label {
    data_blocks: u64,
    root_hash: [u8; 32],
    salt: [u8; 32],
    /// Size of the whole file, in bytes.
    file_bytes: u64,
}

/// Makes the image of `layers`, or finds it. Blocks: making one reads the whole image.
pub(crate) fn prepare(maker: &Maker, layers: &Layers) -> Result<Image> {
    let folder = maker.config.cache_dir.join("images").join(&maker.namespace);
    fs::DirBuilder::new()
        .recursive(true)
        .create(&folder)
        .context(|| format!("making {}", folder.display()))?;
    let Some(key) = layers.key()? else {
        let (file, label) = make(maker, &folder, layers)?;
        return image(&file, label);
    };
    let _one_at_a_time = lock(&folder, &key)?;
    let (path, label_path) = (folder.join(format!("{key}.img")), folder.join(format!("{key}.json")));
    if let Some(image) = find(&path, &label_path) {
        return Ok(image);
    }
    let (file, label) = make(maker, &folder, layers)?;
    // INVARIANT: no image has its name while another one's label is beside it, however this ends.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    let text = serde_json::to_vec(&label).context(|| "writing an image's label".into())?;
    fs::write(&label_path, text).context(|| format!("writing {}", label_path.display()))?;
    give_name(&file, &path).context(|| format!("naming {}", path.display()))?;
    image(&file, label)
}

/// The image for reading: whoever gets it cannot write to it.
fn image(file: &File, label: Label) -> Result<Image> {
    let file = File::open(path_of(file)).context(|| "opening the image for reading".into())?;
    Ok(Image { file, root: label.into() })
}

/// A path that leads to an open file.
fn path_of(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Gives a file that has no name one.
fn give_name(file: &File, path: &Path) -> nix::Result<()> {
    linkat(AT_FDCWD, path_of(file).as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

impl From<Label> for RootDisk {
    fn from(label: Label) -> RootDisk {
        RootDisk { data_blocks: label.data_blocks, root_hash: label.root_hash, salt: label.salt }
    }
}

/// A lock on one image's name, which goes with the file description.
fn lock(folder: &Path, key: &str) -> Result<Flock<File>> {
    let path = folder.join(format!("{key}.lock"));
    let doing = || format!("locking {}", path.display());
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).context(doing)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context(doing)
}

/// An image made earlier. One that is not as its label says is not there: it is made again.
fn find(path: &Path, label: &Path) -> Option<Image> {
    let label: Label = serde_json::from_slice(&fs::read(label).ok()?).ok()?;
    let file = File::open(path).ok()?;
    (file.metadata().ok()?.len() == label.file_bytes).then(|| Image { file, root: label.into() })
}

fn make(maker: &Maker, folder: &Path, layers: &Layers) -> Result<(File, Label)> {
    let rootfs: PathBuf = maker.bundle.join("rootfs");
    match fs::create_dir(&rootfs) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).context(|| format!("making {}", rootfs.display()));
        }
        _ => {}
    }
    let file = erofs::make(maker, folder, layers)?;
    let mut salt = [0; 32];
    getrandom(&mut salt)?;
    let tree = verity::append(&file, salt).context(|| "writing the hash tree of the image".into())?;
    let about = file.metadata().context(|| "reading back the image".into())?;
    let label =
        Label { data_blocks: tree.data_blocks, root_hash: tree.root_hash, salt, file_bytes: about.len() };
    Ok((file, label))
}

/// Fresh randomness of the host's kernel.
pub(crate) fn getrandom(bytes: &mut [u8]) -> Result<()> {
    use std::io::Read;
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(bytes))
        .context(|| "reading /dev/urandom".into())
}
