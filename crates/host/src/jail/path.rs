//! Opening paths of the host so that nobody but root can have redirected them.
//!
//! Every component is opened from the one before it, without following a link of any kind, and every directory on
//! the way must belong to root and be writable to root alone. So neither a link that is there, nor one that is put
//! there in the meantime, leads a privileged mount or copy elsewhere (the fault behind CVE-2026-1386).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{FileStat, Mode, SFlag};

/// Why a path is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Relative, or with `..` in it.
    #[error("not an absolute path of plain names")]
    NotPlain(PathBuf),
    /// A component could not be opened. A symbolic link gives `ELOOP`.
    #[error("open the component {component}")]
    Open {
        /// The whole path.
        path: PathBuf,
        /// The part up to the one that failed.
        component: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A directory on the way can be changed by somebody other than root.
    #[error("{component} can be changed by users other than root")]
    Untrusted {
        /// The whole path.
        path: PathBuf,
        /// The directory.
        component: String,
    },
    /// Neither a regular file nor a directory.
    #[error("neither a regular file nor a directory")]
    Kind(PathBuf),
    /// The file has another name somewhere, through which somebody else may reach or have chosen it.
    #[error("the file has {links} hard links and must have one")]
    HardLinks {
        /// The whole path.
        path: PathBuf,
        /// How many names it has.
        links: u64,
    },
}

impl PathError {
    /// The path that was asked for.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Open { path, .. } | Self::Untrusted { path, .. } | Self::HardLinks { path, .. } => path,
            Self::NotPlain(path) | Self::Kind(path) => path,
        }
    }
}

impl From<PathError> for io::Error {
    fn from(error: PathError) -> Self {
        match error {
            PathError::Open { source, .. } => source,
            other => io::Error::other(other.to_string()),
        }
    }
}

/// A path that was opened, as a descriptor that names it and gives no access to its contents (`O_PATH`).
#[derive(Debug)]
pub struct Trusted {
    /// The descriptor.
    pub fd: OwnedFd,
    /// Its metadata at that moment.
    pub stat: FileStat,
}

impl Trusted {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        kind(&self.stat) == SFlag::S_IFDIR
    }

    /// A path that leads to exactly this file for as long as the descriptor is open.
    #[must_use]
    pub fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Opens a regular file or a directory. `single`: a file must have no second name.
///
/// # Errors
/// See [`PathError`].
pub fn open(path: &Path, single: bool) -> Result<Trusted, PathError> {
    let mut components = path.components();
    if components.next() != Some(Component::RootDir) {
        return Err(PathError::NotPlain(path.to_owned()));
    }
    let failed = |component: &Path, source: nix::Error| PathError::Open {
        path: path.to_owned(),
        component: component.display().to_string(),
        source: source.into(),
    };
    let mut so_far = PathBuf::from("/");
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let mut fd =
        nix::fcntl::open("/", flags | OFlag::O_DIRECTORY, Mode::empty()).map_err(|e| failed(&so_far, e))?;
    let mut stat = nix::sys::stat::fstat(&fd).map_err(|e| failed(&so_far, e))?;
    for component in components {
        let Component::Normal(name) = component else { return Err(PathError::NotPlain(path.to_owned())) };
        if stat.st_uid != 0 || stat.st_mode & 0o022 != 0 {
            let component = so_far.display().to_string();
            return Err(PathError::Untrusted { path: path.to_owned(), component });
        }
        so_far.push(name);
        fd = open_below(&fd, name, flags).map_err(|e| failed(&so_far, e))?;
        stat = nix::sys::stat::fstat(&fd).map_err(|e| failed(&so_far, e))?;
        if kind(&stat) == SFlag::S_IFLNK {
            return Err(failed(&so_far, nix::Error::ELOOP));
        }
    }
    match kind(&stat) {
        SFlag::S_IFDIR => {}
        SFlag::S_IFREG if single && stat.st_nlink != 1 => {
            return Err(PathError::HardLinks { path: path.to_owned(), links: stat.st_nlink });
        }
        SFlag::S_IFREG => {}
        _ => return Err(PathError::Kind(path.to_owned())),
    }
    Ok(Trusted { fd, stat })
}

/// Opens a directory that is itself root's alone, such as one that becomes a jail's root.
///
/// # Errors
/// See [`PathError`].
pub fn open_root_owned_dir(path: &Path) -> Result<Trusted, PathError> {
    let opened = open(path, false)?;
    if !opened.is_dir() {
        return Err(PathError::Kind(path.to_owned()));
    }
    if opened.stat.st_uid != 0 || opened.stat.st_mode & 0o022 != 0 {
        let component = path.display().to_string();
        return Err(PathError::Untrusted { path: path.to_owned(), component });
    }
    Ok(opened)
}

/// Opens `name` below `parent`, never through a link and never out of it.
pub(super) fn open_below(
    parent: impl AsFd,
    name: impl AsRef<std::ffi::OsStr>,
    flags: OFlag,
) -> nix::Result<OwnedFd> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    nix::fcntl::openat2(
        parent,
        name.as_ref(),
        OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve),
    )
}
