//! Which layers stop which attack. The tests hold it to be exact: each set of layers that is listed stops the
//! attack with all others off, and no layer that is not listed does so alone.
//!
//! | attack | stopped by any one of |
//! |---|---|
//! | read `/etc/shadow`; read a neighbour's disk; open a device of the host; write a kernel setting | root, user, landlock |
//! | open a neighbour's file by its number, past all names | user, landlock, seccomp |
//! | create a file | root, user, landlock, seccomp |
//! | connect to a container engine's socket | root, seccomp |
//! | connect to an abstract socket; to TCP on the host's loopback | namespaces, landlock, seccomp |
//! | list the host's processes | landlock; root with user; root with namespaces |
//! | list the host's network interfaces | namespaces, seccomp |
//! | signal or trace a neighbour | namespaces, user, landlock, seccomp |
//! | raw socket; leave by chroot; become root; load eBPF | user, seccomp |
//! | mount | user, landlock, seccomp |
//! | make a device node | root, user, landlock, seccomp |
//! | make a user namespace | root, seccomp |
//! | execute another program | root, landlock, seccomp |
//! | become root by executing a set-user-id program | root, landlock, seccomp; no_new_privs with user |
//! | fork without end | seccomp; rlimits with user |
//! | open descriptors without end | rlimits alone |
//! | make an io_uring | seccomp alone; on kernels that count it as locked memory, rlimits with user |
//!
//! Two rows have one layer only. Descriptors without end: the memory that they cost counts towards the VMM's
//! cgroup, which is the second wall (`cgroup.rs`) but not this module's. An io_uring: it makes calls past the filter, so with the
//! filter gone it gives nothing that is not there anyway, and what it could reach is what the other rows deny with
//! seccomp off. `user` is the user and the capabilities together.
//!
//! The program that makes images keeps one capability, to read what it sees. So for it the user stops neither the
//! reading of files nor handles; both have another wall than that each, which `no_attack_works_with_any_one_layer_off`
//! shows for it as for a VMM.

use bailey_host::jail::{Layers, SeccompLayer};

/// A layer, or two that only make sense together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    Namespaces,
    Root,
    /// The user and the capabilities: a user that has all capabilities is as good as root.
    User,
    NoNewPrivs,
    Seccomp,
    Landlock,
    Rlimits,
}

use Layer::{Landlock, Namespaces, NoNewPrivs, Rlimits, Root, Seccomp, User};

pub(crate) const LAYERS: [Layer; 7] = [Namespaces, Root, User, NoNewPrivs, Seccomp, Landlock, Rlimits];

/// No layer but these.
pub(crate) fn only(layers: &[Layer]) -> Layers {
    let on = |layer| layers.contains(&layer);
    Layers {
        namespaces: on(Namespaces),
        root: on(Root),
        uid: on(User),
        caps: on(User),
        no_new_privs: on(NoNewPrivs),
        seccomp: if on(Seccomp) { SeccompLayer::Kill } else { SeccompLayer::Off },
        landlock: on(Landlock),
        rlimits: on(Rlimits),
    }
}

/// Every way to switch off one layer, with its name.
pub(crate) fn without_one() -> Vec<(&'static str, Layers)> {
    let all = Layers::all;
    vec![
        ("namespaces", Layers { namespaces: false, ..all() }),
        ("root", Layers { root: false, ..all() }),
        ("uid", Layers { uid: false, ..all() }),
        ("caps", Layers { caps: false, ..all() }),
        ("uid and caps", Layers { uid: false, caps: false, ..all() }),
        ("no_new_privs", Layers { no_new_privs: false, ..all() }),
        ("seccomp", Layers { seccomp: SeccompLayer::Off, ..all() }),
        ("landlock", Layers { landlock: false, ..all() }),
        ("rlimits", Layers { rlimits: false, ..all() }),
    ]
}

/// What an attack is aimed at. The test fills in what the host has.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    Fixed(&'static str),
    /// A file of the neighbour's, a device, or the folder itself, in the host's folder.
    InFolder(&'static str),
    NeighbourProcess,
    /// The number of a neighbour's file in its filesystem.
    NeighbourInode,
    TcpPort,
    AbstractSocket,
}

pub(crate) struct Attack {
    /// As the stand-in calls it.
    pub(crate) name: &'static str,
    pub(crate) target: Target,
    /// The sets of layers each of which stops it.
    pub(crate) stopped_by: &'static [&'static [Layer]],
    /// The layer that is alone in stopping it on some host, where that is so: without it, it may succeed.
    pub(crate) alone: Option<&'static str>,
}

const fn attack(name: &'static str, target: Target, stopped_by: &'static [&'static [Layer]]) -> Attack {
    Attack { name, target, stopped_by, alone: None }
}

pub(crate) const ATTACKS: &[Attack] = &[
    attack("read-file", Target::Fixed("/etc/shadow"), &[&[Root], &[User], &[Landlock]]),
    attack("read-file", Target::InFolder("neighbours-disk"), &[&[Root], &[User], &[Landlock]]),
    attack("open-device", Target::InFolder("device"), &[&[Root], &[User], &[Landlock]]),
    attack(
        "open-for-writing",
        Target::Fixed("/proc/sys/kernel/core_pattern"),
        &[&[Root], &[User], &[Landlock]],
    ),
    attack("open-by-handle", Target::NeighbourInode, &[&[User], &[Landlock], &[Seccomp]]),
    attack("create-file", Target::InFolder(""), &[&[Root], &[User], &[Landlock], &[Seccomp]]),
    attack("connect-path", Target::InFolder("engine.sock"), &[&[Root], &[Seccomp]]),
    attack("connect-abstract", Target::AbstractSocket, &[&[Namespaces], &[Landlock], &[Seccomp]]),
    attack("connect-tcp", Target::TcpPort, &[&[Namespaces], &[Landlock], &[Seccomp]]),
    // A root without its own processes' namespace shows them to who has root's capabilities.
    attack("list-processes", Target::NeighbourProcess, &[&[Root, User], &[Root, Namespaces], &[Landlock]]),
    attack("list-interfaces", Target::Fixed(""), &[&[Namespaces], &[Seccomp]]),
    attack("signal", Target::NeighbourProcess, &[&[Namespaces], &[User], &[Landlock], &[Seccomp]]),
    attack("ptrace", Target::NeighbourProcess, &[&[Namespaces], &[User], &[Landlock], &[Seccomp]]),
    attack("raw-socket", Target::Fixed(""), &[&[User], &[Seccomp]]),
    attack("chroot", Target::Fixed("/proc"), &[&[User], &[Seccomp]]),
    attack("setuid", Target::Fixed(""), &[&[User], &[Seccomp]]),
    attack("bpf", Target::Fixed(""), &[&[User], &[Seccomp]]),
    // The folder is a directory inside of the jail too: the program lies in it.
    attack("mount", Target::InFolder(""), &[&[User], &[Landlock], &[Seccomp]]),
    attack("mknod", Target::InFolder(""), &[&[Root], &[User], &[Landlock], &[Seccomp]]),
    attack("unshare-user", Target::Fixed(""), &[&[Root], &[Seccomp]]),
    attack("exec", Target::Fixed(super::host::OTHER_PROGRAM), &[&[Root], &[Landlock], &[Seccomp]]),
    attack(
        "exec-set-user-id",
        Target::InFolder("set-user-id"),
        &[&[Root], &[Landlock], &[Seccomp], &[NoNewPrivs, User]],
    ),
    // Root's processes have no limit, so it takes the user too.
    attack("fork-many", Target::Fixed("200"), &[&[Seccomp], &[Rlimits, User]]),
    Attack { alone: Some("rlimits"), ..attack("open-many", Target::Fixed("400"), &[&[Rlimits]]) },
    Attack { alone: Some("seccomp"), ..attack("io-uring", Target::Fixed(""), &[&[Seccomp]]) },
];
