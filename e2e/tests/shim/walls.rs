//! What a sandbox keeps apart: the host from the workload, and sandboxes from each other (A2, A4, A5, A7).

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use bailey_e2e::images::{busybox, with_program};
use bailey_e2e::machine::test_with;
use bailey_e2e::probe;
use bailey_e2e::settings::{OUR_RUNTIME, only_ours};

#[test]
fn a_path_of_the_host_is_refused() -> Result<()> {
    if !only_ours("runc mounts what it is told to") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        for mount in [
            "type=bind,src=/etc,dst=/host,options=rbind:ro",
            "type=bind,src=/dev/null,dst=/etc/hosts,options=bind",
        ] {
            let output = machine.run(image).option("--mount", mount).args(&["true"]).output()?;
            assert_ne!(output.code, 0);
            let said = output.errors();
            assert!(said.contains("/host") || said.contains("/etc/hosts"), "names the mount: {said}");
        }
        Ok(())
    })
}

#[test]
fn namespaces_and_devices_of_the_host_are_refused() -> Result<()> {
    if !only_ours("runc shares what it is told to") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let refused = [
            (vec!["--net-host"], "network"),
            (vec!["--with-ns", "pid:/proc/1/ns/pid"], "pid"),
            (vec!["--device", "/dev/kmsg"], "/dev/kmsg"),
        ];
        for (flags, named) in refused {
            let run = flags.iter().fold(machine.run(image), |run, flag| run.flag(flag));
            let output = run.args(&["true"]).output()?;
            assert_ne!(output.code, 0, "{flags:?}");
            assert!(output.errors().contains(named), "{flags:?}: {}", output.errors());
        }
        Ok(())
    })
}

#[test]
fn nothing_of_the_host_is_visible() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mark = format!("mark-{}", std::process::id());
        fs::write(machine.containerd.folder().join(&mark), "").context("leaving a mark")?;
        let script = format!(
            "ls /proc | grep -c '^[0-9]'; ls /sys/class/net; ls -d /proc/*/root{0} 2>/dev/null; cat /proc/net/tcp | wc -l",
            machine.containerd.folder().join(&mark).display()
        );
        let text = machine.run(image).sh(&script).output()?.success()?.text();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].parse::<u32>()? <= 5, "only its own processes: {text}");
        assert_eq!(&lines[1..], ["lo", "1"], "one interface, no file of the host, no socket: {text}");
        Ok(())
    })
}

#[test]
fn the_host_is_not_recognisable() -> Result<()> {
    if !only_ours("a container of runc shares the host's kernel") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let host = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let inside =
            machine.run(image).sh("cat /proc/version /proc/sys/kernel/random/boot_id; cat /proc/mounts");
        let inside = inside.output()?.success()?.text();
        for path in ["/proc/version", "/proc/sys/kernel/random/boot_id"] {
            assert!(!inside.contains(host(path)?.trim()), "{path} of the host: {inside}");
        }
        let folder = machine.containerd.folder().to_string_lossy().into_owned();
        assert!(!inside.contains(&folder), "a path of the host: {inside}");
        Ok(())
    })
}

#[test]
fn sandboxes_never_share_what_must_be_random() -> Result<()> {
    if !only_ours("containers of runc share a kernel") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let script = "head -c 16 /dev/urandom | hexdump -e '16/1 \"%02x\" \"\\n\"'; \
            cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
            grep -E 'stack|heap' /proc/self/maps | cut -d- -f1; hexdump -C /proc/self/auxv | md5sum";
        let mut seen = Vec::new();
        for _ in 0..3 {
            let text = machine.run(image).sh(script).output()?.success()?.text();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            assert!(lines.len() >= 5, "{text}");
            seen.push(lines);
        }
        for line in 0..seen[0].len() {
            let mut values: Vec<_> = seen.iter().map(|lines| &lines[line]).collect();
            values.sort();
            values.dedup();
            assert_eq!(values.len(), 3, "the same in two sandboxes: {seen:?}");
        }
        Ok(())
    })
}

#[test]
fn the_clock_is_right() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let inside: u64 =
            machine.run(image).args(&["date", "+%s"]).output()?.success()?.text().trim().parse()?;
        let outside = std::time::UNIX_EPOCH.elapsed()?.as_secs();
        // The container ended a moment ago; a template's clock would be off by its age.
        assert!(outside.abs_diff(inside) <= 5, "{inside} inside, {outside} outside");
        Ok(())
    })
}

/// System calls that any process may use, and those that need the rights of a privileged container.
const FOR_ALL: [&str; 9] = [
    "unshare_user",
    "ptrace",
    "io_uring_setup",
    "keyctl",
    "memfd_create",
    "inotify_init",
    "seccomp",
    "process_vm_readv",
    "mount_in_user_namespace",
];
const FOR_PRIVILEGED: [&str; 9] = [
    "mount",
    "unshare_mount",
    "bpf_map",
    "bpf_program",
    "perf_event_open",
    "fanotify_init",
    "open_by_handle_at",
    "raw_socket",
    "sethostname",
];

#[test]
fn system_calls_work_inside() -> Result<()> {
    test_with(&with_program("probe", probe::build()?), |machine, image| {
        let text = machine.run(image).args(&["bailey-probe"]).output()?.success()?.text();
        for call in FOR_ALL.iter().filter(|_| only_ours("what the host's kernel and runc allow")) {
            assert!(text.contains(&format!("{call}: ok\n")), "{call}:\n{text}");
        }
        assert!(text.contains("mount: EPERM\n"), "rights that nobody gave:\n{text}");
        Ok(())
    })
}

#[test]
fn a_privileged_container_owns_its_machine_and_no_other() -> Result<()> {
    if !only_ours("a privileged container of runc owns the host") {
        return Ok(());
    }
    test_with(&with_program("probe", probe::build()?), |machine, image| {
        let host_name = fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host's name")?;
        let text =
            machine.run(image).flag("--privileged").args(&["bailey-probe"]).output()?.success()?.text();
        for call in FOR_ALL.iter().chain(&FOR_PRIVILEGED) {
            assert!(text.contains(&format!("{call}: ok\n")), "{call}:\n{text}");
        }
        let after = fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host's name")?;
        assert_eq!(host_name, after);
        Ok(())
    })
}

/// What a workload says to its disk, and what nobody but its own VM may ever read.
const CANARY: &str = "canary-4f1d7a0be2";

#[test]
fn what_is_written_is_noise_on_the_hosts_disk() -> Result<()> {
    if !only_ours("runc writes to the host's own filesystem") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        // A small disk: all of it is read below.
        let script = format!("yes {CANARY} | head -c 8388608 >/file; sync; echo written; sleep 600");
        let mut task = machine.run(image).annotation("dev.bailey.scratch", "32MiB").sh(&script).start()?;
        task.wait_for("written")?;
        let vmm = task.pid()?.context("the task has no process")?;
        let disk = scratch_disk(&vmm)?;
        let bytes = fs::read(&disk).with_context(|| format!("reading {}", disk.display()))?;
        let written = bytes.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).count();
        assert!(written >= 2048, "only {written} blocks have reached the disk");
        let canary = CANARY.as_bytes();
        assert!(
            !bytes.windows(canary.len()).any(|window| window == canary),
            "the text is there in the clear"
        );
        assert!(fs::read_link(&disk)?.to_string_lossy().ends_with("(deleted)"), "the disk has a name");
        task.kill("KILL")?;
        task.wait().map(drop)
    })
}

/// The disk that a VMM writes to: an open file of the shim's cache without a name.
fn scratch_disk(vmm: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(format!("/proc/{vmm}/fd")).context("listing the VMM's files")? {
        let path = entry?.path();
        let target = fs::read_link(&path)?;
        if target.to_string_lossy().contains("/cache/") && target.to_string_lossy().ends_with("(deleted)") {
            return Ok(path);
        }
    }
    anyhow::bail!("the VMM {vmm} has no scratch disk open")
}

#[test]
fn namespaces_share_no_image() -> Result<()> {
    if !only_ours("its images") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let here = machine.containerd.namespace().to_owned();
        let there = format!("{here}-b");
        let archive = image.archive.to_string_lossy();
        machine.ctr_in(&there, &["images", "import", "--snapshotter", "overlayfs", &archive])?.success()?;
        let mut of_layers = Vec::new();
        for namespace in [&here, &there] {
            let run = ["run", "--rm", "--runtime", OUR_RUNTIME, "--annotation", "dev.bailey.start=cold"];
            let rest = ["--snapshotter", "overlayfs", &image.reference, "one", "cat", "/bin/busybox"];
            let output = machine.ctr_in(namespace, &[&run[..], &rest[..]].concat())?;
            let read = output.success()?.stdout;
            assert!(read.len() > 100_000, "{namespace}: {} bytes", read.len());
            let folder = machine.containerd.shim_cache_dir().join("images").join(namespace);
            let files = fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?;
            let mut images: Vec<PathBuf> = files.flatten().map(|file| file.path()).collect();
            images.retain(|path| path.extension().is_some_and(|extension| extension == "img"));
            assert_eq!(images.len(), 1, "{images:?}");
            of_layers.push((read, fs::metadata(&images[0])?.ino(), fs::read(&images[0])?));
        }
        let [(first, inode, bytes), (second, other_inode, other_bytes)] = &of_layers[..] else {
            return Ok(());
        };
        assert!(first == second, "the same image was run twice");
        assert!(inode != other_inode, "one file for two namespaces");
        // Each has a salt of its own, so that not even the hashes of its blocks are the other's.
        assert!(bytes.len() == other_bytes.len() && bytes != other_bytes, "one hash tree for two namespaces");
        Ok(())
    })
}

#[test]
fn no_module_is_loaded_after_boot() -> Result<()> {
    if !only_ours("the host's kernel may load modules") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let script = "cat /proc/sys/kernel/modules_disabled && echo 0 >/proc/sys/kernel/modules_disabled";
        let output = machine.run(image).flag("--privileged").sh(script).output()?;
        assert_eq!(output.text(), "1\n");
        assert_ne!(output.code, 0, "it was switched back");
        Ok(())
    })
}
