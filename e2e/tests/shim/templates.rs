//! Templates: one for each tenant and shape, renewed in time, and gone when nobody needs them (A5).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bailey_e2e::images::{Image, busybox};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::settings::{self, only_ours};
use bailey_e2e::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(30);

/// A test with templates that live as these settings say.
fn with_templates(
    settings: &[(&str, &str)],
    body: impl FnOnce(&mut Machine, &Image) -> Result<()>,
) -> Result<()> {
    if !only_ours("runc has no templates") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        machine.containerd.set_shim(&[("start", "\"warm\"")])?;
        machine.containerd.set_shim(settings)?;
        body(machine, image)
    })
}

/// Runs a container, which must work.
fn run(machine: &Machine, image: &Image) -> Result<()> {
    let text = machine.run(image).args(&["echo", "ran"]).output()?.success()?.text();
    ensure!(text == "ran\n", "it said {text:?}");
    Ok(())
}

/// The keepers of a namespace's templates that serve.
fn keepers(namespace: &str) -> Result<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("listing processes")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // Processes end while we look; one that has ended has no command line.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let has = |word: &str| words.iter().any(|found| found == word);
        if has("keep-template") && has(namespace) {
            found.insert(pid);
        }
    }
    Ok(found)
}

/// The one keeper that there is.
fn keeper(machine: &Machine) -> Result<i32> {
    let found = keepers(machine.containerd.namespace())?;
    ensure!(found.len() == 1, "not one keeper, but {found:?}");
    Ok(found.into_iter().next().unwrap_or_default())
}

fn until_gone(machine: &Machine, pid: i32) -> Result<()> {
    wait::until_true("the end of a keeper", SOON, || {
        Ok(!keepers(machine.containerd.namespace())?.contains(&pid))
    })
}

/// The sockets that keepers of a namespace listen on.
fn sockets(machine: &Machine, namespace: &str) -> Vec<PathBuf> {
    let folder = machine.containerd.shim_state_dir().join("templates").join(namespace);
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "sock")).collect()
}

#[test]
fn one_serves_many() -> Result<()> {
    with_templates(&[], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        run(machine, image)?;
        run(machine, image)?;
        assert_eq!(keeper(machine)?, first);
        Ok(())
    })
}

#[test]
fn another_shape_is_another_template() -> Result<()> {
    with_templates(&[], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        machine.run(image).memory_mib(64).args(&["true"]).output()?.success()?;
        let both = keepers(machine.containerd.namespace())?;
        assert!(both.len() == 2 && both.contains(&first), "{first}, then {both:?}");
        Ok(())
    })
}

#[test]
fn it_is_renewed_after_its_last_clone() -> Result<()> {
    with_templates(&[("template_max_clones", "2")], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        run(machine, image)?;
        until_gone(machine, first)?;
        assert_eq!(sockets(machine, machine.containerd.namespace()), Vec::<PathBuf>::new());
        run(machine, image)?;
        assert_ne!(keeper(machine)?, first);
        Ok(())
    })
}

#[test]
fn it_is_renewed_when_it_is_old() -> Result<()> {
    with_templates(&[("template_max_age_seconds", "8")], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        until_gone(machine, first)?;
        run(machine, image)?;
        assert_ne!(keeper(machine)?, first);
        Ok(())
    })
}

#[test]
fn use_does_not_make_it_younger() -> Result<()> {
    with_templates(&[("template_max_age_seconds", "8")], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        wait::until_true("another keeper", SOON, || {
            run(machine, image)?;
            Ok(!keepers(machine.containerd.namespace())?.contains(&first))
        })
    })
}

#[test]
fn it_ends_when_nobody_uses_it() -> Result<()> {
    with_templates(&[("template_max_idle_seconds", "1")], |machine, image| {
        run(machine, image)?;
        let namespace = machine.containerd.namespace();
        wait::until_true("the end of an idle keeper", SOON, || Ok(keepers(namespace)?.is_empty()))?;
        assert_eq!(sockets(machine, namespace), Vec::<PathBuf>::new());
        run(machine, image)
    })
}

#[test]
fn a_killed_one_is_replaced() -> Result<()> {
    with_templates(&[], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        kill(Pid::from_raw(first), Signal::SIGKILL)?;
        until_gone(machine, first)?;
        run(machine, image)?;
        assert_ne!(keeper(machine)?, first);
        Ok(())
    })
}

#[test]
fn what_was_cloned_outlives_it() -> Result<()> {
    with_templates(&[], |machine, image| {
        let mut task = machine.run(image).sh("echo up; cat").start()?;
        task.wait_for("up\n")?;
        kill(Pid::from_raw(keeper(machine)?), Signal::SIGKILL)?;
        assert_eq!(task.sh("echo still here")?.success()?.text(), "still here\n");
        task.end()?.expect(137).map(drop)
    })
}

#[test]
fn a_cold_start_needs_none() -> Result<()> {
    with_templates(&[], |machine, image| {
        let cold = machine.run(image).annotation("dev.bailey.start", "cold");
        cold.args(&["true"]).output()?.success()?;
        assert_eq!(keepers(machine.containerd.namespace())?, BTreeSet::new());
        // The annotation says more than the settings, both ways.
        machine.containerd.set_shim(&[("start", "\"cold\"")])?;
        run(machine, image)?;
        assert_eq!(keepers(machine.containerd.namespace())?, BTreeSet::new());
        let warm = machine.run(image).annotation("dev.bailey.start", "warm");
        warm.args(&["true"]).output()?.success()?;
        keeper(machine).map(drop)
    })
}

#[test]
fn namespaces_share_none() -> Result<()> {
    with_templates(&[], |machine, image| {
        run(machine, image)?;
        let first = keeper(machine)?;
        // Its name holds this containerd's, so that what it leaves is found.
        let other = format!("{}-b", machine.containerd.namespace());
        let archive = image.archive.to_string_lossy();
        let (runtime, snapshotter) = (settings::runtime(), settings::snapshotter());
        machine.ctr_in(&other, &["images", "import", "--snapshotter", &snapshotter, &archive])?.success()?;
        let run = ["run", "--rm", "--runtime", &runtime, "--snapshotter", &snapshotter, &image.reference];
        let said = machine.ctr_in(&other, &[&run[..], &["other", "echo", "ran"]].concat())?.success()?;
        assert_eq!(said.text(), "ran\n");
        let others = keepers(&other)?;
        assert!(others.len() == 1 && !others.contains(&first), "{first} and {others:?}");
        assert_eq!(keeper(machine)?, first);
        let (here, there) = (sockets(machine, machine.containerd.namespace()), sockets(machine, &other));
        assert!(here.len() == 1 && there.len() == 1, "{here:?} and {there:?}");
        end_keeper(&there[0], &other, others.into_iter().next().unwrap_or_default())
    })
}

/// Ends the keeper of a namespace that the machine does not know.
fn end_keeper(socket: &Path, namespace: &str, pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    wait::until_true("the end of a keeper", SOON, || Ok(keepers(namespace)?.is_empty()))?;
    fs::remove_file(socket).with_context(|| format!("removing {}", socket.display()))?;
    let Some(folder) = socket.parent() else { bail!("{} is in no folder", socket.display()) };
    fs::remove_dir(folder).with_context(|| format!("removing {}", folder.display()))
}
