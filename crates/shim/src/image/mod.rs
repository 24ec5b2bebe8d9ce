//! From containerd's mounts of an image to a block device: one EROFS filesystem, a dm-verity tree behind it.
//!
//! Made once for each stack of committed layers and namespace, and kept; an image is never shared between
//! namespaces, so that no two tenants ever read through the same page cache.

mod erofs;
mod layers;
mod verity;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bailey_types::guest::spec::RootDisk;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

pub(crate) use self::layers::{Layers, RootfsMount};
use crate::error::{Context, Kind, Result};

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
///
/// `bundle` lends its `rootfs` folder as a place to mount at, in a mount namespace that ends with this call.
pub(crate) fn prepare(cache: &Path, namespace: &str, bundle: &Path, layers: &Layers) -> Result<Image> {
    let folder = cache.join("images").join(namespace);
    fs::DirBuilder::new()
        .recursive(true)
        .create(&folder)
        .context(|| format!("making {}", folder.display()))?;
    let Some(key) = layers.key()? else {
        let scratch = folder.join(format!("once-{}", std::process::id()));
        let made = make(&scratch, bundle, layers);
        // Whether or not it was made, its name goes; the open file stays.
        let removed = fs::remove_file(&scratch);
        let (file, label) = made?;
        removed.context(|| format!("removing {}", scratch.display()))?;
        return Ok(Image { file, root: label.into() });
    };
    let _one_at_a_time = lock(&folder, &key)?;
    let (path, label_path) = (folder.join(format!("{key}.img")), folder.join(format!("{key}.json")));
    if let Some(image) = find(&path, &label_path) {
        return Ok(image);
    }
    let temporary = folder.join(format!("{key}.new"));
    let made = make(&temporary, bundle, layers);
    if made.is_err() {
        // What failed may have left a part; an absent one is fine.
        let _absent = fs::remove_file(&temporary);
    }
    let (file, label) = made?;
    let text = serde_json::to_vec(&label).context(|| "writing an image's label".into())?;
    fs::write(&label_path, text).context(|| format!("writing {}", label_path.display()))?;
    fs::rename(&temporary, &path).context(|| format!("naming {}", path.display()))?;
    Ok(Image { file, root: label.into() })
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

fn make(path: &Path, bundle: &Path, layers: &Layers) -> Result<(File, Label)> {
    let rootfs: PathBuf = bundle.join("rootfs");
    match fs::create_dir(&rootfs) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).context(|| format!("making {}", rootfs.display()));
        }
        _ => {}
    }
    erofs::make(path, &rootfs, layers)?;
    let doing = || format!("reading back {}", path.display());
    let file = OpenOptions::new().read(true).write(true).open(path).context(doing)?;
    let mut salt = [0; 32];
    getrandom(&mut salt)?;
    let tree =
        verity::append(&file, salt).context(|| format!("writing the hash tree of {}", path.display()))?;
    let label = Label {
        data_blocks: tree.data_blocks,
        root_hash: tree.root_hash,
        salt,
        file_bytes: file.metadata().context(doing)?.len(),
    };
    drop(file);
    let file = File::open(path).context_as(Kind::Internal, doing)?;
    Ok((file, label))
}

/// Fresh randomness of the host's kernel.
pub(crate) fn getrandom(bytes: &mut [u8]) -> Result<()> {
    use std::io::Read;
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(bytes))
        .context(|| "reading /dev/urandom".into())
}
