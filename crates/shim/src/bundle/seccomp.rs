//! The system calls of the container class.
//!
//! Everything that ordinary programs call is allowed; what reaches into the kernel's less trodden parts, or only
//! serves to administer the host, fails as if the caller lacked the right. New calls that this list does not know
//! fail as unknown, so that programs fall back to older ones.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscall, LinuxSyscallBuilder,
};

use crate::error::{Context, Result};

/// Allowed without conditions, by subject.
const ALLOWED: &str = include_str!("seccomp.txt");

/// The profile, as runc takes it.
pub(super) fn profile() -> Result<LinuxSeccomp> {
    let names: Vec<String> = ALLOWED
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .map(str::to_owned)
        .collect();
    let build = || -> std::result::Result<LinuxSeccomp, oci_spec::OciSpecError> {
        LinuxSeccompBuilder::default()
            .default_action(LinuxSeccompAction::ScmpActErrno)
            .default_errno_ret(libc::EPERM.cast_unsigned())
            .architectures([Arch::ScmpArchX86_64])
            .syscalls(vec![rule(names, LinuxSeccompAction::ScmpActAllow, None)?, unknown("clone3")?])
            .build()
    };
    build().context(|| "making the seccomp profile".into())
}

/// Its flags are behind a pointer, where no filter sees them: callers fall back to `clone`.
fn unknown(name: &str) -> std::result::Result<LinuxSyscall, oci_spec::OciSpecError> {
    rule(vec![name.to_owned()], LinuxSeccompAction::ScmpActErrno, Some(libc::ENOSYS.cast_unsigned()))
}

fn rule(
    names: Vec<String>,
    action: LinuxSeccompAction,
    errno: Option<u32>,
) -> std::result::Result<LinuxSyscall, oci_spec::OciSpecError> {
    let rule = LinuxSyscallBuilder::default().names(names).action(action);
    match errno {
        Some(errno) => rule.errno_ret(errno).build(),
        None => rule.build(),
    }
}
