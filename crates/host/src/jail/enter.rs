//! The steps by which a process enters the jail, in their order.
//!
//! Runs in the helper: this same program, executed again by [`super::spawn`], with one thread, root's privileges,
//! and the namespaces that it was cloned into.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};

use super::error::{Failure, JailError, StepContext};
use super::spec::{JailSpec, Layers, Report, SeccompLayer};
use super::{landlock, privilege, root, seccomp};
use crate::sys::{privilege as raw, process};

/// The first argument that makes a program the helper; the second is the number of the order's descriptor.
pub(super) const HELPER_ARGUMENT: &str = "jail";

/// What [`super::spawn`] tells the helper.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) spec: JailSpec,
    #[serde(with = "LayersOnTheWire")]
    pub(super) layers: Layers,
    /// The descriptors that the program gets.
    pub(super) keep: Vec<RawFd>,
    /// The pipe that a [`Message`] is told on.
    pub(super) status: RawFd,
    /// The pipe whose end of file means that the parent is gone.
    pub(super) parent: RawFd,
}

/// How the layers travel. The public type cannot be read from anything, so that no file can switch one off.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Layers")]
struct LayersOnTheWire {
    namespaces: bool,
    root: bool,
    uid: bool,
    caps: bool,
    no_new_privs: bool,
    seccomp: SeccompLayer,
    landlock: bool,
    rlimits: bool,
}

/// What the helper tells. Nothing but a report and the end of the pipe: the program runs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    Report(Report),
    Failed(Failure),
}

/// Becomes the jailed program if this process was started for that; otherwise returns at once.
///
/// To be called first thing in `main`, before any thread is started. Reads only the program's arguments.
pub fn enter_if_asked() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|first| first != HELPER_ARGUMENT) {
        return;
    }
    let Some(order) = arguments.next().and_then(|fd| fd.to_str()?.parse::<RawFd>().ok()) else { return };
    let failed = match read_order(order) {
        Ok((order, status, parent)) => match enter(&order, &status, &parent) {
            Ok(never) => match never {},
            Err(error) => tell(&status, &Message::Failed(error.into())),
        },
        // There is no pipe to tell it on; the parent sees the exit status.
        Err(error) => Err(error),
    };
    std::process::exit(if failed.is_ok() { 1 } else { 2 });
}

fn read_order(fd: RawFd) -> io::Result<(Order, OwnedFd, OwnedFd)> {
    let mut text = String::new();
    File::from(process::inherited(fd)?).read_to_string(&mut text)?;
    let mut order: Order = serde_json::from_str(&text)?;
    order.spec.layers = order.layers.clone();
    let status = process::inherited(order.status)?;
    let parent = process::inherited(order.parent)?;
    for pipe in [&status, &parent] {
        fcntl(pipe, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok((order, status, parent))
}

/// Tells the parent. Makes no call but `write`: the filter may be in force already, and a program that then cannot be
/// executed is to be told of as well.
fn tell(status: &OwnedFd, message: &Message) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut rest = &line[..];
    while !rest.is_empty() {
        let written = nix::unistd::write(status, rest)?;
        rest = &rest[written..];
    }
    Ok(())
}

/// The whole way into the jail. The order is the security of it: see each `INVARIANT`.
fn enter(order: &Order, status: &OwnedFd, parent: &OwnedFd) -> Result<Infallible, JailError> {
    let (spec, layers) = (&order.spec, &order.layers);
    let mut report = Report::default();
    // INVARIANT: first, tie our life to the parent's; what fails from here on leaves no process behind.
    die_with_parent(parent)?;
    // INVARIANT: close what was inherited before anything is opened that could take such a number.
    close_others(&order.keep, status, parent)?;
    leave_the_caller()?;
    apparmor(spec, &mut report)?;
    // The rules are planned while the base can still be read whatever the user.
    let plan = layers.landlock.then(|| landlock::plan(spec)).transpose()?;
    if layers.namespaces {
        hide_names()?;
        report.applied.push("namespaces".to_owned());
    }
    if layers.root {
        root::replace(spec)?;
        report.applied.push("root".to_owned());
    }
    if layers.rlimits {
        privilege::limit(&spec.rlimits, &mut report)?;
        report.applied.push("rlimits".to_owned());
    }
    // INVARIANT: every step above needs privileges, none below does. The bounding set goes while we may change it.
    if layers.caps {
        privilege::close_capabilities(spec.read_all)?
    } else {
        privilege::keep_capabilities()?
    }
    if layers.uid {
        privilege::become_user(spec.uid, spec.gid)?;
        report.applied.push("uid".to_owned());
    }
    if layers.caps {
        privilege::clear_capabilities(spec.read_all)?;
        report.applied.push("caps".to_owned());
    } else {
        privilege::pass_capabilities_on()?;
    }
    // INVARIANT: after the change of user and capabilities, which clears the signal for the parent's death.
    die_with_parent(parent)?;
    if layers.no_new_privs {
        // INVARIANT: before Landlock and seccomp, which an unprivileged process may not apply without it.
        prctl::set_no_new_privs().step(|| "give up gaining privileges".to_owned())?;
        report.applied.push("no_new_privs".to_owned());
    }
    if let Some(plan) = &plan {
        landlock::restrict(spec, plan, &mut report)?;
    }
    umask(Mode::from_bits_truncate(0o077));
    let image = image(spec)?;
    let filter = seccomp::compile(spec.seccomp, layers.seccomp, image.path_address())?;
    report.applied.extend(filter.as_ref().map(|_| format!("seccomp: {:?}", layers.seccomp)));
    tell(status, &Message::Report(report)).step(|| "report what was applied".to_owned())?;
    // INVARIANT: last, since the filter allows none of the calls above, and just the one `execve` below.
    if let Some(filter) = filter {
        filter.apply()?;
    }
    image.execute().step(|| super::error::at("execute", &spec.program))
}

/// Asks to be killed when the parent dies, and checks that it has not died before that took effect.
fn die_with_parent(parent: &OwnedFd) -> Result<(), JailError> {
    prctl::set_pdeathsig(Signal::SIGKILL).step(|| "ask to end with the parent".to_owned())?;
    // The parent holds the other end of this pipe open until the program runs.
    let mut ends = [PollFd::new(parent.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut ends, PollTimeout::ZERO).step(|| "look for the parent".to_owned())?;
    if ready == 0 {
        return Ok(());
    }
    Err(io::Error::from(io::ErrorKind::BrokenPipe)).step(|| "look for the parent".to_owned())
}

/// Closes every descriptor but those that the program gets and our two pipes.
fn close_others(keep: &[RawFd], status: &OwnedFd, parent: &OwnedFd) -> Result<(), JailError> {
    let pipes = [status, parent].map(|fd: &OwnedFd| number(fd.as_fd()));
    let mut kept: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).chain(pipes).collect();
    kept.sort_unstable();
    let mut next = 0;
    for fd in kept {
        if fd > next {
            process::close_range(next, fd - 1).step(|| "close what was inherited".to_owned())?;
        }
        next = fd + 1;
    }
    process::close_range(next, u32::MAX).step(|| "close what was inherited".to_owned())
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd().cast_unsigned()
}

/// Leaves the caller's session, signal settings and file mode mask.
fn leave_the_caller() -> Result<(), JailError> {
    nix::unistd::setsid().step(|| "start a session".to_owned())?;
    raw::reset_signals();
    SigSet::empty().thread_set_mask().step(|| "unblock signals".to_owned())?;
    umask(Mode::empty());
    Ok(())
}

/// Asks AppArmor, where the host has it, to put the program that is executed under its profile.
fn apparmor(spec: &JailSpec, report: &mut Report) -> Result<(), JailError> {
    let Some(profile) = &spec.apparmor else { return Ok(()) };
    if !super::apparmor::is_on() {
        report.missing.push("apparmor: the host's kernel has it not, or has it off".to_owned());
        return Ok(());
    }
    std::fs::write("/proc/self/attr/apparmor/exec", format!("exec {profile}"))
        .step(|| format!("ask for the AppArmor profile {profile}"))?;
    report.applied.push(format!("apparmor: {profile}"));
    Ok(())
}

/// Hides the host's name and the place of this process among the host's cgroups.
fn hide_names() -> Result<(), JailError> {
    // Not at the clone: the caller has moved us to our cgroup since, and that is what shall look like the root.
    nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).step(|| "enter a cgroup namespace".to_owned())?;
    nix::unistd::sethostname("jail").step(|| "set the host name".to_owned())
}

/// The program with its arguments and environment.
fn image(spec: &JailSpec) -> Result<process::Image, JailError> {
    let text = |text: String| CString::new(text).step(|| "read the program's arguments".to_owned());
    let program = text(spec.program.to_string_lossy().into_owned())?;
    let arguments = spec.argv.iter().cloned().map(text).collect::<Result<_, _>>()?;
    let environment =
        spec.env.iter().map(|(name, value)| text(format!("{name}={value}"))).collect::<Result<_, _>>()?;
    process::Image::new(&program, arguments, environment).step(|| "place the program's path".to_owned())
}
