//! The read-only root of a jail: the program, its loader and libraries, its data, and empty mount points.
//!
//! Owns a folder with one directory per program and version of its files, built once and used by every jail of that
//! program. The directory's name is made from the identity of all that was copied into it, so an upgraded library
//! gives a new directory. Must never change a directory that has its final name.

pub(super) mod elf;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;
use sha2::{Digest, Sha256};

use super::path::{self, PathError, Trusted};

/// Where something is mounted in each jail.
const MOUNT_POINTS: [&str; 4] = ["/dev", "/proc", "/run", "/tmp"];
/// Changed when the layout changes, so that older directories are not taken for current ones.
const LAYOUT: &str = "bailey jail base 1";
const LOCK: &str = ".lock";
/// The prefix of a directory that is being built.
const UNFINISHED: &str = ".new-";
/// Data directories are shallow; a deeper one is a mistake, or a loop.
const DEEPEST: usize = 16;

/// Why a base could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The folder for bases can be changed by others, or is none.
    #[error("trust the folder for the roots of jails")]
    Folder(#[source] PathError),
    /// A file could not be read, copied or made.
    #[error("{what} {path}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The loader does not find all libraries, or something is no file at all.
    #[error("find the libraries of {path}: {why}")]
    Libraries {
        /// The program or module.
        path: PathBuf,
        /// What the loader said.
        why: String,
    },
}

/// Names what was being done to a path.
fn doing(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BaseError {
    let path = path.to_owned();
    move |source| BaseError::File { what, path, source }
}

/// Makes the root for `program` below the folder `into`, or finds it there, and returns its path.
///
/// `extra` are files and directories that the program reads or loads (modules, firmware), put at their own paths;
/// the libraries of those that are shared objects come along. Libraries are those that the host's loader finds.
///
/// # Errors
/// See [`BaseError`]. After an error, nothing with a final name has appeared.
pub fn prepare(program: &Path, extra: &[PathBuf], into: &Path) -> Result<PathBuf, BaseError> {
    let folder = open_folder(into)?;
    let files = gather(program, extra)?;
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let target = into.join(format!("{name}-{}", identity(&files)));
    // INVARIANT: noted before it is handed out, so that no collector takes it for one that nobody wants.
    if note_asked(&target) {
        return Ok(target);
    }
    let _lock = lock(&folder, into)?;
    if note_asked(&target) {
        return Ok(target);
    }
    let building = into.join(format!("{UNFINISHED}{}", std::process::id()));
    let built = build(&files, &building)
        .and_then(|()| fs::rename(&building, &target).map_err(doing("give its name to", &target)));
    if built.is_err() {
        let _told_by_the_first_error = fs::remove_dir_all(&building);
    }
    built.map(|()| target)
}

/// Notes that a root was asked for; whether there is one.
fn note_asked(root: &Path) -> bool {
    File::open(root).and_then(|directory| directory.set_modified(SystemTime::now())).is_ok()
}

/// Removes the roots below `into` that are neither in `keep` nor in use by a jail, and that nobody has asked for within
/// `unasked`: one that was just handed out is about to be used. Returns how many.
///
/// # Errors
/// See [`BaseError`].
pub fn collect(into: &Path, keep: &[PathBuf], unasked: Duration) -> Result<usize, BaseError> {
    let folder = open_folder(into)?;
    // Nothing is being built while we hold this, so what is unfinished was abandoned.
    let _lock = lock(&folder, into)?;
    let mut removed = 0;
    for entry in fs::read_dir(into).map_err(doing("list", into))? {
        let entry = entry.map_err(doing("list", into))?;
        let path = entry.path();
        if !entry.file_type().map_err(doing("look at", &path))?.is_dir() || keep.contains(&path) {
            continue;
        }
        let directory = File::open(&path).map_err(doing("open", &path))?;
        let asked =
            directory.metadata().and_then(|about| about.modified()).map_err(doing("look at", &path))?;
        if asked.elapsed().unwrap_or_default() < unasked {
            continue;
        }
        let Ok(_unused) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) else { continue };
        fs::remove_dir_all(&path).map_err(doing("remove", &path))?;
        removed += 1;
    }
    Ok(removed)
}

/// Keeps [`collect`] from removing the base for as long as the value lives.
pub(super) fn mark_in_use(base: &Trusted) -> io::Result<Flock<OwnedFd>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = nix::fcntl::openat(&base.fd, ".", flags, Mode::empty())?;
    Flock::lock(directory, FlockArg::LockSharedNonblock).map_err(|(_, error)| error.into())
}

fn open_folder(into: &Path) -> Result<Trusted, BaseError> {
    path::open_root_owned_dir(into).map_err(BaseError::Folder)
}

fn lock(folder: &Trusted, into: &Path) -> Result<Flock<File>, BaseError> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(&folder.fd, LOCK, flags, Mode::from_bits_truncate(0o600))
        .map_err(io::Error::from)
        .map_err(doing("open the lock of", into))?;
    Flock::lock(File::from(file), FlockArg::LockExclusive)
        .map_err(|(_, error)| doing("lock", into)(error.into()))
}

/// Everything that the base will hold: where, and whether it is executed.
type Files = BTreeMap<PathBuf, bool>;

fn gather(program: &Path, extra: &[PathBuf]) -> Result<Files, BaseError> {
    let mut files = Files::new();
    let mut loader = None;
    for (index, path) in std::iter::once(program).chain(extra.iter().map(PathBuf::as_path)).enumerate() {
        let is_dir = fs::metadata(path).map_err(doing("look at", path))?.is_dir();
        if is_dir {
            add_directory(path, 0, &mut files)?;
            continue;
        }
        files.entry(path.to_owned()).or_insert(index == 0);
        let file = File::open(path).map_err(doing("open", path))?;
        let needs = elf::needs(&file).map_err(doing("read", path))?.unwrap_or_default();
        if index == 0 {
            loader = needs.interpreter;
            files.extend(loader.clone().map(|loader| (loader, true)));
        }
        if let (true, Some(loader)) = (needs.dynamic, &loader) {
            for library in libraries(loader, path)? {
                files.entry(library).or_insert(false);
            }
        }
    }
    Ok(files)
}

fn add_directory(directory: &Path, depth: usize, files: &mut Files) -> Result<(), BaseError> {
    if depth > DEEPEST {
        return Err(doing("list", directory)(io::Error::other("too many levels of directories")));
    }
    for entry in fs::read_dir(directory).map_err(doing("list", directory))? {
        let path = entry.map_err(doing("list", directory))?.path();
        let kind = fs::metadata(&path).map_err(doing("look at", &path))?.file_type();
        if kind.is_dir() {
            add_directory(&path, depth + 1, files)?;
        } else if kind.is_file() {
            files.entry(path).or_insert(false);
        }
    }
    Ok(())
}

/// Asks the loader which libraries it would load for `object`.
fn libraries(loader: &Path, object: &Path) -> Result<Vec<PathBuf>, BaseError> {
    let fail = |why: String| BaseError::Libraries { path: object.to_owned(), why };
    let mut command = Command::new(loader);
    command.arg("--list").arg(object).env_clear().stdin(Stdio::null());
    let output = command.output().map_err(doing("run", loader))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(fail(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        // "name => /path (0xaddress)", "/path/of/loader (0xaddress)", "linux-vdso.so.1 (0xaddress)", or static.
        let place = line.split_once("=>").map_or(line, |(_, place)| place.trim());
        if place.starts_with("not found") {
            return Err(fail(line.to_owned()));
        }
        let place = place.rsplit_once(" (").map_or(place, |(path, _)| path);
        if place.starts_with('/') {
            found.push(PathBuf::from(place));
        }
    }
    Ok(found)
}

/// A name for these files as they are now.
fn identity(files: &Files) -> String {
    let mut hash = Sha256::new();
    hash.update(LAYOUT);
    for (path, executed) in files {
        hash.update([0, u8::from(*executed)]);
        hash.update(path.as_os_str().as_bytes());
        // A file that vanished meanwhile is told by the copy.
        if let Ok(data) = fs::metadata(path) {
            for number in [data.dev(), data.ino(), data.size(), data.mtime().cast_unsigned()] {
                hash.update(number.to_le_bytes());
            }
            hash.update(data.mtime_nsec().to_le_bytes());
        }
    }
    hash.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect()
}

fn build(files: &Files, root: &Path) -> Result<(), BaseError> {
    match fs::remove_dir_all(root) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(doing("remove", root)(e)),
        _ => {}
    }
    fs::create_dir(root).map_err(doing("make", root))?;
    for point in MOUNT_POINTS {
        let point = below(root, Path::new(point));
        fs::create_dir(&point).map_err(doing("make", &point))?;
    }
    for (path, executed) in files {
        let target = below(root, path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(doing("make", parent))?;
        }
        fs::copy(path, &target).map_err(doing("copy", path))?;
        let mode = if *executed { 0o555 } else { 0o444 };
        fs::set_permissions(&target, Permissions::from_mode(mode))
            .map_err(doing("set the mode of", &target))?;
    }
    close_directories(root)
}

/// Takes away the permission to write from every directory.
fn close_directories(directory: &Path) -> Result<(), BaseError> {
    for entry in fs::read_dir(directory).map_err(doing("list", directory))? {
        let entry = entry.map_err(doing("list", directory))?;
        if entry.file_type().map_err(doing("look at", &entry.path()))?.is_dir() {
            close_directories(&entry.path())?;
        }
    }
    fs::set_permissions(directory, Permissions::from_mode(0o555)).map_err(doing("set the mode of", directory))
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}
