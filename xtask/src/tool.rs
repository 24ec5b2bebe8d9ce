//! What the chores share: saying, running programs, hashing, and where things lie.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::{Context as _, Result, anyhow, bail};
use sha2::{Digest as _, Sha256};

/// Tells the person who runs the chore one line.
#[allow(clippy::print_stdout, reason = "a chore talks to the person who runs it; this is the only place")]
pub(crate) fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

/// The folder of the repository: where cargo runs this from. Where it was built says nothing, since two checkouts may
/// share one build folder.
pub(crate) fn repository() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let run = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let xtask = run.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        xtask.parent().map(Path::to_owned).unwrap_or(xtask)
    });
    &FOLDER
}

/// The folder for guests: what was asked for, else what the environment says, else the user's cache.
pub(crate) fn guest_dir(asked: Option<PathBuf>) -> Result<PathBuf> {
    let from_env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = asked
        .or_else(|| from_env("BAILEY_GUEST_DIR"))
        .or_else(|| from_env("XDG_CACHE_HOME").map(|cache| cache.join("bailey/guest")))
        .or_else(|| from_env("HOME").map(|home| home.join(".cache/bailey/guest")))
        .ok_or_else(|| anyhow!("choosing a folder for the guest: HOME is not set; give one with --out"))?;
    std::path::absolute(&dir).with_context(|| format!("making {} absolute", dir.display()))
}

/// The folder beside the guests in which downloads and half-made things are kept.
pub(crate) fn work_dir(guest_dir: &Path) -> Result<PathBuf> {
    let name = guest_dir.file_name().ok_or_else(|| anyhow!("{} is no folder name", guest_dir.display()))?;
    let mut work_name = name.to_owned();
    work_name.push("-work");
    let work = guest_dir.with_file_name(work_name);
    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    Ok(work)
}

/// Keeps a second run of a chore out of the same folder for as long as the result lives.
pub(crate) fn lock(work: &Path, name: &str) -> Result<fs::File> {
    let path = work.join(name);
    let file = fs::File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    file.lock().with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

/// A command in the C locale, with nothing on its standard input.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a command to its end and returns its standard output.
pub(crate) fn bytes_of(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.output().with_context(|| format!("starting {name}; is it installed? see scripts/deps"))?;
    if !output.status.success() {
        let args: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("running {name} {}: {}\n{}", args.join(" "), output.status, stderr.trim_end());
    }
    Ok(output.stdout)
}

/// Runs a command to its end and returns its standard output as text.
pub(crate) fn text_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    String::from_utf8(bytes_of(command)?).with_context(|| format!("reading the output of {name}"))
}

/// Runs a command that talks to the person directly.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status =
        command.status().with_context(|| format!("starting {name}; is it installed? see scripts/deps"))?;
    if !status.success() {
        bail!("running {name}: {status}; what it said is above");
    }
    Ok(())
}

/// Sends bytes through a program that reads its standard input and writes its standard output.
pub(crate) fn filter(command: &mut Command, input: Vec<u8>) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}; is it installed? see scripts/deps"))?;
    let mut stdin = child.stdin.take().ok_or_else(|| anyhow!("{name} has no standard input"))?;
    // A program that fails stops reading; its own words then say why, not our broken pipe.
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().with_context(|| format!("waiting for {name}"))?;
    let written = writer.join().map_err(|_| anyhow!("the thread that feeds {name} panicked"))?;
    if !output.status.success() {
        bail!("running {name}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    written.with_context(|| format!("feeding {name}"))?;
    Ok(output.stdout)
}

/// Reads a whole file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// Writes a file so that a reader sees the old content or the new, never a part.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path.parent().ok_or_else(|| anyhow!("{} has no folder", path.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, content).with_context(|| format!("writing {}", path.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("moving {} into place", path.display()))
}

/// Removes a folder with all that is in it; that it is not there is well.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(content: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(content).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
