//! Which of the kept images go, and when: those whose layers are gone, and over a limit those that were used longest ago.
//!
//! An image in use is locked (shared) by the open file that its VM has, and whoever makes or looks for one holds the lock
//! of its name: what is locked either way is left alone. Removing goes image, label, lock, so that what a crash leaves
//! is no image, and goes the next time. Must never remove what cannot be made again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bailey_host::jail;
use nix::fcntl::{Flock, FlockArg};

use super::{Label, Layers, erofs};
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::vmm::qemu;

/// Held by whoever collects.
const LOCK: &str = ".collect";

/// What has an unknown name, or a root of a jail that was not asked for, goes when nobody has touched it for so long:
/// longer than anything takes to be made, or to be used once it was asked for.
const ABANDONED: Duration = Duration::from_secs(3600);

/// What was removed, and what was not.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Collected {
    pub(crate) removed: u64,
    pub(crate) removed_bytes: u64,
    pub(crate) kept: u64,
    pub(crate) kept_bytes: u64,
}

/// Which images are to go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope<'a> {
    /// Those that are of no more use, and the oldest of the others while all together have more bytes than this.
    Over(u64),
    /// All of this namespace.
    Namespace(&'a str),
}

/// All files of one name.
#[derive(Debug)]
struct Entry {
    folder: PathBuf,
    key: String,
    /// What the image takes of the disk.
    bytes: u64,
    used: SystemTime,
    /// Whether its layers are as they were: else nobody can ask for it again.
    is_current: bool,
}

impl Entry {
    fn path(&self, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", self.key))
    }
}

/// Removes what is to go of a cache's images. `wait`: for another one that collects; else that one's work is enough.
pub(crate) fn collect(images: &Path, scope: Scope<'_>, wait: bool) -> Result<Collected> {
    let Some(_one_at_a_time) = lock_all(images, wait)? else { return Ok(Collected::default()) };
    let mut entries = Vec::new();
    for folder in folders(images)? {
        if matches!(scope, Scope::Namespace(name) if !folder.ends_with(name)) {
            continue;
        }
        entries.extend(list(&folder)?);
    }
    let mut collected = Collected::default();
    let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
    for entry in in_order(entries) {
        let goes = match scope {
            Scope::Over(limit) => !entry.is_current || total > limit,
            Scope::Namespace(_) => true,
        };
        if goes && remove(&entry)? {
            total -= entry.bytes;
            collected.removed += 1;
            collected.removed_bytes += entry.bytes;
        } else {
            collected.kept += 1;
            collected.kept_bytes += entry.bytes;
        }
    }
    Ok(collected)
}

/// First what is of no use, then by the time of the last use.
fn in_order(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.sort_by_key(|one| (one.is_current, one.used));
    entries
}

fn lock_all(images: &Path, wait: bool) -> Result<Option<Flock<File>>> {
    let doing = || format!("locking {}", images.display());
    super::private_folder(images).context(doing)?;
    let path = images.join(LOCK);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.context(doing)?;
    let how = if wait { FlockArg::LockExclusive } else { FlockArg::LockExclusiveNonblock };
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno).context(doing),
    }
}

/// The namespaces' folders.
fn folders(images: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(images).context(|| format!("listing {}", images.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

/// The images of one folder. Other files in it that nobody has touched for long go at once.
fn list(folder: &Path) -> Result<Vec<Entry>> {
    let mut keys = BTreeMap::new();
    for file in fs::read_dir(folder).context(|| format!("listing {}", folder.display()))?.flatten() {
        let path = file.path();
        let ours = path.extension().is_some_and(|e| ["img", "json", "lock"].iter().any(|known| e == *known));
        match path.file_stem().filter(|_| ours) {
            Some(stem) => drop(keys.insert(stem.to_string_lossy().into_owned(), ())),
            None => remove_abandoned(&path)?,
        }
    }
    Ok(keys.into_keys().map(|key| entry(folder, key)).collect())
}

fn entry(folder: &Path, key: String) -> Entry {
    let mut entry =
        Entry { folder: folder.to_owned(), key, bytes: 0, used: SystemTime::UNIX_EPOCH, is_current: false };
    if let Ok(about) = fs::metadata(entry.path("img")) {
        entry.bytes = about.blocks() * 512;
        entry.used = about.modified().unwrap_or(entry.used);
        entry.is_current = is_current(&entry);
    }
    entry
}

fn is_current(entry: &Entry) -> bool {
    let label =
        fs::read(entry.path("json")).ok().and_then(|text| serde_json::from_slice::<Label>(&text).ok());
    let key = label.and_then(|label| Layers::committed(label.layers).key().ok().flatten());
    key.is_some_and(|key| key == entry.key)
}

/// Removes an image unless somebody uses it; whether it is gone.
fn remove(entry: &Entry) -> Result<bool> {
    let Some(_nobody_makes_it) = super::try_lock(&entry.folder, &entry.key)? else { return Ok(false) };
    let image = entry.path("img");
    if let Ok(file) = File::open(&image)
        && file.try_lock().is_err()
    {
        return Ok(false);
    }
    for path in [image, entry.path("json"), entry.path("lock")] {
        absent(&path)?;
    }
    Ok(true)
}

fn absent(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a file that something left that was killed.
fn remove_abandoned(path: &Path) -> Result<()> {
    let about = fs::symlink_metadata(path).and_then(|about| about.modified());
    if about.is_ok_and(|touched| touched.elapsed().is_ok_and(|age| age > ABANDONED)) {
        absent(path)?;
    }
    Ok(())
}

/// Removes all that is of no more use from the cache: images, and what else killed processes and older versions left.
pub(crate) fn collect_all(config: &Config, wait: bool) -> Result<Collected> {
    let collected = collect(&config.cache_dir.join("images"), Scope::Over(config.cache_bytes_max), wait)?;
    for file in fs::read_dir(config.cache_dir.join("filesystems")).into_iter().flatten().flatten() {
        let name = file.file_name().to_string_lossy().into_owned();
        // Those that are whole are a few KiB each, and have neither beginning nor end like that.
        if name.starts_with("mkfs-") || name.contains('.') {
            remove_abandoned(&file.path())?;
        }
    }
    let roots = config.cache_dir.join("jail");
    if roots.is_dir() {
        let mut keep = vec![erofs::jail_root(config)?];
        keep.extend(qemu::jail_root(&config.qemu, &roots).ok());
        jail::base::collect(&roots, &keep, ABANDONED).context(|| "removing old roots of jails".into())?;
    }
    Ok(collected)
}

/// Removes the images of a namespace that are not in use.
pub(crate) fn drop_images(config: &Config, namespace: &str) -> Result<Collected> {
    if namespace.is_empty() || namespace.contains('/') {
        return Err(Error::invalid("drop-images needs a namespace: -namespace NAME drop-images"));
    }
    let images = config.cache_dir.join("images");
    let collected = collect(&images, Scope::Namespace(namespace), true)?;
    // It stays if something is in it.
    let _in_use = fs::remove_dir(images.join(namespace));
    Ok(collected)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache with images of one block each of layers that are there; numbers say how long ago each was used.
    struct Cache(tempfile::TempDir);

    impl Cache {
        fn new() -> Cache {
            Cache(tempfile::tempdir().unwrap())
        }

        fn images(&self) -> PathBuf {
            self.0.path().join("images")
        }

        fn add(&self, namespace: &str, layer: &str, used_s_ago: u64) -> PathBuf {
            let layer = self.0.path().join(layer);
            fs::create_dir_all(&layer).unwrap();
            let layers = vec![layer];
            let key = Layers::committed(layers.clone()).key().unwrap().unwrap();
            let folder = self.images().join(namespace);
            fs::create_dir_all(&folder).unwrap();
            let label = Label { data_blocks: 1, root_hash: [0; 32], salt: [0; 32], file_bytes: 4096, layers };
            fs::write(folder.join(format!("{key}.json")), serde_json::to_vec(&label).unwrap()).unwrap();
            fs::write(folder.join(format!("{key}.lock")), "").unwrap();
            let image = folder.join(format!("{key}.img"));
            fs::write(&image, [1; 4096]).unwrap();
            let used = SystemTime::now() - Duration::from_secs(used_s_ago);
            File::options().write(true).open(&image).unwrap().set_modified(used).unwrap();
            image
        }

        fn collect(&self, scope: Scope<'_>) -> (u64, u64) {
            let collected = collect(&self.images(), scope, true).unwrap();
            (collected.removed, collected.kept)
        }

        fn files(&self, namespace: &str) -> usize {
            fs::read_dir(self.images().join(namespace)).map_or(0, Iterator::count)
        }
    }

    #[test]
    fn over_the_limit_the_longest_unused_go() {
        let cache = Cache::new();
        let old = cache.add("a", "layer-1", 300);
        let newest = cache.add("a", "layer-2", 100);
        let middle = cache.add("b", "layer-3", 200);
        assert_eq!(cache.collect(Scope::Over(3 * 4096)), (0, 3));
        assert_eq!(cache.collect(Scope::Over(2 * 4096)), (1, 2));
        assert!(!old.exists() && middle.exists() && newest.exists());
        assert_eq!(cache.collect(Scope::Over(4096)), (1, 1));
        assert!(!middle.exists() && newest.exists());
        assert_eq!((cache.files("a"), cache.files("b")), (3, 0), "labels and locks went along");
    }

    #[test]
    fn what_is_used_or_being_made_stays() {
        let cache = Cache::new();
        let image = cache.add("a", "layer", 100);
        let used = File::open(&image).unwrap();
        used.try_lock_shared().unwrap();
        let passed_on = used.try_clone().unwrap();
        drop(used);
        assert_eq!(cache.collect(Scope::Over(0)), (0, 1), "whoever got the file from its opener uses it");
        drop(passed_on);
        let key = image.file_stem().unwrap().to_string_lossy().into_owned();
        let looking = super::super::lock(&cache.images().join("a"), &key).unwrap();
        assert_eq!(cache.collect(Scope::Over(0)), (0, 1));
        drop(looking);
        assert_eq!(cache.collect(Scope::Over(0)), (1, 0));
    }

    #[test]
    fn images_of_layers_that_are_gone_go_first() {
        let cache = Cache::new();
        let gone = cache.add("a", "gone", 0);
        let old = cache.add("a", "kept", 1000);
        fs::remove_dir(cache.0.path().join("gone")).unwrap();
        assert_eq!(cache.collect(Scope::Over(4096)), (1, 1));
        assert!(!gone.exists() && old.exists());
        // As good as gone: the same name for something else.
        fs::remove_dir(cache.0.path().join("kept")).unwrap();
        fs::create_dir(cache.0.path().join("other")).unwrap();
        fs::rename(cache.0.path().join("other"), cache.0.path().join("kept")).unwrap();
        assert_eq!(cache.collect(Scope::Over(u64::MAX)), (1, 0));
    }

    #[test]
    fn what_a_crash_left_goes() {
        let cache = Cache::new();
        let folder = cache.images().join("a");
        let image = cache.add("a", "layer", 0);
        // Killed between image and label, label and lock; and what older versions made.
        fs::write(folder.join("0123.json"), "{").unwrap();
        fs::write(folder.join("4567.lock"), "").unwrap();
        fs::write(folder.join("89ab.img"), "no label").unwrap();
        for (name, age) in [("once-1", 7200), ("cdef.new", 7200), ("once-2", 0)] {
            let file = File::create(folder.join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        assert_eq!(cache.collect(Scope::Over(u64::MAX)), (3, 1));
        assert!(image.exists() && folder.join("once-2").exists());
        assert_eq!(cache.files("a"), 4, "an image with its label and lock, and what may be in the making");
    }

    #[test]
    fn one_namespace_is_dropped_and_no_other() {
        let cache = Cache::new();
        let (dropped, kept) = (cache.add("a", "layer", 0), cache.add("ab", "layer", 0));
        assert_eq!(cache.collect(Scope::Namespace("a")), (1, 0));
        assert!(!dropped.exists() && kept.exists());
    }

    #[test]
    fn a_lock_that_was_removed_meanwhile_is_none() {
        let cache = Cache::new();
        let folder = cache.images();
        fs::create_dir_all(&folder).unwrap();
        let first = super::super::lock(&folder, "key").unwrap();
        // As a collector does, which holds the lock.
        fs::remove_file(folder.join("key.lock")).unwrap();
        let second = super::super::try_lock(&folder, "key").unwrap();
        assert!(second.is_some(), "there is a new lock of that name");
        drop(first);
        assert!(super::super::try_lock(&folder, "key").unwrap().is_none(), "and it is the one that holds");
    }
}
