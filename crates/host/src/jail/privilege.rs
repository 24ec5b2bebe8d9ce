//! Limits, user and capabilities of the process that enters the jail.

use std::io;

use std::collections::HashSet;

use caps::{CapSet, Capability};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid};

use super::error::{JailError, StepContext};
use super::spec::{Report, Rlimits};
use crate::sys::privilege as raw;

/// Executing as root gives nothing, changing the user gives and keeps nothing, nothing becomes ambient; all locked.
/// (`SECBIT_NOROOT`, `NO_SETUID_FIXUP`, `NO_CAP_AMBIENT_RAISE` with their locks, and the lock of `KEEP_CAPS`.)
const SECUREBITS: u32 = 0xef;

/// Lowers the limits; where the host's own is lower already, that one stays and is reported.
pub(super) fn limit(wanted: &Rlimits, report: &mut Report) -> Result<(), JailError> {
    let mut limits = vec![
        (Resource::RLIMIT_NOFILE, wanted.nofile),
        (Resource::RLIMIT_NPROC, wanted.nproc),
        (Resource::RLIMIT_MEMLOCK, wanted.memlock),
        // A core dump would hold the guest's memory.
        (Resource::RLIMIT_CORE, 0),
    ];
    limits.extend(wanted.fsize.map(|bytes| (Resource::RLIMIT_FSIZE, bytes)));
    limits.extend(wanted.address_space.map(|bytes| (Resource::RLIMIT_AS, bytes)));
    for (resource, value) in limits {
        let (_, hard) = getrlimit(resource).step(|| format!("read the limit {resource:?}"))?;
        if hard < value {
            report
                .missing
                .push(format!("{resource:?} stays at the host's {hard}, below the {value} asked for"));
        }
        let value = value.min(hard);
        setrlimit(resource, value, value).step(|| format!("set the limit {resource:?} to {value}"))?;
    }
    Ok(())
}

/// The one capability that a program may keep: to read what it sees.
const READ_ALL: Capability = Capability::CAP_DAC_READ_SEARCH;

/// Empties the bounding set and locks the ways in which capabilities come back. Needs `CAP_SETPCAP`. With `read_all`,
/// one stays, and is handed on to the program through the ambient set.
pub(super) fn close_capabilities(read_all: bool) -> Result<(), JailError> {
    if read_all {
        for set in [CapSet::Inheritable, CapSet::Ambient] {
            // INVARIANT: before the securebits, which lock the ambient set.
            caps::set(None, set, &HashSet::from([READ_ALL]))
                .map_err(io::Error::other)
                .step(|| format!("keep {READ_ALL} in the {set:?} set"))?;
        }
    }
    for capability in (0..=63).filter(|number| !(read_all && *number == u32::from(READ_ALL.index()))) {
        if !raw::drop_bounding(capability).step(|| format!("drop capability {capability} for good"))? {
            break;
        }
    }
    raw::set_securebits(SECUREBITS).step(|| "lock the securebits".to_owned())
}

/// Becomes the jail's user, with one group and no others.
pub(super) fn become_user(uid: u32, gid: u32) -> Result<(), JailError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // INVARIANT: groups first; a user other than root cannot change them any more.
    nix::unistd::setgroups(&[]).step(|| "leave all supplementary groups".to_owned())?;
    nix::unistd::setresgid(group, group, group).step(|| format!("become group {gid}"))?;
    nix::unistd::setresuid(user, user, user).step(|| format!("become user {uid}"))
}

/// Empties all capability sets, but for what `read_all` keeps, and checks that nothing else is left.
pub(super) fn clear_capabilities(read_all: bool) -> Result<(), JailError> {
    let kept: HashSet<Capability> = read_all.then_some(READ_ALL).into_iter().collect();
    // INVARIANT: effective before permitted; the kernel refuses a permitted set that is the smaller one. The ambient
    // set follows: what leaves the permitted or the inheritable one leaves it, too.
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::set(None, set, &kept)
            .map_err(io::Error::other)
            .step(|| format!("clear the {set:?} capabilities"))?;
    }
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Bounding]
    {
        let left =
            caps::read(None, set).map_err(io::Error::other).step(|| format!("read the {set:?} set"))?;
        if left != kept {
            return Err(io::Error::other(format!("{left:?} are left")))
                .step(|| format!("check that the {set:?} capabilities are gone"));
        }
    }
    Ok(())
}

/// With the layer off, the program gets what a careless VMM would have: all of root's capabilities, whoever it
/// runs as. Called before the change of user.
pub(super) fn keep_capabilities() -> Result<(), JailError> {
    nix::sys::prctl::set_keepcaps(true).step(|| "keep capabilities over the change of user".to_owned())
}

/// The second half of [`keep_capabilities`], called after the change of user.
pub(super) fn pass_capabilities_on() -> Result<(), JailError> {
    let all = caps::read(None, CapSet::Permitted)
        .map_err(io::Error::other)
        .step(|| "read capabilities".to_owned())?;
    for set in [CapSet::Effective, CapSet::Inheritable, CapSet::Ambient] {
        caps::set(None, set, &all)
            .map_err(io::Error::other)
            .step(|| format!("set the {set:?} capabilities"))?;
    }
    Ok(())
}
