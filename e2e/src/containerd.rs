//! A containerd of a test's own: sockets, state and content in one temporary folder, mounts in a namespace of its
//! own, so that what a dying test leaves mounted goes away with its processes. It does not outlive the test.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::process::shortened;
use crate::{leftovers, settings, wait};

/// How long containerd may take to answer, on a machine that is busy with booting microVMs.
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Where programs of the system are, for a containerd whose environment is otherwise empty.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Sockets have short names; a folder directly below this one leaves room for what containerd and shims append.
const PARENT: &str = "/run";

/// Users for the sandboxes of one test's process: above those that a shim takes by itself.
const FIRST_UID: u32 = 2_100_000_000;
const UIDS: u32 = 1000;
const PROCESSES: u32 = 1 << 20;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A running containerd.
pub struct Containerd {
    folder: TempDir,
    namespace: String,
    child: Option<Child>,
    mounts: Option<File>,
}

impl Containerd {
    /// Starts one that finds shims in `bin_dir`.
    pub fn start(bin_dir: &Path) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("these tests start containerd and need root: run them as root, e.g. with sudo -E");
        }
        let folder =
            tempfile::Builder::new().prefix("be2e.").tempdir_in(PARENT).context("making a folder")?;
        let namespace = format!("e2e-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut made = Self { folder, namespace, child: None, mounts: None };
        made.configure(bin_dir)?;
        made.launch(bin_dir)?;
        Ok(made)
    }

    /// The folder that holds all that belongs to it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The containerd namespace that `ctr` works in; a part of the names of cgroups, and unique to this containerd.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The socket that clients connect to.
    pub fn socket(&self) -> PathBuf {
        self.folder().join("c.sock")
    }

    /// The settings of our shim.
    pub fn shim_config(&self) -> PathBuf {
        self.folder().join("shim.toml")
    }

    /// Changes settings of our shim: for each key a value as TOML has it. They hold for what starts from now on.
    pub fn set_shim(&self, settings: &[(&str, &str)]) -> Result<()> {
        let path = self.shim_config();
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let is_set_anew = |line: &str| {
            let key = line.split_once(" = ").map_or("", |(key, _)| key);
            settings.iter().any(|(name, _)| *name == key)
        };
        let kept = text.lines().filter(|line| !is_set_anew(line)).map(str::to_owned);
        let new = settings.iter().map(|(key, value)| format!("{key} = {value}"));
        let lines: Vec<String> = kept.chain(new).collect();
        fs::write(&path, lines.join("\n")).with_context(|| format!("writing {}", path.display()))
    }

    /// Where our shim keeps what a running sandbox needs.
    pub fn shim_state_dir(&self) -> PathBuf {
        self.folder().join("bailey")
    }

    /// Where our shim keeps images in its own form.
    pub fn shim_cache_dir(&self) -> PathBuf {
        self.folder().join("cache")
    }

    /// containerd's process, if it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.child.as_ref().and_then(|child| i32::try_from(child.id()).ok()).map(Pid::from_raw)
    }

    /// A command that sees the mounts that containerd and its shims see.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        if let Some(mounts) = &self.mounts {
            command.arg(format!("--mount=/proc/{}/fd/{}", std::process::id(), mounts.as_raw_fd()));
        }
        command.arg("--").arg(program);
        clear_environment(&mut command);
        command.env("PATH", path());
        command
    }

    /// Ends containerd, with SIGTERM or as a crash, and starts it again on the same state.
    pub fn restart(&mut self, signal: Signal) -> Result<()> {
        self.stop(signal)?;
        let bin_dir = fs::read_to_string(self.folder().join("bin_dir")).context("reading bin_dir")?;
        self.launch(Path::new(&bin_dir))
    }

    /// Ends containerd; shims and what they run go on.
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        kill(pid, signal).context("ending containerd")?;
        let ended = wait::until_true("the end of containerd", STOP_LIMIT, || Ok(self.ended()?.is_some()));
        if ended.is_err() {
            kill(pid, Signal::SIGKILL).context("killing containerd")?;
            self.child.as_mut().map(Child::wait);
        }
        self.child = None;
        ended
    }

    /// The last lines of containerd's log, which holds what shims logged, too.
    pub fn log_tail(&self) -> String {
        let log = fs::read(self.log_path()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let telling: Vec<&str> = log.lines().filter(|line| !line.contains("loading plugin")).collect();
        shortened(&telling.join("\n")).to_owned()
    }

    /// The whole log.
    pub fn log_path(&self) -> PathBuf {
        self.folder().join("log")
    }

    fn configure(&self, bin_dir: &Path) -> Result<()> {
        let dir = self.folder().display();
        let config = format!(
            r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
oom_score = 0
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{dir}/c.sock"
[ttrpc]
address = "{dir}/c.sock.ttrpc"
[debug]
level = "info"
"#
        );
        let line = |key: &str, value: Option<String>| {
            value.map_or(String::new(), |value| format!("{key} = {value:?}\n"))
        };
        let path = |path: PathBuf| path.display().to_string();
        let (firecracker, jailer) = settings::firecracker().map(|(f, j)| (path(f), path(j))).unzip();
        let asked: String = [
            ("start", settings::start()),
            ("accel", settings::accel()),
            ("vmm", settings::vmm()),
            ("firecracker", firecracker),
            ("jailer", jailer),
        ]
        .map(|(key, value)| line(key, value))
        .concat();
        let number = |key: &str, value: Option<String>| {
            value.map_or(String::new(), |value| format!("{key} = {value}\n"))
        };
        let asked = asked
            + &number("boot_timeout_seconds", settings::boot_seconds())
            + &number("spares", settings::spares());
        // Many tests at once share a disk on which each sandbox reserves a part of its own, and which may be memory; and
        // users, whose processes count together: those of two tests must not be the same.
        let first_uid = FIRST_UID + std::process::id() % PROCESSES * UIDS;
        let shim = format!(
            "guest_dir = {:?}\nstate_dir = {:?}\ncache_dir = {:?}\nscratch = \"256MiB\"\nscratch_overcommit = 4\nfirst_uid = {first_uid}\nuids = {UIDS}\n{asked}",
            settings::guest_dir()?,
            self.shim_state_dir(),
            self.shim_cache_dir()
        );
        let bin_dir = bin_dir.to_str().ok_or_else(|| anyhow!("{} is no text", bin_dir.display()))?;
        for (name, content) in [("config.toml", config.as_str()), ("shim.toml", &shim), ("bin_dir", bin_dir)]
        {
            fs::write(self.folder().join(name), content).with_context(|| format!("writing {name}"))?;
        }
        Ok(())
    }

    fn launch(&mut self, bin_dir: &Path) -> Result<()> {
        let log =
            File::options().create(true).append(true).open(self.log_path()).context("opening the log")?;
        // Each of these programs becomes the next one: the process keeps its id.
        let mut command = match &self.mounts {
            Some(_) => self.command("setpriv"),
            None => {
                let mut first = Command::new("unshare");
                first.args(["--mount", "--propagation", "private", "--", "setpriv"]);
                first
            }
        };
        command.args(["--pdeathsig", "KILL", "--", "containerd", "--config"]);
        command.arg(self.folder().join("config.toml"));
        clear_environment(&mut command);
        command.env("PATH", format!("{}:{}", bin_dir.display(), path()));
        command.env("BAILEY_SHIM_CONFIG", self.shim_config());
        command.stdin(Stdio::null()).stdout(log.try_clone().context("copying a descriptor")?).stderr(log);
        self.child = Some(command.spawn().context("starting containerd; see scripts/deps")?);
        self.await_ready()?;
        if self.mounts.is_none() {
            let pid = self.pid().ok_or_else(|| anyhow!("containerd has no process id"))?;
            let mounts = File::open(format!("/proc/{pid}/ns/mnt")).context("opening containerd's mounts")?;
            self.mounts = Some(mounts);
        }
        Ok(())
    }

    fn await_ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let ready = wait::until_true("an answer of containerd", START_LIMIT, || {
            if let Some(status) = self.ended()? {
                bail!("containerd ended: {status}");
            }
            Ok(UnixStream::connect(&socket).is_ok())
        });
        ready.with_context(|| format!("starting containerd, which logged:\n{}", self.log_tail()))
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        child.try_wait().context("looking at containerd")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("containerd logged:\n{}", self.log_tail());
        }
        // A test that failed says why; what fails here would only hide that.
        let _ = self.stop(Signal::SIGTERM);
        let _ = leftovers::kill_orphans();
        remove_cgroups(&self.namespace);
        if settings::keep() {
            self.folder.disable_cleanup(true);
        }
    }
}

/// Where programs are looked for: beside the containerd under test before anywhere else.
fn path() -> String {
    match settings::containerd() {
        Some(folder) => format!("{}:{SYSTEM_PATH}", folder.display()),
        None => SYSTEM_PATH.to_owned(),
    }
}

fn clear_environment(command: &mut Command) {
    command.env_clear();
}

/// Removes the cgroups that runtimes name after the namespace, at the top or in a folder of their own. One that has
/// processes stays.
fn remove_cgroups(namespace: &str) {
    let hierarchies =
        fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
        remove_cgroup(&hierarchy.join(namespace));
        remove_cgroup(&hierarchy.join("bailey").join(namespace));
    }
}

fn remove_cgroup(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}
