//! Limits of memory, processors and processes: they hold inside, and the host notices nothing (A6).

use std::time::Duration;

use anyhow::Result;
use bailey_e2e::images::busybox;
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::process::Running;

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
        let count = |run: bailey_e2e::ctr::Run<'_>| -> Result<u64> {
            Ok(run.sh(script).output()?.success()?.text().trim().parse()?)
        };
        let free = count(machine.run(image))?;
        let bounded = count(machine.run(image).option("--cpus", "0.1"))?;
        assert!(bounded * 2 < free, "{bounded} rounds with a tenth of a processor, {free} with all of it");
        Ok(())
    })
}

fn processes() -> Result<usize> {
    let names = std::fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name());
    Ok(names.filter(|name| name.to_string_lossy().parse::<u32>().is_ok()).count())
}
