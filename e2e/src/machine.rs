//! What a test starts with: a containerd, the runtime under test, and a promise that nothing is left at the end.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use crate::containerd::Containerd;
use crate::ctr::Run;
use crate::images::{Image, Recipe};
use crate::leftovers::Before;
use crate::process::text_of;
use crate::settings;

/// Building the shim on a machine that has built nothing yet.
const BUILD_LIMIT: Duration = Duration::from_secs(1800);

const QUICK: Duration = Duration::from_secs(30);

/// Tests that share a process take turns: what one left could not be told from what another one uses.
static TURN: Mutex<()> = Mutex::new(());

/// A containerd with the runtime under test.
pub struct Machine {
    /// containerd, to be stopped and started by tests that want to.
    pub containerd: Containerd,
    bin_dir: PathBuf,
    before: Before,
    _turn: MutexGuard<'static, ()>,
}

impl Machine {
    /// Starts one, having built the shim if need be.
    fn start() -> Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let bin_dir = built_programs()?;
        let before = Before::take()?;
        Ok(Self { containerd: Containerd::start(&bin_dir)?, bin_dir, before, _turn: turn })
    }

    /// Fails if there is anything that was made for containers, once there are no more containers. Templates, which
    /// outlive containers on purpose, are told to go; if that fails, it matters when one is left.
    fn assert_nothing_left(&self) -> Result<()> {
        let dropped = if settings::is_ours() { self.drop_templates() } else { Ok(()) };
        let nothing = self.before.assert_nothing_left(&self.containerd);
        nothing.with_context(|| format!("ending templates before: {dropped:?}"))
    }

    /// Ends all templates that our shim keeps.
    pub fn drop_templates(&self) -> Result<()> {
        let words = ["-namespace", self.containerd.namespace(), "drop-templates"];
        self.shim(&words).context("ending templates").map(drop)
    }

    /// Calls our shim as an operator would.
    pub fn shim(&self, words: &[&str]) -> Result<String> {
        let mut shim = self.containerd.command(self.bin_dir.join("containerd-shim-bailey-v1"));
        shim.env("BAILEY_SHIM_CONFIG", self.containerd.shim_config()).args(words);
        text_of(&mut shim, QUICK)
    }

    /// Describes a container to be run.
    pub fn run<'m>(&'m self, image: &Image) -> Run<'m> {
        Run::new(self, &image.reference)
    }
}

/// Runs a test: makes a machine, lets the test use it, and sees that all went away again.
pub fn test(body: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
    let mut machine = Machine::start()?;
    let done = body(&mut machine).and_then(|()| machine.assert_nothing_left());
    done.with_context(|| format!("containerd logged:\n{}\n", machine.containerd.log_tail()))
}

/// Runs a test with an image.
pub fn test_with(recipe: &Recipe, body: impl FnOnce(&mut Machine, &Image) -> Result<()>) -> Result<()> {
    test(|machine| {
        let image = recipe.image()?;
        machine.import(&image)?;
        body(machine, &image)
    })
}

/// The folder with the shim, which is built on the first call.
pub fn built_programs() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))
}

fn build() -> Result<PathBuf> {
    if let Some(given) = settings::given_bin_dir() {
        return Ok(given);
    }
    let bin_dir = settings::cargo_bin_dir()?;
    if settings::is_ours() {
        let mut cargo = Command::new(settings::cargo());
        cargo.current_dir(settings::repository());
        cargo.args(["build", "--quiet", "--package", "bailey-shim", "--locked"]);
        if bin_dir.ends_with("release") {
            cargo.arg("--release");
        }
        text_of(&mut cargo, BUILD_LIMIT).context("building the shim")?;
        let mut guest = Command::new(settings::cargo());
        guest.current_dir(settings::repository());
        guest.args(["xtask", "guest-image", "--if-missing"]);
        text_of(&mut guest, BUILD_LIMIT).context("making what microVMs boot")?;
    }
    Ok(bin_dir)
}
