//! QEMU's command line: a `microvm` machine with as few devices as a sandbox needs.
//!
//! A template and its clones must have the same devices in the same order; what is behind them may differ. So the
//! line is made in one place, from one description, and only the back ends depend on where the VM starts from.

use std::fmt::Write as _;
use std::os::fd::{OwnedFd, RawFd};

use bailey_types::guest::PORT_NAME;

use super::disks::{self, Backing};
use crate::bundle::IoLimits;
use crate::vmm::{DISK_MAX, Shape};

/// Where the kernel and the initramfs are inside the jail.
pub(super) const KERNEL: &str = "/run/vmlinux";
pub(super) const INITRAMFS: &str = "/run/initramfs";

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accel {
    Kvm,
    /// Emulation, with the rate of the host's time-stamp counter in kHz, which emulated guests cannot measure.
    Tcg {
        tsc_khz: u64,
    },
}

impl Accel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg { .. } => "tcg",
        }
    }
}

/// What the machine's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// Its own.
    Anonymous,
    /// A template's, in this descriptor, written to.
    Shared(RawFd),
    /// A template's, in this descriptor, copied on write.
    Private(RawFd),
}

/// Descriptors that the line refers to, by their numbers in the jail.
#[derive(Debug, Default)]
pub(super) struct Descriptors(Vec<(OwnedFd, RawFd)>);

impl Descriptors {
    /// The first number after standard error.
    const FIRST: RawFd = 3;

    /// Takes a descriptor and gives it its number.
    pub(super) fn give(&mut self, fd: OwnedFd) -> RawFd {
        let number = Descriptors::FIRST + RawFd::try_from(self.0.len()).unwrap_or(0);
        self.0.push((fd, number));
        number
    }

    pub(super) fn into_inner(self) -> Vec<(OwnedFd, RawFd)> {
        self.0
    }
}

/// A disk's file, by the descriptor's number in the jail.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskFile {
    pub(super) fd: RawFd,
    /// Size in bytes.
    pub(super) bytes: u64,
    pub(super) io: IoLimits,
}

/// What the line is made of.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    pub(super) shape: &'a Shape,
    pub(super) accel: Accel,
    pub(super) memory: Memory,
    pub(super) monitor: RawFd,
    pub(super) channel: RawFd,
    pub(super) console: RawFd,
    /// The image's file and the scratch disk's; a VM that is nobody's yet has none.
    pub(super) disks: Option<[DiskFile; 2]>,
    /// Whether the devices' state is loaded before the machine runs.
    pub(super) incoming: bool,
    pub(super) taps: Vec<RawFd>,
}

impl Line<'_> {
    /// The arguments, the program's name first.
    pub(super) fn build(&self) -> Vec<String> {
        let mut args: Vec<String> = vec!["qemu".into()];
        let mut add = |option: &str, value: String| {
            args.push(option.into());
            args.push(value);
        };
        let shape = self.shape;
        // Without a clock chip, kernels wait seconds for it.
        let acpi = if shape.guest.manifest.acpi { "on" } else { "off" };
        add("-name", self.name.to_owned());
        add("-M", format!("microvm,acpi={acpi},memory-backend=memory"));
        match self.accel {
            Accel::Kvm => {
                add("-accel", "kvm".into());
                add("-cpu", "host".into());
            }
            Accel::Tcg { .. } => {
                add("-accel", "tcg,tb-size=64".into());
                // Emulated string moves are slow: without the flag, kernels copy by loops.
                add("-cpu", "max,-erms".into());
            }
        }
        add("-smp", shape.vcpus.to_string());
        add("-m", format!("{}M", shape.memory_bytes >> 20));
        add("-object", self.memory());
        for option in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            args.push(option.into());
        }
        let mut add = |option: &str, value: String| {
            args.push(option.into());
            args.push(value);
        };
        add("-display", "none".into());
        add("-kernel", KERNEL.into());
        add("-initrd", INITRAMFS.into());
        add("-append", self.cmdline());
        // A saved state wakes up running.
        add("-global", "migration.store-global-state=off".into());
        add("-chardev", format!("socket,id=monitor,fd={}", self.monitor));
        add("-mon", "chardev=monitor,mode=control".into());
        add("-chardev", format!("socket,id=console,fd={}", self.console));
        add("-serial", "chardev:console".into());
        add("-device", "virtio-serial-device".into());
        add("-chardev", format!("socket,id=channel,fd={}", self.channel));
        add("-device", format!("virtserialport,chardev=channel,name={PORT_NAME}"));
        self.disks(&mut add);
        for (index, tap) in self.taps.iter().enumerate() {
            add("-netdev", format!("tap,id=net{index},fd={tap}"));
            add("-device", format!("virtio-net-device,netdev=net{index}"));
        }
        if self.incoming {
            add("-incoming", "defer".into());
        }
        args
    }

    fn memory(&self) -> String {
        let size = self.shape.memory_bytes;
        match self.memory {
            Memory::Anonymous => format!("memory-backend-ram,id=memory,size={size}"),
            Memory::Shared(fd) => {
                format!("memory-backend-file,id=memory,size={size},share=on,mem-path=/proc/self/fd/{fd}")
            }
            Memory::Private(fd) => {
                format!("memory-backend-file,id=memory,size={size},share=off,mem-path=/proc/self/fd/{fd}")
            }
        }
    }

    /// The kernel's boot parameters.
    fn cmdline(&self) -> String {
        let mut line = String::from("console=ttyS0 quiet reboot=t panic=-1 ");
        line.push_str(&self.shape.guest.manifest.cmdline);
        if let Accel::Tcg { tsc_khz } = self.accel {
            // Measuring the counter against emulated clocks fails on a busy host, and the kernel hangs. Emulation
            // does not speculate, so there is nothing to mitigate.
            // Writing to a string does not fail.
            let _written = write!(line, " tsc_early_khz={tsc_khz} tsc=reliable mitigations=off");
        }
        line
    }

    fn disks(&self, add: &mut impl FnMut(&str, String)) {
        let limits = self.disks.and_then(|[root, _]| disks::limits(&root.io));
        if let Some(limits) = &limits {
            add("-object", disks::limits_object(limits).to_string());
        }
        for (index, disk) in [disks::ROOT, disks::SCRATCH].into_iter().enumerate() {
            let (mut below, mut bytes) = (format!("{}-0", disk.name), DISK_MAX);
            match self.disks.map(|disks| disks[index]) {
                None => add("-blockdev", disk.stand_in().to_string()),
                Some(file) => {
                    let fdset = disks::inherited_set(file.fd);
                    add("-add-fd", format!("fd={},set={fdset}", file.fd));
                    bytes = file.bytes;
                    let throttled = limits.is_some();
                    for (name, node) in disk.below(Backing { fdset, throttled, number: 0 }) {
                        add("-blockdev", node.to_string());
                        below = name;
                    }
                }
            }
            add("-blockdev", disk.top(&below, Some(bytes)).to_string());
            // A full host disk is the guest's I/O error, not a pause that nobody ends.
            let name = disk.name;
            add(
                "-device",
                format!("virtio-blk-device,drive={name},serial={name},werror=report,rerror=report"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{Digests, GuestImage, Manifest};

    fn line(shape: &Shape, disks: Option<[DiskFile; 2]>, memory: Memory) -> Vec<String> {
        let accel = Accel::Tcg { tsc_khz: 1_000_000 };
        let (monitor, channel, console) = (3, 4, 5);
        let taps = Vec::new();
        Line { name: "x", shape, accel, memory, monitor, channel, console, disks, incoming: false, taps }
            .build()
    }

    fn shape() -> Shape {
        let manifest = Manifest {
            flavour: "debian".into(),
            cmdline: "cryptomgr.notests".into(),
            acpi: true,
            sha256: Digests { vmlinux: String::new(), initramfs: String::new() },
        };
        let guest = GuestImage { kernel: "/k".into(), initramfs: "/i".into(), manifest };
        Shape { guest, memory_bytes: 192 << 20, vcpus: 1 }
    }

    /// What must be the same in a template and its clones: everything that names a device.
    fn devices(line: &[String]) -> Vec<String> {
        line.windows(2).filter(|pair| pair[0] == "-device").map(|pair| pair[1].clone()).collect()
    }

    #[test]
    fn a_template_and_its_clones_have_the_same_devices() {
        let shape = shape();
        let limits = IoLimits { read_bytes_per_second: Some(1), ..IoLimits::default() };
        let template = line(&shape, None, Memory::Shared(6));
        for io in [IoLimits::default(), limits] {
            let file = |fd| DiskFile { fd, bytes: 1 << 20, io };
            let clone = line(&shape, Some([file(7), file(8)]), Memory::Private(6));
            assert_eq!(devices(&template), devices(&clone));
        }
    }

    #[test]
    fn no_sandbox_has_a_network_device_unless_it_is_given_a_tap() {
        let line = line(&shape(), None, Memory::Anonymous).join(" ");
        assert!(!line.contains("net"), "{line}");
    }
}
