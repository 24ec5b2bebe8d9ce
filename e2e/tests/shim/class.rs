//! The container class: hardened, for namespaces that the operator names, and for no other (A7).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::ctr::Run;
use bailey_e2e::images::{Image, busybox};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::process::text_of;
use bailey_e2e::settings::only_ours;

const QUICK: Duration = Duration::from_secs(30);
const CLASS: &str = "dev.bailey.class";
const MAPPING: &str = "0:100000:65536";
/// Bits of rights that no container of the class has: those to bind raw sockets, to load modules, to trace, to
/// administrate, to make devices.
const NEVER: [(u32, &str); 5] =
    [(13, "NET_RAW"), (16, "SYS_MODULE"), (19, "SYS_PTRACE"), (21, "SYS_ADMIN"), (27, "MKNOD")];

/// A test in a namespace that may use the class.
fn allowed(body: impl FnOnce(&mut Machine, &Image) -> Result<()>) -> Result<()> {
    if !only_ours("its classes") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let namespaces = format!("[{:?}]", machine.containerd.namespace());
        machine.containerd.set_shim(&[("container_class_namespaces", &namespaces)])?;
        // The container's own root user, which is none of the host's, has to get to its files.
        let passable = fs::Permissions::from_mode(0o711);
        fs::set_permissions(machine.containerd.folder(), passable).context("opening the folder")?;
        body(machine, image)
    })
}

/// A container of the class by `ctr`'s flags.
fn contained<'m>(machine: &'m Machine, image: &Image) -> Run<'m> {
    let run = machine.run(image).annotation(CLASS, "container");
    run.option("--uidmap", MAPPING).option("--gidmap", MAPPING)
}

/// A container of the class that runs this script, with users and files of its own and all rights asked for. By a
/// specification: with `--uidmap`, `ctr` sends options that the shim of runc takes from its own users only.
fn hardened<'m>(machine: &'m Machine, image: &Image, script: &str) -> Result<Run<'m>> {
    let root = machine.containerd.folder().join("contained");
    if !root.exists() {
        busybox().unpack_lowest(&root)?;
        let mut chown = machine.containerd.command("chown");
        text_of(chown.args(["-R", "100000:100000"]).arg(&root), QUICK)?;
    }
    machine.run(image).sh(script).with_spec(&root, |spec| {
        spec["annotations"] = serde_json::json!({CLASS: "container"});
        let mapping = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
        namespaces.push(serde_json::json!({"type": "user"}));
        spec["process"]["noNewPrivileges"] = false.into();
        for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
            let set = &mut spec["process"]["capabilities"][set];
            if !set.is_array() {
                *set = serde_json::json!([]);
            }
            set.as_array_mut().context("no set")?.extend(["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"].map(Into::into));
        }
        Ok(())
    })
}

fn refused(run: Run<'_>, words: &[&str]) -> Result<()> {
    let output = run.args(&["echo", "ran"]).output()?;
    ensure!(output.code != 0 && output.stdout.is_empty(), "it ran: {output:?}");
    let said = output.errors();
    for word in words {
        ensure!(said.contains(word), "it does not say {word:?}: {said}");
    }
    Ok(())
}

#[test]
fn a_namespace_that_is_not_named_is_refused() -> Result<()> {
    if !only_ours("its classes") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let namespace = machine.containerd.namespace();
        let words = [namespace, "may not use the class container", "container_class_namespaces"];
        refused(contained(machine, image), &words)?;
        machine.containerd.set_shim(&[("container_class_namespaces", "[\"another\", \"e2e\"]")])?;
        refused(contained(machine, image), &words)
    })
}

#[test]
fn it_is_hardened() -> Result<()> {
    allowed(|machine, image| {
        let script = "cat /proc/self/uid_map /proc/self/gid_map /proc/self/status";
        let text = hardened(machine, image, script)?.output()?.success()?.text();
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(&words[..6], ["0", "100000", "65536", "0", "100000", "65536"], "{text}");
        let field = |name: &str| {
            let at = words.iter().position(|word| *word == name);
            at.and_then(|at| words.get(at + 1)).copied().unwrap_or("nothing")
        };
        assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), ("2", "1"), "{text}");
        for set in ["CapBnd:", "CapPrm:", "CapEff:"] {
            let bits = u64::from_str_radix(field(set), 16).with_context(|| text.clone())?;
            let has: Vec<_> = NEVER.iter().filter(|(bit, _)| bits & (1 << bit) != 0).collect();
            assert!(has.is_empty(), "{set} has {has:?}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        Ok(())
    })
}

#[test]
fn the_host_cannot_be_changed_or_asked() -> Result<()> {
    allowed(|machine, image| {
        let script = "for f in /proc/sysrq-trigger /proc/sys/kernel/hostname; do \
                (echo x > $f) 2>/dev/null && echo wrote $f; done; \
            for f in /proc/kcore /proc/keys; do [ \"$(head -c 1 $f 2>/dev/null | wc -c)\" = 0 ] || echo read $f; done; \
            mount -t tmpfs tmpfs /tmp 2>/dev/null && echo mounted; \
            unshare -U true 2>/dev/null && echo unshared; \
            dmesg >/dev/null 2>&1 && echo log; \
            touch /mine && stat -c %u /mine";
        let output = hardened(machine, image, script)?.output()?.success()?;
        assert_eq!(output.text(), "0\n", "{output:?}");
        Ok(())
    })
}

#[test]
fn it_lives_as_any_other() -> Result<()> {
    allowed(|machine, image| {
        let script = "trap 'exit 4' TERM; echo up; while :; do sleep 1000 & wait $!; done";
        let mut task = hardened(machine, image, script)?.start()?;
        task.wait_for("up\n")?;
        let text = task.sh("id -u; grep Seccomp: /proc/self/status; exit 3")?.expect(3)?.text();
        assert_eq!(text, "0\nSeccomp:\t2\n");
        task.kill("SIGTERM")?;
        task.wait()?.expect(4)?;
        // Input, output, and both kinds of sandboxes beside each other.
        let text = hardened(machine, image, "cat")?.input("through\n").output()?.success()?.text();
        assert_eq!(text, "through\n");
        machine.run(image).args(&["true"]).output()?.success().map(drop)
    })
}

#[test]
fn what_no_hardening_makes_safe_is_refused() -> Result<()> {
    allowed(|machine, image| {
        let bare = || machine.run(image).annotation(CLASS, "container");
        refused(bare(), &["users of its own", "uidMappings", "gidMappings"])?;
        let root = "0:0:65536";
        refused(bare().option("--uidmap", root).option("--gidmap", root), &["users of its own"])?;
        refused(contained(machine, image).flag("--privileged"), &["privileged"])?;
        refused(contained(machine, image).flag("--net-host"), &["network"])?;
        refused(contained(machine, image).option("--device", "/dev/kmsg"), &["/dev/kmsg"])?;
        let mount = "type=bind,src=/etc,dst=/host,options=rbind:ro";
        refused(contained(machine, image).option("--mount", mount), &["/host"])
    })
}
