//! The system calls that a jailed program may make: tables as data, and the filter made from them.
//!
//! Everything that is not in the table kills the process, so that a call which is missing is found in the first
//! test and not by a guest; the kernel's log names it (`type=1326`, `syscall=`). Must never hold a call without the
//! reason for it beside it.

mod mkfs_erofs;
mod qemu;
mod qemu_kvm;
mod qemu_tcg;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::error::{JailError, StepContext};
use super::spec::{Profile, SeccompLayer};

/// One allowed call.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// The conditions on its arguments, one of which must hold; none: whatever the arguments.
    pub when: &'static [&'static [Check]],
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Which argument, from 0.
    pub argument: u8,
    /// The bits of it that are looked at.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

/// Allows a call whatever its arguments.
const fn any(number: libc::c_long) -> Call {
    Call { number, when: &[] }
}

/// Allows a call when one of the conditions holds.
const fn when(number: libc::c_long, when: &'static [&'static [Check]]) -> Call {
    Call { number, when }
}

/// The argument, as the 32-bit number that the kernel takes it for, is exactly this.
const fn is(argument: u8, value: u64) -> Check {
    Check { argument, mask: 0xffff_ffff, value }
}

/// None of these bits of the argument are set.
const fn without(argument: u8, bits: u64) -> Check {
    Check { argument, mask: bits, value: 0 }
}

/// The calls that a profile allows. `execve` is not among them: the filter adds it for one address.
#[must_use]
pub fn table(profile: Profile) -> Vec<Call> {
    let parts = match profile {
        Profile::QemuTcg => [qemu::CALLS, qemu_tcg::CALLS],
        Profile::QemuKvm => [qemu::CALLS, qemu_kvm::CALLS],
        Profile::MkfsErofs => [mkfs_erofs::CALLS, &[]],
    };
    parts.concat()
}

/// A filter, ready to be applied.
pub(super) struct Filter {
    program: BpfProgram,
}

/// Compiles the filter of `profile`; `None` when the layer is off.
///
/// `execve` is allowed with its first argument at `program_address` only. The program lies at another address once
/// it runs, and the number was drawn at random, so who has taken over the program would have to guess it, and each
/// wrong guess kills. Landlock, besides, allows executing just the program and its loader.
pub(super) fn compile(
    profile: Profile,
    layer: SeccompLayer,
    program_address: u64,
) -> Result<Option<Filter>, JailError> {
    let denied = match layer {
        SeccompLayer::Off => return Ok(None),
        SeccompLayer::Log => SeccompAction::Log,
        SeccompLayer::Kill => SeccompAction::KillProcess,
    };
    let make = || -> Result<Filter, seccompiler::BackendError> {
        let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
        for call in table(profile) {
            let chain = call.when.iter().map(|checks| rule(checks)).collect::<Result<Vec<_>, _>>()?;
            rules.entry(call.number).or_default().extend(chain);
        }
        let pointer = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, program_address)?;
        rules.insert(libc::SYS_execve, vec![SeccompRule::new(vec![pointer])?]);
        let allow = SeccompFilter::new(rules, denied, SeccompAction::Allow, TargetArch::x86_64)?;
        let allow: BpfProgram = allow.try_into()?;
        Ok(Filter { program: not_there().chain(allow).collect() })
    };
    make().map(Some).map_err(io::Error::other).step(|| format!("compile the seccomp filter {profile:?}"))
}

fn rule(checks: &[Check]) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = |check: &Check| {
        let width =
            if check.mask > u64::from(u32::MAX) { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
        SeccompCondition::new(check.argument, width, SeccompCmpOp::MaskedEq(check.mask), check.value)
    };
    SeccompRule::new(checks.iter().map(condition).collect::<Result<_, _>>()?)
}

/// Calls that programs try, and do without when the kernel has them not: so it looks as if it had them not.
const NOT_THERE: [i64; 3] = [
    // Its flags lie in memory, where a filter cannot look: the C library then uses clone.
    libc::SYS_clone3,
    // QEMU polls without it.
    libc::SYS_io_uring_setup,
    // QEMU asks whether it could make itself a filter.
    libc::SYS_seccomp,
];

/// The instructions that answer [`NOT_THERE`], to be put before a filter.
fn not_there() -> impl Iterator<Item = sock_filter> {
    /// Loads the call's number, the first field of what a filter is given; compares; returns.
    const LOAD_NUMBER: sock_filter = sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    const COMPARE: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let answer = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    NOT_THERE.into_iter().flat_map(move |number| {
        // On this architecture all numbers are small and positive.
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        [
            LOAD_NUMBER,
            sock_filter { code: COMPARE, jt: 0, jf: 1, k: number },
            sock_filter { code: RETURN, jt: 0, jf: 0, k: answer },
        ]
    })
}

impl Filter {
    /// Applies the filter to this process and all that it becomes.
    pub(super) fn apply(&self) -> Result<(), JailError> {
        seccompiler::apply_filter(&self.program)
            .map_err(io::Error::other)
            .step(|| "apply the seccomp filter".to_owned())
    }
}
