//! Limits of memory, processors and processes: they hold inside, and the host notices nothing (A6).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bailey_e2e::ctr::Run;
use bailey_e2e::images::{base, busybox};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::process::Running;
use bailey_e2e::settings::only_ours;

use crate::files::with_spec;

const EVENT: Duration = Duration::from_secs(30);

/// `ctr events`, once it listens.
pub(crate) fn events(machine: &Machine) -> Result<Running> {
    let events = machine.start_ctr(&["events"])?;
    // It says nothing when it is ready; an event that nobody minds shows that it is.
    bailey_e2e::wait::until_true("events", EVENT, || {
        machine.ctr(&["namespaces", "label", machine.containerd.namespace(), "poke=1"])?.success()?;
        Ok(events.heard().contains("/namespaces/update"))
    })?;
    Ok(events)
}

#[test]
fn too_much_memory_ends_the_process_and_is_told() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let events = events(machine)?;
        // Doubles a string until there is no more memory.
        let script = "x=0123456789abcdef; while :; do x=$x$x; done";
        machine.run(image).memory_mib(48).sh(&format!("exec sh -c '{script}'")).output()?.expect(137)?;
        events.wait_for("/tasks/oom", EVENT)?;
        Ok(())
    })
}

#[test]
fn a_child_that_takes_too_much_memory_leaves_its_parent() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let script = "sh -c 'x=0123456789abcdef; while :; do x=$x$x; done' 2>/dev/null; echo child $?";
        let output = machine.run(image).memory_mib(48).sh(script).output()?.success()?;
        assert_eq!(output.text(), "child 137\n");
        Ok(())
    })
}

#[test]
fn too_many_processes_fail_inside() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        // The shell gives up when it cannot fork: its message is the outcome.
        let script = "i=0; while [ $i -lt 100 ]; do sleep 60 & i=$((i+1)); done; echo all";
        let output = with_spec(machine, image, &busybox(), script, |spec| {
            spec["linux"]["resources"]["pids"] = serde_json::json!({"limit": 20});
        })?;
        assert!(output.errors().contains("can't fork"), "{}", output.errors());
        assert!(!output.text().contains("all"), "{}", output.text());
        Ok(())
    })
}

#[test]
fn a_fork_bomb_stays_inside() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let before = processes()?;
        let script = "echo begun; b() { b | b & }; b 2>/dev/null; sleep 3";
        let output = with_spec(machine, image, &busybox(), script, |spec| {
            spec["linux"]["resources"]["pids"] = serde_json::json!({"limit": 32});
        })?;
        assert!(output.text().starts_with("begun"), "{}", output.errors());
        let after = processes()?;
        assert!(after < before + 200, "{before} processes before, {after} after: {output:?}");
        Ok(())
    })
}

#[test]
fn processor_time_is_bounded() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        // Counts for two seconds of time, with and without a limit of a tenth of a processor.
        let script =
            "end=$(($(date +%s)+3)); n=0; while [ $(date +%s) -lt $end ]; do n=$((n+1)); done; echo $n";
        let count =
            |run: Run<'_>| -> Result<u64> { Ok(run.sh(script).output()?.success()?.text().trim().parse()?) };
        let free = count(machine.run(image))?;
        let bounded = count(machine.run(image).option("--cpus", "0.1"))?;
        assert!(bounded * 2 < free, "{bounded} rounds with a tenth of a processor, {free} with all of it");
        Ok(())
    })
}

#[test]
fn memory_up_to_the_limit_can_be_used() -> Result<()> {
    test_with(&base(), |machine, image| {
        // Python itself takes ten of them, and a kernel's books for it count, too: some kernels need a few more.
        let script = "python3 -c 'b = bytearray(b\"x\") * (44 << 20); print(len(b) >> 20)'; \
            python3 -c 'b = bytearray(b\"x\") * (80 << 20); print(len(b) >> 20)'; echo code $?; exec sleep 1000";
        let mut task = machine.run(image).memory_mib(64).sh(script).start()?;
        assert_eq!(task.wait_for("code ")?.lines().next(), Some("44"));
        assert!(task.wait_for("\ncode 137\n")?.starts_with("44\ncode"));
        assert_eq!(task.sh("echo still here")?.success()?.text(), "still here\n");
        task.end()?.expect(137).map(drop)
    })
}

#[test]
fn writing_is_as_slow_as_asked() -> Result<()> {
    if !only_ours("its annotation") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        // Nobody waits for what a sandbox only has in its memory: its files end with it.
        let script = "dd if=/dev/zero of=/file bs=64k count=64 oflag=direct 2>/dev/null";
        let free = seconds_inside(machine.run(image), script)?;
        let bounded = machine.run(image).annotation("dev.bailey.io.write-bps", "1MiB");
        let bounded = seconds_inside(bounded, script)?;
        assert!(bounded >= 3.0 && bounded > free + 2.0, "{bounded} s with a limit, {free} s without");
        Ok(())
    })
}

#[test]
fn reading_is_as_slow_as_asked() -> Result<()> {
    if !only_ours("its annotation") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let write = "dd if=/dev/zero of=/file bs=64k count=64 conv=fsync 2>/dev/null";
        let script = "dd if=/file of=/dev/null bs=64k iflag=direct 2>/dev/null";
        let seconds = |run: Run<'_>| seconds_inside_after(run, write, script);
        let free = seconds(machine.run(image))?;
        let bounded = seconds(machine.run(image).annotation("dev.bailey.io.read-bps", "1MiB"))?;
        assert!(bounded >= 3.0 && bounded > free + 2.0, "{bounded} s with a limit, {free} s without");
        Ok(())
    })
}

/// How long a script takes in a container.
fn seconds_inside(run: Run<'_>, script: &str) -> Result<f64> {
    seconds_inside_after(run, ":", script)
}

/// How long a script takes in a container, once another one is done.
fn seconds_inside_after(run: Run<'_>, before: &str, script: &str) -> Result<f64> {
    let uptime = "cut -d ' ' -f 1 /proc/uptime";
    let script = format!("set -e; {before}; {uptime}; {script}; {uptime}");
    let text = run.sh(&script).output()?.success()?.text();
    let times: Vec<f64> = text.lines().map(str::parse).collect::<Result<_, _>>().context(text.clone())?;
    Ok(times[1] - times[0])
}

#[test]
fn output_is_as_slow_as_asked() -> Result<()> {
    if !only_ours("its annotation") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let script = "echo begin; seq 10000 | head -c 40960; echo; echo end; exec sleep 1000";
        let timed = |run: Run<'_>| -> Result<(Duration, String)> {
            let mut task = run.sh(script).start()?;
            task.wait_for("begin\n")?;
            let begun = Instant::now();
            let text = task.wait_for("\nend\n")?;
            let took = begun.elapsed();
            task.end()?;
            Ok((took, text))
        };
        let (free, expected) = timed(machine.run(image))?;
        let (bounded, got) = timed(machine.run(image).annotation("dev.bailey.log-rate", "5KiB"))?;
        assert!(got == expected, "{} bytes instead of {}", got.len(), expected.len());
        let least = Duration::from_secs(3);
        assert!(bounded >= least && bounded > free + least / 2, "{bounded:?}, and {free:?} without");
        Ok(())
    })
}

#[test]
fn slow_output_is_complete_after_the_end() -> Result<()> {
    if !only_ours("its annotation") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let run = machine.run(image).annotation("dev.bailey.log-rate", "10KiB");
        let output = run.sh("seq 10000 > /x; dd if=/x bs=1024 count=40 2>/dev/null").output()?.success()?;
        assert_eq!(output.stdout.len(), 40960);
        Ok(())
    })
}

fn processes() -> Result<usize> {
    let names = std::fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name());
    Ok(names.filter(|name| name.to_string_lossy().parse::<u32>().is_ok()).count())
}
