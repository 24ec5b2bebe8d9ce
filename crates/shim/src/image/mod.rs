//! From containerd's mounts of an image to a block device: one EROFS filesystem, a dm-verity tree behind it.
//!
//! Made once for each stack of committed layers and namespace, and kept; an image is never shared between
//! namespaces, so that no two tenants ever read through the same page cache.

pub(crate) mod cache;
mod erofs;
mod layers;
mod verity;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bailey_types::guest::spec::RootDisk;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::unistd::linkat;
use serde::{Deserialize, Serialize};

pub(crate) use self::erofs::Maker;
pub(crate) use self::layers::{Layers, RootfsMount};
use crate::error::{Context, Error, Result};
use crate::random;

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
    /// The folders that it was made of: when they are gone, nobody can ask for it any more.
    layers: Vec<PathBuf>,
}

/// Makes the image of `layers`, or finds it. Blocks: making one reads the whole image.
pub(crate) fn prepare(maker: &Maker, layers: &Layers) -> Result<Image> {
    let folder = maker.config.cache_dir.join("images").join(&maker.namespace);
    private_folder(&folder).context(|| format!("making {}", folder.display()))?;
    let Some(key) = layers.key()? else {
        let (file, label) = make(maker, &folder, layers)?;
        return image(path_of(&file).as_ref(), label);
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
    let image = image(&path, label)?;
    // There is one more, so another one may have to go. This one is in use.
    match cache::collect_all(&maker.config, false) {
        Ok(collected) => tracing::debug!("collecting images: {collected:?}"),
        Err(error) => tracing::warn!("collecting images: {}", error.chain()),
    }
    Ok(image)
}

/// Makes a folder that is root's alone, and so are those above it that are made.
fn private_folder(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// The image for reading: whoever gets it cannot write to it.
fn image(path: &Path, label: Label) -> Result<Image> {
    let file = File::open(path).context(|| format!("opening the image {} for reading", path.display()))?;
    use_it(&file).context(|| "marking the image as in use".into())?;
    Ok(Image { file, root: label.into() })
}

/// Marks an image as in use for as long as anybody has this open file, and notes when that was.
fn use_it(file: &File) -> io::Result<()> {
    file.lock_shared()?;
    file.set_modified(SystemTime::now())
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
    let locked = lock_as(folder, key, FlockArg::LockExclusive)?;
    locked.ok_or_else(|| Error::internal(format!("the lock of the image {key} was not waited for")))
}

/// As [`lock`], but none if another one has it.
fn try_lock(folder: &Path, key: &str) -> Result<Option<Flock<File>>> {
    lock_as(folder, key, FlockArg::LockExclusiveNonblock)
}

fn lock_as(folder: &Path, key: &str, how: FlockArg) -> Result<Option<Flock<File>>> {
    let path = folder.join(format!("{key}.lock"));
    let doing = || format!("locking {}", path.display());
    loop {
        // Whoever drops a namespace's images removes its folder, too.
        private_folder(folder).context(doing)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = match file {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.context(doing)?,
        };
        let locked = match Flock::lock(file, how) {
            Ok(locked) => locked,
            Err((_, nix::Error::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno).context(doing),
        };
        // Who had it may have removed it with its image: then it locks nothing any more.
        let inode = locked.metadata().context(doing)?.ino();
        if fs::metadata(&path).is_ok_and(|there| there.ino() == inode) {
            return Ok(Some(locked));
        }
    }
}

/// An image made earlier. One that is not as its label says is not there: it is made again.
fn find(path: &Path, label: &Path) -> Option<Image> {
    let label: Label = serde_json::from_slice(&fs::read(label).ok()?).ok()?;
    let file = File::open(path).ok()?;
    let is_whole = file.metadata().ok()?.len() == label.file_bytes && use_it(&file).is_ok();
    is_whole.then(|| Image { file, root: label.into() })
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
    random::fill(&mut salt)?;
    let tree = verity::append(&file, salt).context(|| "writing the hash tree of the image".into())?;
    // Its folder is root's alone; a VMM that opens it by a name of its jail is a user of its own.
    file.set_permissions(fs::Permissions::from_mode(0o444))
        .context(|| "letting VMMs read the image".into())?;
    let about = file.metadata().context(|| "reading back the image".into())?;
    let label = Label {
        data_blocks: tree.data_blocks,
        root_hash: tree.root_hash,
        salt,
        file_bytes: about.len(),
        layers: layers.folders.clone(),
    };
    Ok((file, label))
}
