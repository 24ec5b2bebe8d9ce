//! The last steps of a child before it is the workload's program: limits, user, privileges, program.

use std::ffi::CString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use bailey_types::guest::spec::Process;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, getcwd, setgroups, setresgid, setresuid,
};

use super::terminal::ChildStdio;
use crate::error::{Context, Error, Result};
use crate::sys;

/// Where programs are looked for when the environment names no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Makes the working directory if the image lacks it, as images expect of their runtime.
pub(super) fn make_working_directory(spec: &Process) -> Result<()> {
    if fs::exists(&spec.cwd).unwrap_or(false) {
        return Ok(());
    }
    match fs::create_dir_all(&spec.cwd) {
        // Then entering it fails with a better word, if it does.
        Err(cause) if cause.kind() == std::io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        other => other.context(|| format!("making the working directory {}", spec.cwd)),
    }
}

/// Becomes the workload's program. Only returns when that fails.
pub(super) fn run(spec: &Process, stdio: ChildStdio) -> Result<()> {
    take_stdio(stdio)?;
    let last = last_capability()?;
    for limit in &spec.rlimits {
        sys::set_rlimit(limit).context(|| format!("setting the resource limit {}", limit.resource))?;
    }
    if let Some(adjustment) = spec.oom_score_adj {
        fs::write("/proc/self/oom_score_adj", adjustment.to_string())
            .context(|| format!("setting the OOM score adjustment to {adjustment}"))?;
    }
    umask(Mode::from_bits_truncate(spec.umask.unwrap_or(0o022)));
    enter_working_directory(spec)?;
    become_user(spec, last)?;
    if spec.no_new_privileges {
        sys::no_new_privileges().context(|| "forbidding new privileges".into())?;
    }
    let program = find_program(spec)?;
    let strings = |strings: &[String]| {
        strings.iter().map(|s| CString::new(s.as_str())).collect::<std::result::Result<Vec<_>, _>>()
    };
    let args = strings(&spec.args).map_err(|cause| Error::invalid("reading the arguments", cause))?;
    let env = strings(&spec.env).map_err(|cause| Error::invalid("reading the environment", cause))?;
    let path = CString::new(program.as_str())
        .map_err(|cause| Error::invalid("reading the program's path", cause))?;
    sys::reset_signals();
    Err(Error::invalid(format!("exec {program}"), sys::execve(&path, &args, &env)))
}

/// Runs the workload as a child of a small init: this process, which reaps and passes signals on.
pub(super) fn under_init(spec: &Process, stdio: ChildStdio) -> Result<()> {
    let all = SigSet::all();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None).context(|| "blocking signals".into())?;
    let child = match sys::fork(0, None).context(|| "making the init's child".into())? {
        sys::Forked::Child => return run(spec, stdio),
        sys::Forked::Parent(child) => child,
    };
    drop(stdio);
    // What the init holds open, its workload could never close.
    sys::close_all();
    loop {
        let signal = all.wait().context(|| "waiting for a signal".into())?;
        if signal != Signal::SIGCHLD {
            // A child that has just ended is reaped by the SIGCHLD that follows.
            let _just_ended = sys::kill(child, signal as i32);
            continue;
        }
        while let Some((pid, status)) = sys::reap() {
            if pid == child {
                std::process::exit(status.into());
            }
        }
    }
}

fn take_stdio(stdio: ChildStdio) -> Result<()> {
    let [input, output, error]: [OwnedFd; 3] = stdio.fds;
    dup2_stdin(&input).context(|| "taking standard input".into())?;
    dup2_stdout(&output).context(|| "taking standard output".into())?;
    dup2_stderr(&error).context(|| "taking standard error".into())
}

fn enter_working_directory(spec: &Process) -> Result<()> {
    chdir(spec.cwd.as_str())
        .map_err(|cause| Error::invalid(format!("entering the working directory {}", spec.cwd), cause))?;
    // A path through a leaked descriptor leads out of the root, where no path has a name (CVE-2024-21626).
    let here = getcwd()
        .map_err(|cause| Error::invalid("the working directory is outside of the container", cause))?;
    if here.is_absolute() {
        Ok(())
    } else {
        Err(Error::invalid("entering the working directory", "it is outside of the container"))
    }
}

/// Takes the user, its groups and exactly the capabilities that were asked for.
///
/// INVARIANT: the bounding set shrinks while CAP_SETPCAP is there; the change of uid follows, with the permitted
/// set kept; the final sets come last, since the change of uid clears the effective and ambient ones.
fn become_user(spec: &Process, last: u32) -> Result<()> {
    sys::drop_bounding(spec.capabilities.bounding, last).context(|| "shrinking the bounding set".into())?;
    sys::keep_capabilities(true).context(|| "keeping capabilities".into())?;
    let groups: Vec<Gid> = spec.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).context(|| "setting the groups".into())?;
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid));
    setresgid(gid, gid, gid).context(|| format!("becoming group {gid}"))?;
    setresuid(uid, uid, uid).context(|| format!("becoming user {uid}"))?;
    sys::keep_capabilities(false).context(|| "letting capabilities go".into())?;
    sys::set_capabilities(&spec.capabilities, last).context(|| "setting the capabilities".into())
}

/// The highest capability that this kernel knows.
fn last_capability() -> Result<u32> {
    let path = "/proc/sys/kernel/cap_last_cap";
    let text = fs::read_to_string(path).unwrap_or_else(|_| "40".into());
    text.trim().parse().context(|| format!("reading {path}"))
}

/// The program's path: as it is when it names a folder, else looked for as a shell does.
pub(crate) fn find_program(spec: &Process) -> Result<String> {
    let name = spec.args.first().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| Error::invalid("looking for the program", "there is no command"))?;
    if name.contains('/') {
        let path = Path::new(&spec.cwd).join(name);
        let there = path.metadata().map_err(|cause| Error::invalid(format!("exec: \"{name}\""), cause))?;
        if there.is_dir() {
            return Err(Error::invalid(format!("exec: \"{name}\""), "it is a folder"));
        }
        return Ok(name.clone());
    }
    let path = spec.env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for folder in path.split(':') {
        let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        if !candidate.is_file() {
            continue;
        }
        match nix::unistd::access(&candidate, nix::unistd::AccessFlags::X_OK) {
            Ok(()) => return Ok(candidate.to_string_lossy().into_owned()),
            Err(_) => denied = true,
        }
    }
    let cause = if denied { "permission denied" } else { "executable file not found in $PATH" };
    Err(Error::invalid(format!("exec: \"{name}\""), cause))
}
