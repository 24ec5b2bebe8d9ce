//! What a sandbox takes when the limits inside it are gone, and what its neighbour is left with (A6).

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::ctr::{Run, Task};
use bailey_e2e::images::{Image, busybox};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::on_host::OnHost;
use bailey_e2e::settings::only_ours;
use bailey_e2e::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(60);

/// Takes the container's limits away from inside, which a privileged one can, and says what is left of them.
const LIFT: &str = "mkdir /c && mount -t cgroup2 none /c && \
    for f in memory.max pids.max cpu.max; do echo max >/c/$f; cut -d ' ' -f 1 /c/$f; done; ";

/// A sandbox that has its share and is asked from time to time whether it is well.
fn neighbour<'m>(machine: &'m Machine, image: &Image) -> Result<Task<'m>> {
    let task = machine.run(image).memory_mib(64).sh("echo up; exec sleep 1000").start()?;
    task.wait_for("up\n")?;
    Ok(task)
}

fn goes_on(neighbour: &Task<'_>) -> Result<()> {
    let text = neighbour.exec(&["echo", "well"]).limit(SOON).output()?.success()?.text();
    ensure!(text == "well\n", "the neighbour said {text:?}");
    Ok(())
}

/// A privileged container with limits, which lifts them and then runs a script.
fn unbounded_inside<'m>(run: Run<'m>, script: &str) -> Result<Task<'m>> {
    let task = run.flag("--privileged").sh(&format!("exec 2>&1; {LIFT} echo lifted; {script}")).start()?;
    let said = task.wait_for("lifted\n")?;
    ensure!(said == "max\nmax\nmax\nlifted\n", "the limits inside are still there: {said}");
    Ok(task)
}

fn ours(body: impl FnOnce(&mut Machine, &Image) -> Result<()>) -> Result<()> {
    if !only_ours("the VMM around a container") {
        return Ok(());
    }
    test_with(&busybox(), body)
}

#[test]
fn memory_without_limits_inside_is_that_of_the_machine() -> Result<()> {
    ours(|machine, image| {
        let neighbour = &mut neighbour(machine, image)?;
        // What lies in a filesystem in memory cannot be freed by killing anybody: the worst that a guest can do.
        let script =
            "mkdir /m; mount -t tmpfs -o size=8g none /m; sleep 1; exec dd if=/dev/zero of=/m/x bs=64k";
        let mut task = unbounded_inside(machine.run(image).memory_mib(64), script)?;
        let host = OnHost::of(&task)?;
        let limit = host.number(["memory.max", "memory.limit_in_bytes"])?;
        let mut peak = 0;
        wait::until_true("the end of what eats all memory", SOON, || {
            // The cgroup goes with the sandbox.
            peak = host.number(["memory.current", "memory.usage_in_bytes"]).unwrap_or(0).max(peak);
            Ok(task.streams()?.has_ended())
        })?;
        // All that the machine has, of which it was given 64 MiB for itself.
        ensure!(peak > 128 << 20, "it took only {peak} bytes");
        ensure!(peak <= limit, "{peak} bytes, the limit was {limit}");
        ensure!(task.wait()?.code != 0, "it wrote 8 GiB");
        goes_on(neighbour)?;
        neighbour.end().map(drop)
    })
}

#[test]
fn processors_without_limits_inside_are_limited_outside() -> Result<()> {
    ours(|machine, image| {
        const PERIOD_US: u64 = 100_000;
        const QUOTA_US: u64 = 40_000;
        let neighbour = &mut neighbour(machine, image)?;
        let spin = "while :; do :; done & while :; do :; done";
        let mut task = unbounded_inside(machine.run(image).option("--cpus", "0.4"), spin)?;
        let host = OnHost::of(&task)?;
        let (begun, before) = (Instant::now(), host.cpu_us()?);
        goes_on(neighbour)?;
        std::thread::sleep(Duration::from_secs(3));
        let used = host.cpu_us()? - before;
        // A period that had begun, one that has just begun, and what each processor may hold of a quota: 5 ms.
        let processors = u64::try_from(std::thread::available_parallelism()?.get())?;
        let elapsed = u64::try_from(begun.elapsed().as_micros())?;
        let most = (elapsed / PERIOD_US + 2) * QUOTA_US + processors * 5_000;
        ensure!(used <= most, "{used} us in {elapsed} us, at most {most}");
        ensure!(used > QUOTA_US, "it did not spin: {used} us");
        task.end()?;
        neighbour.end().map(drop)
    })
}

#[test]
fn a_fork_bomb_without_limits_inside_is_no_process_of_the_host() -> Result<()> {
    ours(|machine, image| {
        let neighbour = &mut neighbour(machine, image)?;
        let bomb = "i=0; while [ $i -lt 300 ]; do sleep 1000 & i=$((i+1)); done; echo forked; wait";
        let mut task = unbounded_inside(machine.run(image).memory_mib(256), bomb)?;
        task.wait_for("forked\n")?;
        let host = OnHost::of(&task)?;
        let (now, most) = (host.number(["pids.current"; 2])?, host.number(["pids.max"; 2])?);
        // More processes inside than the host lets the VMM have: they are none of its.
        ensure!(now <= most && most < 300, "{now} of at most {most}");
        goes_on(neighbour)?;
        task.end()?;
        neighbour.end().map(drop)
    })
}

#[test]
fn a_silent_guest_keeps_no_other_waiting() -> Result<()> {
    ours(|machine, image| {
        let neighbour = &mut neighbour(machine, image)?;
        let mut silent = machine.run(image).sh("echo up; exec sleep 1000").start()?;
        silent.wait_for("up\n")?;
        let vmm: i32 = silent.pid()?.context("the task has no process")?.parse()?;
        kill(Pid::from_raw(vmm), Signal::SIGSTOP).context("silencing a guest")?;
        let asked = silent.exec(&["echo", "too late"]).start()?;
        for _ in 0..3 {
            goes_on(neighbour)?;
            let another = machine.run(image).args(&["echo", "ran"]).output()?.success()?;
            ensure!(another.text() == "ran\n", "another one said {another:?}");
        }
        ensure!(!asked.has_ended(), "it was answered: {}", asked.all_heard());
        kill(Pid::from_raw(vmm), Signal::SIGCONT).context("letting a guest go on")?;
        ensure!(asked.wait(SOON)?.success()?.text() == "too late\n", "the guest has not gone on");
        silent.end()?;
        neighbour.end().map(drop)
    })
}

#[test]
fn scratch_disks_promise_no_more_than_there_is() -> Result<()> {
    ours(|machine, image| {
        let cache = machine.containerd.shim_cache_dir();
        fs::create_dir_all(&cache)?;
        let mut mount = machine.containerd.command("mount");
        let size = ["-t", "tmpfs", "-o", "size=200m,mode=755", "tmpfs"];
        bailey_e2e::process::text_of(mount.args(size).arg(&cache), SOON)?;
        machine.containerd.set_shim(&[("scratch_overcommit", "1")])?;
        let of = |size: &str| machine.run(image).annotation("dev.bailey.scratch", size);
        let mut first = of("100MiB").sh("echo up; exec sleep 1000").start()?;
        first.wait_for("up\n")?;
        // Half of it is promised, and almost nothing is written.
        let output = of("100MiB").args(&["true"]).output()?;
        let said = output.errors();
        for word in
            ["104857600 bytes (100 MiB)", "are free", "dev.bailey.scratch", "scratch_overcommit", "ENOSPC"]
        {
            ensure!(output.code != 0 && said.contains(word), "it does not say {word:?}: {said}");
        }
        of("16MiB").args(&["true"]).output()?.success()?;
        // Who wants to promise more can.
        machine.containerd.set_shim(&[("scratch_overcommit", "4")])?;
        of("100MiB").args(&["true"]).output()?.success()?;
        first.end()?;
        // What waits for the next sandbox has files there, too.
        machine.drop_templates()?;
        let umount = &mut machine.containerd.command("umount");
        bailey_e2e::process::text_of(umount.arg(&cache), SOON).map(drop)
    })
}
