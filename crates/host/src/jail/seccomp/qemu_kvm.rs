//! What QEMU needs besides when it runs on KVM: the requests of `/dev/kvm`, of a VM and of its processors.
//!
//! Taken from QEMU 7.2's sources for x86; not yet traced on a host whose KVM runs an ordinary kernel.

use super::{Call, Check, when};

/// All requests of the type that KVM has (`KVMIO`, in the second byte of the number): the device answers to no
/// others, no other device that a jail has uses the type, and which of them exist depends on the kernel.
const KVM: Check = Check { argument: 1, mask: 0xff00, value: 0xae00 };

pub(super) const CALLS: &[Call] = &[when(libc::SYS_ioctl, &[&[KVM]])];
