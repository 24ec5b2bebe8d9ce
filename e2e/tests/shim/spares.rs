//! Spares: VMs that are up before it is known what they run. A sandbox that starts in one is like any other (A5).

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::images::{Image, busybox};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::settings::only_ours;
use bailey_e2e::spares::{spare, waiting};
use bailey_e2e::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::walls::scratch_disk;

const SOON: Duration = Duration::from_secs(60);

/// A test in which the first sandbox has run, so that spares come.
fn with_spares(
    settings: &[(&str, &str)],
    body: impl FnOnce(&mut Machine, &Image) -> Result<()>,
) -> Result<()> {
    if !only_ours("runc has no spares") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        machine.containerd.set_shim(&[("start", "\"warm\"")])?;
        machine.containerd.set_shim(settings)?;
        run(machine, image)?;
        body(machine, image)
    })
}

fn run(machine: &Machine, image: &Image) -> Result<()> {
    let text = machine.run(image).args(&["echo", "ran"]).output()?.success()?.text();
    ensure!(text == "ran\n", "it said {text:?}");
    Ok(())
}

fn parent(pid: &str) -> Result<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("reading about a process")?;
    let (_, rest) = stat.rsplit_once(") ").context("reading about a process")?;
    rest.split(' ').nth(1).context("finding a parent")?.parse().context("reading a parent")
}

/// The process that one of a process's threads has started.
fn child(pid: i32) -> Result<i32> {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("listing threads")? {
        let children = fs::read_to_string(thread?.path().join("children")).context("listing children")?;
        if let Some(child) = children.split_whitespace().next() {
            return child.parse().context("reading a process id");
        }
    }
    anyhow::bail!("the process {pid} has started none")
}

fn until_gone(pid: i32) -> Result<()> {
    // One that nobody has reaped yet has no command line any more.
    let line = || fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    wait::until_true("the end of a spare", SOON, || Ok(line().is_empty()))
}

#[test]
fn a_sandbox_starts_in_one_and_the_next_comes() -> Result<()> {
    with_spares(&[], |machine, image| {
        let first = spare(machine)?;
        let mut task = machine.run(image).sh("echo up; cat").start()?;
        task.wait_for("up\n")?;
        let vmm = task.pid()?.context("the task has no process")?;
        assert_eq!(parent(&vmm)?, first, "the sandbox's VMM belongs to another process than the spare");
        assert_eq!(task.sh("hostname; cat /proc/1/cmdline")?.success()?.code, 0);
        let second = spare(machine)?;
        assert_ne!(first, second);
        // It goes on without the keeper that made it.
        machine.drop_templates()?;
        until_gone(second)?;
        assert_eq!(task.sh("echo still here")?.success()?.text(), "still here\n");
        task.end()?.expect(137).map(drop)
    })
}

#[test]
fn two_of_them_share_nothing_and_show_nothing_of_what_came_before() -> Result<()> {
    with_spares(&[], |machine, image| {
        // Randomness of the kernel and of processes; then what a rehearsal could have left in the guest.
        let script = "head -c 16 /dev/urandom | hexdump -e '16/1 \"%02x\" \"\\n\"'; \
            cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
            grep -E 'stack|heap' /proc/self/maps | cut -d- -f1; hexdump -C /proc/self/auxv | md5sum; \
            echo =; ls -d /sys/block/dm-* | wc -l; ls / /tmp; wc -l </proc/mounts; date +%s";
        let mut seen = Vec::new();
        for _ in 0..2 {
            let pid = spare(machine)?;
            let text = machine.run(image).flag("--privileged").sh(script).output()?.success()?.text();
            until_gone(pid)?;
            let (random, same) = text.split_once("=\n").context("the script was cut short")?;
            seen.push((random.lines().map(str::to_owned).collect::<Vec<_>>(), same.to_owned()));
        }
        let cold = machine.run(image).flag("--privileged").annotation("dev.bailey.start", "cold");
        let cold = cold.sh(script).output()?.success()?.text();
        let (_, cold) = cold.split_once("=\n").context("the script was cut short")?;
        let apart = |text: &str| -> Result<(String, u64)> {
            let (text, clock) = text.trim().rsplit_once('\n').context("the script was cut short")?;
            Ok((text.to_owned(), clock.parse()?))
        };
        let now = std::time::UNIX_EPOCH.elapsed()?.as_secs();
        for (_, same) in &seen {
            let (left, clock) = apart(same)?;
            assert_eq!(left, apart(cold)?.0, "a booted sandbox shows something else");
            assert!(now.abs_diff(clock) < 60, "its clock says {clock}, and it is {now}");
        }
        assert!(seen[0].0.len() >= 5, "{seen:?}");
        for (one, other) in seen[0].0.iter().zip(&seen[1].0) {
            assert_ne!(one, other, "the same in two sandboxes");
        }
        Ok(())
    })
}

#[test]
fn a_killed_one_is_no_loss() -> Result<()> {
    with_spares(&[], |machine, image| {
        let first = spare(machine)?;
        kill(Pid::from_raw(first), Signal::SIGKILL)?;
        until_gone(first)?;
        run(machine, image)?;
        assert_ne!(spare(machine)?, first);
        Ok(())
    })
}

#[test]
fn one_whose_vmm_was_killed_is_no_loss() -> Result<()> {
    with_spares(&[], |machine, image| {
        let first = spare(machine)?;
        let vmm = child(first)?;
        kill(Pid::from_raw(vmm), Signal::SIGKILL)?;
        run(machine, image)?;
        until_gone(first)?;
        run(machine, image)
    })
}

#[test]
fn it_ends_with_its_keeper() -> Result<()> {
    with_spares(&[], |machine, _| {
        let first = spare(machine)?;
        kill(Pid::from_raw(parent(&first.to_string())?), Signal::SIGKILL)?;
        until_gone(first)
    })
}

#[test]
fn it_ends_when_no_sandbox_follows() -> Result<()> {
    with_spares(&[("spare_max_idle_seconds", "4")], |machine, image| {
        let first = spare(machine)?;
        until_gone(first)?;
        assert_eq!(waiting(machine)?, BTreeSet::new());
        run(machine, image)?;
        spare(machine).map(drop)
    })
}

#[test]
fn there_are_as_many_as_the_settings_say() -> Result<()> {
    with_spares(&[("spares", "2")], |machine, image| {
        wait::until_true("two spares", SOON, || Ok(waiting(machine)?.len() == 2))?;
        machine.drop_templates()?;
        machine.containerd.set_shim(&[("spares", "0")])?;
        run(machine, image)?;
        // Longer than it would take to begin one.
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(waiting(machine)?, BTreeSet::new());
        Ok(())
    })
}

#[test]
fn limits_of_disk_and_memory_hold_in_one() -> Result<()> {
    with_spares(&[], |machine, image| {
        spare(machine)?;
        let limited = machine.run(image).annotation("dev.bailey.io.write-bps", "1MiB");
        let limited = limited.annotation("dev.bailey.scratch", "12MiB");
        // Past the VM's memory; by a clock that no load of the machine makes faster.
        let script = "s=$(date +%s); dd if=/dev/zero of=/f bs=64k count=64 oflag=direct 2>/dev/null; e=$(date +%s); \
            echo $((e - s)); dd if=/dev/zero of=/g bs=1M count=20 2>&1 | grep -c 'No space'";
        let text = limited.sh(script).output()?.text();
        let mut lines = text.lines();
        let seconds: u64 = lines.next().context("no time was told")?.parse()?;
        assert!(seconds >= 2, "4 MiB at 1 MiB/s took {seconds} s");
        assert_eq!(lines.next(), Some("1"), "the scratch disk has no end: {text}");
        Ok(())
    })
}

#[test]
fn what_is_beyond_the_scratch_disk_cannot_be_written() -> Result<()> {
    with_spares(&[], |machine, image| {
        for start in ["warm", "cold"] {
            if start == "warm" {
                spare(machine)?;
            }
            let task = machine.run(image).flag("--privileged").annotation("dev.bailey.start", start);
            let mut task = task.annotation("dev.bailey.scratch", "16MiB").sh("echo up; cat").start()?;
            task.wait_for("up\n")?;
            let disk = scratch_disk(&task.pid()?.context("the task has no process")?)?;
            // The guest's kernel may believe in a larger disk; what it asks for goes to the VMM.
            for block in [4096_u64, 1 << 20, (1 << 28) - 1] {
                let write = format!(
                    "for disk in /dev/vda /dev/vdb; do \
                     dd if=/dev/urandom of=$disk bs=4096 count=1 seek={block} conv=fsync,notrunc; done; true"
                );
                task.sh(&write)?.success()?;
                assert_eq!(fs::metadata(&disk)?.len(), 16 << 20, "{start}: block {block} has made it grow");
            }
            task.end()?.expect(137)?;
        }
        Ok(())
    })
}
