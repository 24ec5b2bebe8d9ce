//! Templates: a VM booted once for a tenant and a shape, saved, and handed out to be cloned.
//!
//! Each is held by a keeper, a small process of its own: it has the memory and the devices as sealed files without
//! names, and gives them to whoever of root's asks at its socket. So a template is gone when its keeper is, and with
//! it the memory: by age, by number of clones, for want of use, or because its tenant is deleted. Nobody else can
//! write to it: clones map the sealed memory copy-on-write.
//!
//! While its tenant starts sandboxes, a keeper also has spares: clones that are up before it is known what they will
//! run. See [`spare`].

mod hand_over;
mod keeper;
mod pool;
mod rehearsal;
mod spare;

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

pub(crate) use self::keeper::keep;
pub(crate) use self::spare::{Spare, adopt, wait};
use crate::args::Args;
use crate::config::{Config, FILE_VARIABLE};
use crate::error::{Context, Error, Kind, Result};
use crate::vmm::{Description, GuestImage, Saved, Shape};

/// What is asked of a keeper, in one byte.
const GIVE: u8 = b'g';
const SPARE: u8 = b's';
const END: u8 = b'e';

/// How often a keeper is asked to end.
const END_TRIES: u32 = 100;

/// What a keeper says on its standard output when its socket is there.
const READY: &[u8] = b"ready\n";

/// Where a tenant's keepers listen.
fn folder(state: &Path, namespace: &str) -> PathBuf {
    state.join("templates").join(namespace)
}

/// The socket of the template for one shape: its name tells everything that a clone must have in common with it.
pub(crate) fn socket(
    config: &Config,
    namespace: &str,
    driver: &Description,
    shape: &Shape,
) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    let program = config.vmm_program();
    let program = fs::metadata(program).context(|| format!("reading {}", program.display()))?;
    let digests = &shape.guest.manifest.sha256;
    let (inode, changed) = (program.ino().to_string(), program.mtime().to_string());
    let version = bailey_types::guest::VERSION.to_string();
    for part in [
        driver.name,
        driver.accel,
        &digests.vmlinux,
        &digests.initramfs,
        &shape.guest.manifest.cmdline,
        &inode,
        &changed,
        &version,
    ] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let hash: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let name = format!("{}m-{}c-{hash}.sock", shape.memory_bytes >> 20, shape.vcpus);
    Ok(folder(&config.state_dir, namespace).join(name))
}

/// The shape that the first asker named: bytes of memory and processors.
fn shape_of(config: &Config, id: &str) -> Result<Shape> {
    let parts =
        id.split_once('-').and_then(|(memory, vcpus)| Some((memory.parse().ok()?, vcpus.parse().ok()?)));
    let (memory_bytes, vcpus) =
        parts.ok_or_else(|| Error::invalid(format!("{id} is no shape of a template")))?;
    Ok(Shape { guest: GuestImage::find(&config.guest_dir)?, memory_bytes, vcpus })
}

/// A template of this shape: from its keeper, which is started if there is none. Blocks: a template takes as long to
/// make as a boot.
pub(crate) fn get(config: &Config, namespace: &str, driver: &Description, shape: &Shape) -> Result<Saved> {
    let socket = socket(config, namespace, driver, shape)?;
    if let Some(saved) = ask(&socket)? {
        return Ok(saved);
    }
    let folder = folder(&config.state_dir, namespace);
    fs::create_dir_all(&folder).context(|| format!("making {}", folder.display()))?;
    let lock = fs::File::open(&folder).context(|| format!("opening {}", folder.display()))?;
    let _one_at_a_time = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context(|| format!("locking {}", folder.display()))?;
    if let Some(saved) = ask(&socket)? {
        return Ok(saved);
    }
    start_keeper(config, namespace, shape)?;
    ask(&socket)?.ok_or_else(|| Error::internal("the template's keeper ended at once"))
}

/// Asks a keeper; none if there is none.
fn ask(socket: &Path) -> Result<Option<Saved>> {
    let Ok(stream) = StdStream::connect(socket) else { return Ok(None) };
    hand_over::take(&stream)
}

fn start_keeper(config: &Config, namespace: &str, shape: &Shape) -> Result<()> {
    let doing = || "starting a template's keeper".to_owned();
    let mut keeper = Command::new("/proc/self/exe")
        .envs(config.file.as_ref().map(|file| (FILE_VARIABLE, file)))
        .args(["-namespace", namespace, "-id"])
        .arg(format!("{}-{}", shape.memory_bytes, shape.vcpus))
        .arg("keep-template")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(doing)?;
    let (mut said, mut complained) = (Vec::new(), String::new());
    if let Some(mut out) = keeper.stdout.take() {
        // A keeper closes its output when it serves, or ends.
        out.read_to_end(&mut said).context(doing)?;
    }
    if said == READY {
        // It outlives us: whoever reaps orphans reaps it.
        return Ok(());
    }
    if let Some(error) = keeper.stderr.take() {
        error.take(4096).read_to_string(&mut complained).context(doing)?;
    }
    keeper.wait().context(doing)?;
    Err(Error::new(Kind::Unavailable, "making a template").because(complained.trim().to_owned()))
}

/// Ends one keeper: asks until nobody listens any more.
fn end(socket: &Path) -> Result<()> {
    for _ in 0..END_TRIES {
        let Ok(stream) = StdStream::connect(socket) else { return Ok(()) };
        // Its answer is that the connection ends: with the keeper, or, if it was busy, without.
        drop(hand_over::ask(&stream, END));
    }
    Err(Error::internal(format!("the template's keeper at {} does not end", socket.display())))
}

/// Ends every template of a namespace.
pub(crate) fn drop_all(args: &Args) -> Result<()> {
    if args.namespace.is_empty() {
        return Err(Error::invalid("drop-templates needs a namespace: -namespace NAME drop-templates"));
    }
    let config = Config::load(None)?;
    let folder = folder(&config.state_dir, &args.namespace);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.context(|| format!("listing {}", folder.display()))?,
    };
    for entry in entries.flatten() {
        end(&entry.path())?;
        match fs::remove_file(entry.path()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(|| format!("removing {}", entry.path().display()));
            }
            _ => {}
        }
    }
    match fs::remove_dir(&folder) {
        // The last keeper was faster.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context(|| format!("removing {}", folder.display())),
    }
}
