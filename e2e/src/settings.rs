//! What the environment tells the tests; the only place that reads it.
//!
//! | variable | meaning | else |
//! |---|---|---|
//! | `BAILEY_E2E_RUNTIME` | the containerd runtime to test; another than ours checks the tests themselves | `io.containerd.bailey.v1` |
//! | `BAILEY_BIN_DIR` | the folder with the built shim, which is then not built | the folder of cargo that the test runs from |
//! | `BAILEY_GUEST_DIR` | what microVMs boot | `bailey/guest` in the user's cache |
//! | `BAILEY_E2E_START` | `warm` or `cold`, for all sandboxes | the shim's own choice |
//! | `BAILEY_E2E_ACCEL` | `kvm` or `tcg`, for all sandboxes | the shim's own choice |
//! | `BAILEY_E2E_VMM` | `qemu` or `firecracker`, for all sandboxes | the shim's own choice |
//! | `BAILEY_FIRECRACKER`, `BAILEY_JAILER` | a release of Firecracker, for tests of it; without, they are left out | |
//! | `BAILEY_E2E_SPARES` | how many VMs wait for sandboxes, for each template | the shim's own choice |
//! | `BAILEY_E2E_BOOT_SECONDS` | how long a guest may take to boot | the shim's own limit |
//! | `BAILEY_E2E_MUST_HAVE` | what the machine is known to have, of `kvm`, `cgroup2`, `apparmor`, by commas: a test of it does not leave it out | what is found |
//! | `BAILEY_E2E_HOSTS` | the releases of Debian that the tier `production` boots as hosts, by commas | `bookworm` |
//! | `BAILEY_E2E_SNAPSHOTTER` | the snapshotter of containerd | `overlayfs` |
//! | `BAILEY_TEST_CONTAINERD` | the folder of another containerd, with its `ctr`; see `scripts/containerd` | the system's |
//! | `BAILEY_E2E_KEEP` | if set, folders of tests are kept to be looked at | they are removed |

use std::env;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context as _, Result, anyhow, bail};

/// The runtime that the tests are for.
pub const OUR_RUNTIME: &str = "io.containerd.bailey.v1";

fn value(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn text(name: &str) -> Option<String> {
    value(name).map(|value| value.to_string_lossy().into_owned())
}

/// The containerd runtime under test.
pub fn runtime() -> String {
    text("BAILEY_E2E_RUNTIME").unwrap_or_else(|| OUR_RUNTIME.to_owned())
}

/// Whether the runtime under test is ours.
pub fn is_ours() -> bool {
    runtime() == OUR_RUNTIME
}

/// Whether a test that only our runtime can pass shall run; says so if it shall not, because the runtime is another.
pub fn only_ours(why: &str) -> bool {
    if !is_ours() {
        eprintln!("SKIPPED with {}: {why}", runtime());
    }
    is_ours()
}

/// The snapshotter that containerd uses where a test names none.
pub fn snapshotter() -> String {
    text("BAILEY_E2E_SNAPSHOTTER").unwrap_or_else(|| "overlayfs".to_owned())
}

/// How sandboxes start, if somebody wants all to start alike.
pub fn start() -> Option<String> {
    text("BAILEY_E2E_START")
}

/// The folder of the containerd to test with, if it is not the system's.
pub fn containerd() -> Option<PathBuf> {
    value("BAILEY_TEST_CONTAINERD")
}

/// How QEMU runs guests, if somebody wants it to be one way.
pub fn accel() -> Option<String> {
    text("BAILEY_E2E_ACCEL")
}

/// What runs the VMs, if somebody wants it to be one program.
pub fn vmm() -> Option<String> {
    text("BAILEY_E2E_VMM")
}

/// Firecracker and its jailer, where somebody has named both.
pub fn firecracker() -> Option<(PathBuf, PathBuf)> {
    value("BAILEY_FIRECRACKER").zip(value("BAILEY_JAILER"))
}

/// How many spares each template has, if somebody wants so many.
pub fn spares() -> Option<String> {
    text("BAILEY_E2E_SPARES")
}

/// How long a guest may take to boot, in seconds, where that is very slow.
pub fn boot_seconds() -> Option<String> {
    text("BAILEY_E2E_BOOT_SECONDS")
}

/// Whether the machine has something, as `found` says; fails if somebody knows that it must have it.
pub fn has(name: &str, found: bool) -> Result<bool> {
    let must = text("BAILEY_E2E_MUST_HAVE").unwrap_or_default();
    if !found && must.split(',').any(|one| one == name) {
        bail!("this machine must have {name}, and it was not found");
    }
    if !found {
        eprintln!("SKIPPED: this machine has no {name}");
    }
    Ok(found)
}

/// The releases of Debian whose hosts the tier `production` boots.
pub fn hosts() -> Vec<String> {
    let given = text("BAILEY_E2E_HOSTS").unwrap_or_else(|| "bookworm".to_owned());
    given.split(',').map(str::to_owned).collect()
}

/// Whether the folders of tests are to be kept.
pub fn keep() -> bool {
    value("BAILEY_E2E_KEEP").is_some()
}

/// A folder with programs that were built elsewhere.
pub fn given_bin_dir() -> Option<PathBuf> {
    value("BAILEY_BIN_DIR")
}

/// The folder into which cargo built the running test: `target/<profile>`.
pub fn cargo_bin_dir() -> Result<PathBuf> {
    let exe = env::current_exe().context("finding the running program")?;
    let dir = exe.parent().filter(|dir| dir.ends_with("deps")).and_then(Path::parent).or(exe.parent());
    Ok(dir.ok_or_else(|| anyhow!("{} is in no folder", exe.display()))?.to_path_buf())
}

/// The cargo to build with.
pub fn cargo() -> PathBuf {
    value("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Bailey's folder in the user's cache.
pub fn cache_dir() -> Result<PathBuf> {
    let cache = value("XDG_CACHE_HOME").or_else(|| value("HOME").map(|home| home.join(".cache")));
    Ok(cache.ok_or_else(|| anyhow!("choosing a cache folder: HOME is not set"))?.join("bailey"))
}

/// The folder with what microVMs boot.
pub fn guest_dir() -> Result<PathBuf> {
    value("BAILEY_GUEST_DIR").map_or_else(|| Ok(cache_dir()?.join("guest")), Ok)
}

/// The folder of the repository: where cargo runs this from. Where it was built says nothing, since two checkouts may
/// share one build folder.
pub fn repository() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let crate_dir = value("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        crate_dir.parent().map(Path::to_owned).unwrap_or(crate_dir)
    });
    &FOLDER
}
