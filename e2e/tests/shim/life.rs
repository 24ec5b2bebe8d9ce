//! From create to delete: exec, signals, pause, events, and what happens when containerd or the shim ends (A3).

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use bailey_e2e::images::busybox;
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::settings::only_ours;
use bailey_e2e::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::limits::events;

const SOON: Duration = Duration::from_secs(60);
/// Runs until it is told to end, and then does so at once.
const WAIT: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 1000 & wait $!; done";

#[test]
fn exec_has_its_own_streams_code_folder_and_user() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).env("A=1").sh(WAIT).start()?;
        task.wait_for("up\n")?;
        let output = task.sh("echo out; echo err >&2; exit 7")?.expect(7)?;
        assert_eq!((output.text().as_str(), output.errors().as_str()), ("out\n", "err\n"));
        assert_eq!(task.exec(&["cat"]).input("to exec").output()?.success()?.text(), "to exec");
        assert_eq!(task.exec(&["pwd"]).option("--cwd", "/var/tmp").output()?.success()?.text(), "/var/tmp\n");
        assert_eq!(task.exec(&["id", "-u"]).option("--user", "app").output()?.success()?.text(), "1000\n");
        let text = task.exec(&["sh", "-c", "echo $A; ls /proc"]).output()?.success()?.text();
        assert!(text.starts_with("1\n1\n"), "the container's environment and processes: {text}");
        let unknown = task.exec(&["no-such-command"]).output()?;
        assert_ne!(unknown.code, 0);
        assert!(unknown.errors().contains("no-such-command"), "{}", unknown.errors());
        task.end()?.expect(137).map(drop)
    })
}

#[test]
fn exec_with_a_terminal() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh(WAIT).start()?;
        let script = "test -t 0 && test -t 1 || exit 1; \
            for i in $(seq 400); do [ \"$(stty size 2>/dev/null)\" = '33 99' ] && exit 5; usleep 50000; done";
        task.exec(&["sh", "-c", script]).terminal(33, 99).output()?.expect(5)?;
        task.end().map(drop)
    })
}

#[test]
fn exec_can_be_killed_alone() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh(WAIT).start()?;
        let exec = task.exec(&["sh", "-c", "echo up; exec sleep 1000"]);
        let id = exec.id();
        let mut running = exec.start()?;
        running.wait_for("up\n", SOON)?;
        task.task("kill", &["--exec-id", &id, "--signal", "SIGKILL"])?.success()?;
        running.wait_open(SOON)?.expect(137)?;
        assert_eq!(task.state()?.as_deref(), Some("RUNNING"));
        task.end().map(drop)
    })
}

#[test]
fn several_execs_at_once() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh(WAIT).start()?;
        let script = "read x; head -c 300000 /dev/zero | tr '\\0' $x; echo; exit $x";
        let mut execs = Vec::new();
        for number in 1..=4 {
            let mut running = task.exec(&["sh", "-c", &format!("echo up; {script}")]).start()?;
            running.wait_for("up\n", SOON)?;
            running.say(&format!("{number}\n"))?;
            execs.push((number, running));
        }
        for (number, mut running) in execs {
            let output = running.wait_open(SOON)?.expect(number)?;
            assert_eq!(output.text(), format!("up\n{}\n", number.to_string().repeat(300_000)));
        }
        task.end().map(drop)
    })
}

#[test]
fn a_signal_reaches_its_handler() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let script =
            "trap 'echo got it; exit 42' TERM; trap 'echo usr' USR1; echo up; while :; do sleep 0.1; done";
        let mut task = machine.run(image).sh(script).start()?;
        task.wait_for("up\n")?;
        task.kill("SIGUSR1")?;
        task.wait_for("usr\n")?;
        task.kill("SIGTERM")?;
        assert!(task.wait()?.expect(42)?.text().ends_with("got it\n"));
        Ok(())
    })
}

#[test]
fn sigkill_ends_it_with_137() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh("trap '' TERM; echo up; while :; do sleep 0.1; done").start()?;
        task.wait_for("up\n")?;
        task.kill("SIGTERM")?;
        task.kill("SIGKILL")?;
        task.wait()?.expect(137).map(drop)
    })
}

#[test]
fn processes_and_measurements() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh("sleep 1000 & sleep 1000 & echo up; wait").start()?;
        task.wait_for("up\n")?;
        let list = task.task("ps", &[])?.success()?.text();
        assert!(list.lines().count() >= 4, "a head and three processes: {list}");
        let metrics = task.task("metrics", &["--format", "json"])?.success()?.text();
        let metrics: serde_json::Value = serde_json::from_str(&metrics).with_context(|| metrics.clone())?;
        let text = metrics.to_string();
        let says_something = ["memory", "pids", "cpu"].iter().all(|part| text.contains(part));
        assert!(says_something, "{text}");
        task.end().map(drop)
    })
}

#[test]
fn pause_stops_it_and_resume_lets_it_go_on() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task =
            machine.run(image).sh("n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done").start()?;
        task.wait_for("3\n")?;
        task.task("pause", &[])?.success()?;
        assert_eq!(task.state()?.as_deref(), Some("PAUSED"));
        let heard =
            |task: &mut bailey_e2e::ctr::Task<'_>| Ok::<_, anyhow::Error>(task.streams()?.heard().len());
        // What was on its way when the pause began may still arrive; then there is silence.
        let mut last = heard(&mut task)?;
        wait::until_true("silence", SOON, || {
            std::thread::sleep(Duration::from_millis(500));
            let now = heard(&mut task)?;
            Ok(std::mem::replace(&mut last, now) == now)
        })?;
        task.task("resume", &[])?.success()?;
        wait::until_true("more output", SOON, || Ok(heard(&mut task)? > last))?;
        let inside: u64 = task.sh("date +%s")?.success()?.text().trim().parse()?;
        let outside = std::time::UNIX_EPOCH.elapsed()?.as_secs();
        assert!(outside.abs_diff(inside) <= 3, "{inside} inside, {outside} outside");
        task.end().map(drop)
    })
}

#[test]
fn events_come_in_order() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let events = events(machine)?;
        let mut task = machine.run(image).sh(WAIT).start()?;
        task.wait_for("up\n")?;
        task.exec(&["true"]).output()?.success()?;
        task.kill("SIGTERM")?;
        task.wait()?.success()?;
        let text = events.wait_for("/containers/delete", SOON)?;
        let topics: Vec<&str> = text.split_whitespace().filter(|word| word.starts_with("/tasks/")).collect();
        let order = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"];
        assert_eq!(topics, order.map(|topic| format!("/tasks/{topic}")), "{text}");
        Ok(())
    })
}

#[test]
fn it_survives_containerd() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        test_with(&busybox(), |machine, image| survive(machine, image, signal))?;
    }
    Ok(())
}

fn survive(machine: &mut Machine, image: &bailey_e2e::images::Image, signal: Signal) -> Result<()> {
    let script = "trap 'echo bye; exit 9' TERM; while :; do echo tick; sleep 0.1; done";
    let id = machine.run(image).sh(script).detach()?.id;
    machine.containerd.restart(signal)?;
    let mut task = machine.found(&id);
    assert_eq!(task.state()?.as_deref(), Some("RUNNING"));
    assert_eq!(task.sh("echo still here")?.success()?.text(), "still here\n");
    task.attach()?;
    task.wait_for("tick\n")?;
    task.kill("SIGTERM")?;
    let text = task.wait()?.expect(9)?.text();
    assert!(text.ends_with("tick\nbye\n"), "{text}");
    machine.ctr(&["container", "rm", &id])?.success().map(drop)
}

#[test]
fn an_end_while_containerd_is_away_is_not_lost() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let id = machine.run(image).sh("sleep 1; exit 6").detach()?.id;
        machine.containerd.stop(Signal::SIGTERM)?;
        std::thread::sleep(Duration::from_millis(1500));
        machine.containerd.restart(Signal::SIGTERM)?;
        let task = machine.found(&id);
        wait::until_true("its end", SOON, || Ok(task.state()?.as_deref() == Some("STOPPED")))?;
        // ctr says the code, but does not end with it.
        let said = task.task("delete", &[])?.success()?.errors();
        assert!(said.contains("exit code 6"), "{said}");
        machine.ctr(&["container", "rm", &id])?.success().map(drop)
    })
}

#[test]
fn a_killed_shim_leaves_nothing() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh(WAIT).detach()?;
        if !only_ours("runc's processes go on without their shim") {
            return task.remove();
        }
        kill(shim_of(machine, &task.id)?, Signal::SIGKILL)?;
        wait::until_true("the end of the task", SOON, || {
            Ok(task.state()?.is_none_or(|state| state == "STOPPED" || state == "UNKNOWN"))
        })?;
        // containerd may have removed the task already, having seen the shim go.
        let _ = task.task("delete", &["--force"])?;
        machine.ctr(&["container", "rm", &task.id])?.success().map(drop)
    })
}

#[test]
fn templates_end_when_told() -> Result<()> {
    if !only_ours("runc has no templates") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        // Before there are any, and when there is one.
        machine.drop_templates()?;
        machine.run(image).args(&["true"]).output()?.success()?;
        machine.drop_templates()?;
        machine.run(image).args(&["true"]).output()?.success().map(drop)
    })
}

#[test]
fn a_container_can_be_deleted_without_being_started() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let snapshotter = bailey_e2e::settings::snapshotter();
        let runtime = bailey_e2e::settings::runtime();
        let words = ["container", "create", "--runtime", &runtime, "--snapshotter", &snapshotter];
        let words: Vec<&str> =
            words.into_iter().chain([image.reference.as_str(), "created", "true"]).collect();
        machine.ctr(&words)?.success()?;
        machine.ctr(&["container", "rm", "created"])?.success().map(drop)
    })
}

#[test]
fn the_containerd_is_the_one_to_be_tested() -> Result<()> {
    test_with(&busybox(), |machine, _| {
        let said = machine.ctr(&["version"])?.success()?.text();
        let versions: Vec<&str> =
            said.lines().filter_map(|line| line.trim().strip_prefix("Version:")).collect();
        assert!(versions.len() == 2 && versions[0] == versions[1], "ctr is of another version: {said}");
        let pid = machine.containerd.pid().context("containerd does not run")?;
        let program = fs::read_link(format!("/proc/{pid}/exe"))?;
        let folder = bailey_e2e::settings::containerd().unwrap_or_else(|| "/usr/bin".into());
        assert_eq!(program.parent(), Some(folder.as_path()));
        Ok(())
    })
}

/// The process that serves a container.
fn shim_of(machine: &Machine, id: &str) -> Result<Pid> {
    let folder = machine.containerd.socket().to_string_lossy().into_owned();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let serves = |word: &str| words.iter().any(|found| found == word);
        if words[0].contains("containerd-shim") && serves(id) && serves(&folder) {
            return Ok(Pid::from_raw(pid));
        }
    }
    Err(anyhow!("no shim serves {id}"))
}
