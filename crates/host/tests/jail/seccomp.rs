//! The filter, call by call: each allowed one passes, its near misses and everything else kill.

use std::collections::BTreeSet;

use bailey_host::jail::seccomp::{Call, table};
use bailey_host::jail::{Layers, Profile, SeccompLayer};

use super::host::{Host, Outcome, run};

/// Calls that would end, block or blind the stand-in, whatever their arguments, and that its own run shows allowed
/// or that do not return: they are not made one by one.
const NOT_TRIED: [i64; 6] = [
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_ppoll,
    libc::SYS_poll,
    libc::SYS_restart_syscall,
];

/// A descriptor, a pointer, a length that mean nothing: the kernel refuses them, after the filter.
const NOTHING: u64 = u64::MAX;

/// Makes one call with only the filter on.
fn outcome(host: &Host, call: i64, arguments: &[u64], profile: Profile) -> Outcome {
    let text: Vec<String> = std::iter::once(call.to_string())
        .chain(arguments.iter().map(|argument| argument.cast_signed().to_string()))
        .collect();
    let mut spec = host.spec("syscall", &text.join(" "));
    spec.seccomp = profile;
    spec.layers = Layers { landlock: false, root: false, ..Layers::all() };
    run(&spec)
}

/// Arguments that a call is allowed with: the first of its conditions, on nothing else that means anything.
fn fitting(call: &Call) -> Vec<Vec<u64>> {
    if call.when.is_empty() {
        return vec![vec![NOTHING; 6]];
    }
    let fit = |checks: &&[bailey_host::jail::seccomp::Check]| {
        let mut arguments = vec![NOTHING; 6];
        for check in checks.iter() {
            let place = usize::from(check.argument);
            arguments[place] = (arguments[place] & !check.mask) | check.value;
        }
        arguments
    };
    call.when.iter().map(fit).collect()
}

/// Arguments that differ in one bit that a condition looks at.
fn near_misses(call: &Call) -> Vec<Vec<u64>> {
    let mut misses = Vec::new();
    for (checks, arguments) in call.when.iter().zip(fitting(call)) {
        for check in *checks {
            let mut miss = arguments.clone();
            // The highest bit that is looked at: low ones may lead to another value that is allowed.
            let bit = 1_u64 << (63 - check.mask.leading_zeros());
            miss[usize::from(check.argument)] ^= bit;
            misses.push(miss);
        }
    }
    misses
}

/// Makes each of these calls, and what misses it by a bit.
fn check(calls: &[Call], profile: Profile) {
    let host = Host::new();
    let allowed: BTreeSet<(i64, Vec<u64>)> = table(profile)
        .iter()
        .flat_map(|call| fitting(call).into_iter().map(|arguments| (call.number, arguments)))
        .collect();
    let mut wrong = Vec::new();
    for call in calls.iter().filter(|call| !NOT_TRIED.contains(&call.number)) {
        for arguments in fitting(call) {
            if outcome(&host, call.number, &arguments, profile) == Outcome::Killed {
                wrong.push(format!("{} {arguments:x?} kills", call.number));
            }
        }
        for arguments in near_misses(call) {
            if allowed.contains(&(call.number, arguments.clone())) {
                continue;
            }
            if outcome(&host, call.number, &arguments, profile) != Outcome::Killed {
                wrong.push(format!("{} {arguments:x?} is let through", call.number));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn each_allowed_call_passes_and_its_near_misses_kill() {
    check(&table(Profile::QemuTcg), Profile::QemuTcg);
}

/// What the profile for KVM allows beyond the other one: its last call.
fn requests_of_kvm() -> Vec<Call> {
    table(Profile::QemuKvm).split_off(table(Profile::QemuTcg).len())
}

#[test]
fn each_call_of_an_image_maker_passes_and_its_near_misses_kill() {
    check(&table(Profile::MkfsErofs), Profile::MkfsErofs);
}

#[test]
fn each_request_of_kvm_passes_and_its_near_misses_kill() {
    let requests = requests_of_kvm();
    assert!(matches!(requests.as_slice(), [Call { number: libc::SYS_ioctl, when: [_, ..] }]));
    check(&requests, Profile::QemuKvm);
}

#[test]
fn what_kvm_can_beyond_a_vms_needs_kills() {
    let host = Host::new();
    let request = |number, profile| outcome(&host, libc::SYS_ioctl, &[NOTHING, number], profile);
    let refused = [
        ("KVM_CREATE_DEVICE", 0xc00c_aee0),
        ("KVM_SET_DEVICE_ATTR", 0x4018_aee1),
        ("KVM_ASSIGN_PCI_DEVICE", 0x8040_ae69),
        ("KVM_IRQFD", 0x4020_ae76),
        ("KVM_MEMORY_ENCRYPT_OP", 0xc008_aeba),
        ("KVM_MEMORY_ENCRYPT_REG_REGION", 0x8010_aebb),
        ("KVM_SET_GUEST_DEBUG", 0x4048_ae9b),
        ("KVM_CREATE_GUEST_MEMFD", 0xc040_aed4),
    ];
    for (name, number) in refused {
        assert_eq!(request(number, Profile::QemuKvm), Outcome::Killed, "{name}");
    }
    // Without KVM, not even running a processor.
    assert_eq!(request(0xae80, Profile::QemuTcg), Outcome::Killed);
}

#[test]
fn every_other_call_kills() {
    for profile in [Profile::QemuTcg, Profile::MkfsErofs] {
        check_others(profile);
    }
}

fn check_others(profile: Profile) {
    let host = Host::new();
    let allowed: BTreeSet<i64> = table(profile).iter().map(|call| call.number).collect();
    // Answered as if the kernel had them not.
    let answered = [libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_seccomp];
    // uretprobe and uprobe: newer kernels pass them by every filter, and end who calls them from elsewhere than
    // the kernel's own code with another signal.
    let passed_by = [335, 336];
    let beyond_the_last = 500;
    for call in (0..beyond_the_last).filter(|call| !allowed.contains(call) && !passed_by.contains(call)) {
        let outcome = outcome(&host, call, &[NOTHING; 6], profile);
        if answered.contains(&call) {
            assert!(matches!(&outcome, Outcome::Denied(why) if why.contains("38")), "{call}: {outcome:?}");
        } else {
            assert_eq!(outcome, Outcome::Killed, "call {call} with {profile:?}");
        }
    }
}

#[test]
fn the_other_number_ranges_kill() {
    let host = Host::new();
    // The x32 interface: getpid, which as an ordinary call is allowed.
    assert_eq!(outcome(&host, 0x4000_0000 | libc::SYS_getpid, &[], Profile::QemuTcg), Outcome::Killed);
}

#[test]
fn logging_lets_through_and_is_reported() {
    let host = Host::new();
    let mut spec = host.spec("raw-socket", "");
    spec.layers = Layers { seccomp: SeccompLayer::Log, ..Layers::all() };
    assert!(matches!(run(&spec), Outcome::Denied(_)), "by another layer, not by the filter");
}
