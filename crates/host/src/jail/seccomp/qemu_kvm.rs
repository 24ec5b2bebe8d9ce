//! What QEMU needs besides when it runs on KVM: the requests of `/dev/kvm`, of a VM and of its processors, one by one.
//!
//! Found by tracing QEMU 7.2 and 10.0 on hosts with Debian's kernels 6.1 and 6.12, as they booted both guest kernels
//! with one processor and with two, were stopped, saved, restored, paused and ended. What is allowed without having been
//! seen says why. The numbers hold the size of what is passed, as `linux/kvm.h` makes them.
//!
//! Absent on purpose: every way to make other devices (`KVM_CREATE_DEVICE`), to hand the guest a device of the host
//! or a descriptor of another VM, to encrypt or copy a VM's memory, to debug a guest, and every request that KVM may
//! come to have.

use super::{Call, Check, is, when};

const fn request(number: u64) -> [Check; 1] {
    [is(1, number)]
}

pub(super) const CALLS: &[Call] = &[when(
    libc::SYS_ioctl,
    &[
        // What this KVM is: KVM_GET_API_VERSION, KVM_CHECK_EXTENSION (of the device and of a VM), KVM_GET_VCPU_MMAP_SIZE,
        // KVM_GET_DEVICE_ATTR (which state of AMX guests may have).
        &request(0xae00),
        &request(0xae03),
        &request(0xae04),
        &request(0x4018_aee2),
        // What its processors can: KVM_GET_SUPPORTED_CPUID, KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST,
        // KVM_X86_GET_MCE_CAP_SUPPORTED.
        &request(0xc008_ae05),
        &request(0xc004_ae02),
        &request(0xc004_ae0a),
        &request(0x8008_ae9d),
        // Making the machine: KVM_CREATE_VM, KVM_SET_IDENTITY_MAP_ADDR and KVM_SET_TSS_ADDR (memory that Intel's
        // processors need for themselves), KVM_ENABLE_CAP (half of the interrupt controller in the kernel, and what
        // leaves the guest), KVM_X86_SET_MSR_FILTER.
        &request(0xae01),
        &request(0x4008_ae48),
        &request(0xae47),
        &request(0x4068_aea3),
        &request(0x4188_aec6),
        // Its memory: KVM_SET_USER_MEMORY_REGION; and what of it has changed, while a template is saved:
        // KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG.
        &request(0x4020_ae46),
        &request(0x4010_ae42),
        &request(0xc018_aec0),
        // Its devices' notices and interrupts: KVM_IOEVENTFD, KVM_SET_GSI_ROUTING, KVM_IRQ_LINE_STATUS.
        &request(0x4040_ae79),
        &request(0x4008_ae6a),
        &request(0xc008_ae67),
        // KVM_INTERRUPT: an interrupt of the old controller, which QEMU emulates, before a guest has set up
        // the newer one.
        &request(0x4004_ae86),
        // Making a processor: KVM_CREATE_VCPU, KVM_SET_CPUID2, KVM_X86_SETUP_MCE, KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ,
        // KVM_SET_VAPIC_ADDR and KVM_TPR_ACCESS_REPORTING (both off, as a reset has it).
        &request(0xae41),
        &request(0x4008_ae90),
        &request(0x4008_ae9c),
        &request(0xaea2),
        &request(0xaea3),
        &request(0x4008_ae93),
        &request(0xc028_ae92),
        // KVM_GET_STATS_FD: QEMU 10 has a file of a processor's counts, to be read, and reads it when it is asked to.
        &request(0xaece),
        // KVM_RUN: the guest runs.
        &request(0xae80),
        // A processor's state, set when it is made, reset or restored, and read when it is saved: registers, KVM_GET_REGS
        // and KVM_SET_REGS;
        &request(0x8090_ae81),
        &request(0x4090_ae82),
        // segments and control registers, KVM_GET_SREGS2 and KVM_SET_SREGS2, and, not seen, what kernels before 5.14
        // have in their place, KVM_GET_SREGS and KVM_SET_SREGS;
        &request(0x8140_aecc),
        &request(0x4140_aecd),
        &request(0x8138_ae83),
        &request(0x4138_ae84),
        // vectors, KVM_GET_XSAVE2 and KVM_SET_XSAVE, KVM_GET_XCRS and KVM_SET_XCRS, and, not seen, KVM_GET_XSAVE of
        // kernels before 5.17;
        &request(0x9000_aecf),
        &request(0x5000_aea5),
        &request(0x8188_aea6),
        &request(0x4188_aea7),
        &request(0x9000_aea4),
        // KVM_GET_MSRS (of the device, too: those that tell features) and KVM_SET_MSRS;
        &request(0xc008_ae88),
        &request(0x4008_ae89),
        // its interrupt controller, KVM_GET_LAPIC and KVM_SET_LAPIC;
        &request(0x8400_ae8e),
        &request(0x4400_ae8f),
        // whether it runs or waits, KVM_GET_MP_STATE and KVM_SET_MP_STATE;
        &request(0x8004_ae98),
        &request(0x4004_ae99),
        // what is about to happen to it, KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS;
        &request(0x8040_ae9f),
        &request(0x4040_aea0),
        // KVM_GET_DEBUGREGS and KVM_SET_DEBUGREGS;
        &request(0x8080_aea1),
        &request(0x4080_aea2),
        // a guest of the guest, of which there is none: KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE.
        &request(0xc080_aebe),
        &request(0x4080_aebf),
        // The guest's clock, over a stop: KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_KVMCLOCK_CTRL.
        &request(0x8030_ae7c),
        &request(0x4030_ae7b),
        &request(0xaead),
    ],
)];
