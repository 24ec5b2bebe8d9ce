//! Giving up privileges: capability sets, securebits, signal dispositions, Landlock's version.

use std::io;
use std::ptr;

use super::check;

/// Removes capability number `capability` from the bounding set. `Ok(false)`: this kernel has no such capability.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn drop_bounding(capability: u32) -> io::Result<bool> {
    // SAFETY: takes integers only.
    let done = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    match check(done.into()) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Sets the securebits of the calling thread (`SECBIT_*`).
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn set_securebits(bits: u32) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::c_ulong::from(bits), 0, 0, 0) }.into())
        .map(drop)
}

/// Puts the disposition of every signal back to its default. Signals that cannot be changed are left alone.
pub fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no handler, so no code of ours can run in a signal's context.
        let _unchangeable = unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// The version of Landlock's interface that this kernel offers; 0 when it has none or has it switched off.
#[must_use]
pub fn landlock_version() -> i32 {
    const VERSION_FLAG: u32 = 1;
    let nothing = ptr::null::<libc::c_void>();
    // SAFETY: with this flag the kernel takes no pointer and returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION_FLAG) };
    i32::try_from(version.max(0)).unwrap_or(0)
}
