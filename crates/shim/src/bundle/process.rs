//! A process of the specification, as the guest takes it.

use std::collections::HashSet;

use bailey_types::guest::spec::{Capabilities, Process, Rlimit};
use oci_spec::runtime::{self, Capability, PosixRlimitType};

use crate::error::{Error, Result};

/// A terminal's size when the caller has not said one yet.
const TERMINAL: (u16, u16) = (80, 24);

/// Turns a process of the specification into the guest's. Streams are asked for later, as the caller opens them.
pub(crate) fn convert_process(process: &runtime::Process, terminal: bool) -> Result<Process> {
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("the container has no command: name one, or use an image that does"));
    }
    let cwd = process.cwd().to_str().filter(|cwd| cwd.starts_with('/'));
    let cwd = cwd.ok_or_else(|| {
        Error::invalid(format!("the working directory {} is not an absolute path", process.cwd().display()))
    })?;
    let size = process.console_size().map(|size| {
        let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
        (cells(size.width()), cells(size.height()))
    });
    let user = process.user();
    Ok(Process {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd: cwd.to_owned(),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        capabilities: process.capabilities().as_ref().map(convert_capabilities).unwrap_or_default(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: process.rlimits().iter().flatten().map(convert_rlimit).collect(),
        oom_score_adj: process.oom_score_adj(),
        terminal: terminal.then(|| size.filter(|size| *size != (0, 0)).unwrap_or(TERMINAL)),
        stdin: false,
        stdout: false,
        stderr: false,
    })
}

fn convert_capabilities(sets: &runtime::LinuxCapabilities) -> Capabilities {
    let mask = |set: &Option<HashSet<Capability>>| {
        set.iter().flatten().fold(0, |mask, capability| mask | 1 << capability_number(*capability))
    };
    Capabilities {
        bounding: mask(sets.bounding()),
        effective: mask(sets.effective()),
        inheritable: mask(sets.inheritable()),
        permitted: mask(sets.permitted()),
        ambient: mask(sets.ambient()),
    }
}

/// The kernel's number (`linux/capability.h`).
fn capability_number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

fn convert_rlimit(limit: &runtime::PosixRlimit) -> Rlimit {
    let resource = match limit.typ() {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    };
    Rlimit { resource, soft: limit.soft(), hard: limit.hard() }
}
