//! Runs `mkfs.erofs` over the merged layers, in a jail: it reads names, attributes and contents that a tenant chose.
//!
//! The layers are merged in a mount namespace of a thread's own, which the jail's begins as a copy of. In the jail there
//! is the program, the tree, read-only, and the image as an open file without a name: nothing to clean up if we are
//! killed. It keeps one capability, to read files whoever they belong to.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use bailey_host::cgroup::{Cgroup, Limits};
use bailey_host::jail::{self, FileMount, JailSpec, Jailed, Profile, Reopen, Rlimits};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::Layers;
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::vm::{OwnedCgroup, lease_uid};

/// Where the tree and the image are in the jail.
const TREE: &str = "/run/tree";
const IMAGE_FD: i32 = 3;

/// Memory for the books that it keeps of all files, and for what it has read and not written yet.
const MEMORY_BYTES: u64 = 1 << 30;
/// Addresses, which stacks and heaps of threads take more of than they use.
const ADDRESS_BYTES: u64 = 4 << 30;
/// Threads beside one for each processor: newer versions read in parallel.
const THREADS: u64 = 4;
/// Open files: one for each level of folders.
const OPEN_FILES: u64 = 512;

/// It writes no more at once; what the limit cuts off is less. It is the first process of its namespace, so the signal
/// for too large a file does not end it: its write fails.
const LAST_WRITE: u64 = 1 << 20;

/// What the C library loads when a thread ends, wherever a distribution puts it.
const DATA: [&str; 2] = ["/usr/lib/x86_64-linux-gnu/libgcc_s.so.1", "/usr/lib64/libgcc_s.so.1"];

/// What is kept of what it says.
const WORDS: usize = 4096;
const LINE: usize = 300;

/// For whom an image is made.
#[derive(Clone)]
pub(crate) struct Maker {
    pub(crate) config: Config,
    pub(crate) namespace: String,
    /// The sandbox's cgroup, which is not in use yet: the work is on its account, and it is removed with it.
    pub(crate) cgroup: PathBuf,
    /// Lends its `rootfs` folder as a place to mount at.
    pub(crate) bundle: PathBuf,
}

/// Makes a filesystem image of `layers`: a file without a name in `folder`, root's alone.
pub(super) fn make(maker: &Maker, folder: &Path, layers: &Layers) -> Result<File> {
    let doing = || format!("making the image of the root filesystem in {}", folder.display());
    let lease = lease_uid(&maker.config)?;
    let mut options = OpenOptions::new();
    let image = options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(folder);
    let image = image.context(doing)?;
    fchown(&image, Some(lease.uid()), None).context(doing)?;
    let made = in_own_mounts(maker, layers, &image, lease.uid());
    // Whoever might have held it open is gone.
    fchown(&image, Some(0), None).context(doing)?;
    made.map_err(|error| Error::new(error.kind(), doing()).because(error))?;
    Ok(image)
}

/// Runs the program with the layers merged, in a thread whose mounts nobody else sees.
fn in_own_mounts(maker: &Maker, layers: &Layers, image: &File, uid: u32) -> Result<()> {
    let body = || {
        unshare(CloneFlags::CLONE_NEWNS).context(|| "making a mount namespace".into())?;
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).context(|| "hiding our mounts".into())?;
        let rootfs = maker.bundle.join("rootfs");
        merge(&rootfs, &layers.folders)?;
        run(maker, &rootfs, image, uid)
    };
    let done = thread::scope(|scope| {
        let thread = thread::Builder::new().name("image".into()).spawn_scoped(scope, body);
        thread.map(thread::ScopedJoinHandle::join)
    });
    let done = done.context(|| "starting a thread".into())?;
    done.unwrap_or_else(|_| Err(Error::internal("making the image of the root filesystem ended in a panic")))
}

/// Mounts the folders, the first on top, read-only at `rootfs`.
fn merge(rootfs: &Path, folders: &[PathBuf]) -> Result<()> {
    if let [one] = folders {
        if one == rootfs {
            return Ok(());
        }
        let bind = MsFlags::MS_BIND;
        return mount(Some(one), rootfs, None::<&str>, bind, None::<&str>)
            .context(|| format!("binding {}", one.display()));
    }
    let names: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let options = format!("lowerdir={}", names.join(":"));
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(Some("overlay"), rootfs, Some("overlay"), flags, Some(options.as_str()))
        .context(|| format!("merging the {} layers of the image", folders.len()))
}

/// The jail's root: the program and its libraries.
pub(super) fn jail_root(config: &Config) -> Result<PathBuf> {
    let (program, roots) = (&config.mkfs_erofs, config.cache_dir.join("jail"));
    if !program.is_file() {
        let at = program.display();
        let text = format!(
            "there is no mkfs.erofs at {at}: install Debian's package erofs-utils, or set mkfs_erofs"
        );
        return Err(Error::new(Kind::Unavailable, text));
    }
    fs::create_dir_all(&roots).context(|| format!("making {}", roots.display()))?;
    let data: Vec<PathBuf> = DATA.iter().map(PathBuf::from).filter(|path| path.exists()).collect();
    jail::base::prepare(program, &data, &roots).context(|| "preparing the jail of mkfs.erofs".into())
}

fn run(maker: &Maker, rootfs: &Path, image: &File, uid: u32) -> Result<()> {
    let config = &maker.config;
    let mut spec = JailSpec::new(uid, jail_root(config)?, config.mkfs_erofs.clone(), Profile::MkfsErofs);
    let image_path = format!("/proc/self/fd/{IMAGE_FD}");
    // No random name: images of the same files differ in when they were made, and in nothing else.
    let arguments = ["mkfs.erofs", "-U", "00000000-0000-0000-0000-000000000000", "--", &image_path, TREE];
    spec.argv = arguments.map(str::to_owned).to_vec();
    spec.read_all = true;
    spec.files = vec![FileMount { source: rootfs.to_owned(), target: TREE.into(), writable: false }];
    spec.reopen = vec![Reopen { fd: IMAGE_FD, writable: true }];
    let threads = THREADS + thread::available_parallelism().map_or(1, |count| count.get() as u64);
    spec.rlimits = Rlimits {
        nofile: OPEN_FILES,
        nproc: threads,
        memlock: 0,
        fsize: Some(config.image_bytes_max),
        address_space: Some(ADDRESS_BYTES),
    };
    let cgroup =
        Cgroup::at(&maker.cgroup).context_as(Kind::Invalid, || "naming the sandbox's cgroup".into())?;
    let limits = Limits { memory_bytes: Some(MEMORY_BYTES), pids: Some(threads), ..Limits::default() };
    let cgroup = OwnedCgroup::create(cgroup, &limits)?;
    let (words, its_words) = std::io::pipe().context(|| "making a pipe".into())?;
    let its_image = image.try_clone().context(|| "copying a descriptor".into())?;
    let fds: Vec<(OwnedFd, i32)> =
        vec![(its_image.into(), IMAGE_FD), (its_words.into(), libc::STDERR_FILENO)];
    let jailed = jail::spawn(&spec, fds, |pid| cgroup.0.add(pid).map_err(Into::into));
    let jailed = jailed.context(|| "starting mkfs.erofs in its jail".into())?;
    let listening = thread::Builder::new().name("image-words".into()).spawn(move || last_words(words));
    let ended = wait(&jailed, config.image_timeout);
    let words = listening.context(|| "starting a thread".into())?.join().unwrap_or_default();
    let written = image.metadata().context(|| "looking at the image".into())?.len();
    let at_limit = written.next_multiple_of(LAST_WRITE) >= config.image_bytes_max;
    let walls = Walls { at_limit, out_of_memory: cgroup.0.oom_kills() > 0 };
    judge(config, ended?, &walls, &words)
}

/// Waits for its end, which comes by force when its time is over; then there is no status.
fn wait(jailed: &Jailed, limit: Duration) -> Result<Option<WaitStatus>> {
    let mut ends = [PollFd::new(jailed.pidfd.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let in_time = poll(&mut ends, limit) != Ok(0);
    // Whatever it is: nothing of it goes on, and it is reaped.
    let _ended_already = if in_time { Ok(()) } else { jailed.kill(Signal::SIGKILL) };
    let status = jailed.wait().context(|| "waiting for mkfs.erofs".into())?;
    Ok(in_time.then_some(status))
}

/// What it said last. Reads to the end, so that it never waits for a reader.
fn last_words(mut pipe: impl Read) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; WORDS]);
    while let Ok(count @ 1..) = pipe.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..count]);
        let over = kept.len().saturating_sub(WORDS);
        kept.drain(..over);
    }
    let text = String::from_utf8_lossy(&kept);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    // It quotes names that a tenant chose: no control characters, and not too much of them.
    line.trim().chars().take(LINE).flat_map(char::escape_debug).collect()
}

/// Which limits it has come up against.
struct Walls {
    at_limit: bool,
    out_of_memory: bool,
}

/// Turns its end into a result.
fn judge(config: &Config, ended: Option<WaitStatus>, walls: &Walls, words: &str) -> Result<()> {
    let (size, seconds) = (config.image_bytes_max, config.image_timeout.as_secs());
    let text = match ended {
        Some(WaitStatus::Exited(_, 0)) => return Ok(()),
        None => format!("it took longer than {seconds} s: raise image_timeout_seconds"),
        Some(_) if walls.at_limit => {
            format!("it is larger than {size} bytes ({} MiB): raise image_max", size >> 20)
        }
        Some(_) if walls.out_of_memory => {
            format!("its files need more than {} MiB of memory to be listed", MEMORY_BYTES >> 20)
        }
        Some(WaitStatus::Signaled(_, Signal::SIGSYS, _)) => {
            "mkfs.erofs made a system call that its jail does not allow; the kernel's log says which"
                .to_owned()
        }
        Some(WaitStatus::Exited(_, code)) => format!("mkfs.erofs ended with exit code {code}: {words}"),
        Some(WaitStatus::Signaled(_, signal, _)) => format!("mkfs.erofs was killed by {signal}: {words}"),
        Some(other) => format!("mkfs.erofs ended with {other:?}: {words}"),
    };
    Err(Error::invalid(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_tenant_chose_are_quoted_harmlessly() {
        let said = "first\n<E> erofs: bad name \u{1b}[2J\u{7} here\n\n";
        assert_eq!(last_words(said.as_bytes()), "<E> erofs: bad name \\u{1b}[2J\\u{7} here");
        let long = "x".repeat(100_000);
        assert_eq!(last_words(long.as_bytes()).len(), LINE);
        assert_eq!(last_words(&b""[..]), "it said nothing");
    }
}
