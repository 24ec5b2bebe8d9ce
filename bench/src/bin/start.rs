//! How long a container takes from `ctr run` to its end, for the peers and for us (goals P2 and P4).
//!
//! `start [ROUNDS]`: each round runs each of them once, one after the other. Then the first byte of output: from
//! `ctr task start` on a container that exists, so from the API's call.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bailey_bench::figures::Samples;
use bailey_bench::machine::{
    allow_container_class, log_steps, logged, root_folder, run_words, specification,
};
use bailey_bench::meter::Meter;
use bailey_bench::{count, say, say_machine};
use bailey_e2e::images::{self, Image};
use bailey_e2e::machine::{self, Machine};
use bailey_e2e::{process, spares};

const LIMIT: Duration = Duration::from_secs(60);
const OURS: &str = "io.containerd.bailey.v1";
const RUNC: &str = "io.containerd.runc.v2";
/// What the shim logs of a start, each followed by how long after the order it was.
const STEPS: [&str; 2] = ["a VM runs after ", "set up after "];
/// The first runs fill caches and make the template.
const WARM_UPS: usize = 1;

/// One of those that are compared.
struct Side {
    name: &'static str,
    runtime: Vec<String>,
    /// Flags that only `ctr run` has.
    flags: Vec<String>,
    wall: Samples,
    cpu: Samples,
    first_byte: Samples,
    failure: Option<String>,
    /// The root folder and the annotation of a container that is made from a specification.
    plain: Option<Plain>,
    /// Whether a spare is waited for before each run (ours alone).
    spare: bool,
}

type Plain = (PathBuf, Option<(&'static str, &'static str)>);

impl Side {
    fn new(name: &'static str, runtime: &[&str]) -> Self {
        let (wall, cpu, first_byte) = Default::default();
        Self {
            name,
            runtime: words(runtime),
            flags: Vec::new(),
            wall,
            cpu,
            first_byte,
            failure: None,
            plain: None,
            spare: false,
        }
    }

    /// The same with a spare that waits.
    fn with_spare(self) -> Self {
        Self { spare: true, ..self }
    }

    /// Lets the shim use a spare, which waits by then, or lets it use none.
    fn prepare(&self, machine: &Machine) -> Result<()> {
        machine.containerd.set_shim(&[("spares", if self.spare { "1" } else { "0" })])?;
        if self.spare { spares::spare(machine).map(drop) } else { Ok(()) }
    }

    /// The same with flags that only `ctr run` has.
    fn only_run(self, flags: &[&str]) -> Self {
        Self { flags: words(flags), ..self }
    }

    /// The same from a specification instead of an image, with users of its own.
    fn plain(self, plain: Plain) -> Self {
        Self { plain: Some(plain), ..self }
    }

    /// What `ctr` is told for one run.
    fn run_words(&self, machine: &Machine, image: &Image, id: &str) -> Result<Vec<String>> {
        let runtime: Vec<&str> = self.runtime.iter().map(String::as_str).collect();
        if let Some((root, annotation)) = &self.plain {
            let spec = specification(machine, root, id, *annotation)?.display().to_string();
            return Ok(words(&["run", "--rm", "--runtime", &runtime.join(" "), "--config", &spec, id]));
        }
        let flags: Vec<&str> = ["--rm"].into_iter().chain(self.flags.iter().map(String::as_str)).collect();
        let mut words = run_words(&runtime, &flags, image, id);
        words.push("/bin/true".to_owned());
        Ok(words)
    }

    /// One run of `/bin/true`, from the call of `ctr` to its end.
    fn run(&mut self, machine: &Machine, image: &Image, id: &str, counts: bool) -> Result<()> {
        let words = self.run_words(machine, image, id)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.prepare(machine)?;
        let meter = Meter::start(machine)?;
        let begun = Instant::now();
        machine.ctr(&words)?.success()?;
        let wall = begun.elapsed();
        let cpu = meter.stop(machine)?;
        if counts {
            self.wall.add_time(wall);
            // A spare's time was mostly spent before, and is its keeper's child's: it is not in what was counted.
            if !self.spare {
                self.cpu.add(cpu);
            }
        }
        Ok(())
    }

    /// Whether `ctr container create` can make it, too.
    fn is_createable(&self) -> bool {
        self.failure.is_none() && self.flags.is_empty() && self.plain.is_none()
    }

    /// From `ctr task start` to the first byte that the container's program writes.
    fn first_byte(&mut self, machine: &Machine, image: &Image, id: &str) -> Result<()> {
        let runtime: Vec<&str> = self.runtime.iter().map(String::as_str).collect();
        let mut words = run_words(&runtime, &[], image, id);
        words.remove(0);
        words.extend(["/bin/echo", "here"].map(str::to_owned));
        let words: Vec<&str> =
            ["container", "create"].into_iter().chain(words.iter().map(String::as_str)).collect();
        machine.ctr(&words)?.success()?;
        self.prepare(machine)?;
        let begun = Instant::now();
        let mut ctr = machine.start_ctr(&["task", "start", id])?;
        ctr.wait_for("h", LIMIT)?;
        self.first_byte.add_time(begun.elapsed());
        ctr.wait_open(LIMIT)?.success()?;
        machine.ctr(&["container", "rm", id])?.success().map(drop)
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn main() -> Result<()> {
    let rounds = count(7)?;
    say_machine();
    machine::test_with(&images::busybox(), |machine, image| {
        let mut sides = sides(machine)?;
        let mut number = 0;
        // Makes the template; its keeper keeps to the settings of this moment.
        machine.containerd.set_shim(&[("spares", "1")])?;
        machine.run(image).annotation("dev.bailey.start", "warm").args(&["/bin/true"]).output()?.success()?;
        for round in 0..WARM_UPS + rounds {
            for side in sides.iter_mut().filter(|side| side.failure.is_none()) {
                number += 1;
                let done = side.run(machine, image, &format!("b{number}"), round >= WARM_UPS);
                drop_if_failed(side, done, round)?;
            }
        }
        for round in 0..rounds {
            for side in sides.iter_mut().filter(|side| side.is_createable()) {
                number += 1;
                let done = side.first_byte(machine, image, &format!("f{number}"));
                drop_if_failed(side, done.with_context(|| format!("round {round}")), 1)?;
            }
        }
        report(rounds, &sides, &client(machine, rounds)?);
        steps(machine, image, rounds)
    })
}

/// Where a warm start's time goes in our shim, by its own log; after all else, since logging costs time.
fn steps(machine: &mut Machine, image: &Image, rounds: usize) -> Result<()> {
    log_steps(machine)?;
    machine.containerd.set_shim(&[("spares", "1")])?;
    let mut samples = [Samples::default(), Samples::default()];
    for _ in 0..rounds {
        spares::spare(machine)?;
        let run = machine.run(image).annotation("dev.bailey.start", "warm").args(&["/bin/true"]);
        let times = logged(machine, STEPS, || run.output()?.success().map(drop))?;
        samples.iter_mut().zip(times).for_each(|(samples, time)| samples.add_time(time));
    }
    say("\nwarm, in the shim, from its order");
    for (step, samples) in STEPS.iter().zip(&samples) {
        say(format_args!("  {step:18}{samples}"));
    }
    Ok(())
}

/// A peer that does not work here is left out; one that stops working, and ourselves, are an error.
fn drop_if_failed(side: &mut Side, done: Result<()>, round: usize) -> Result<()> {
    match done {
        Err(error) if round == 0 && !side.name.starts_with("Bailey") => {
            side.failure = Some(format!("{error:#}").replace('\n', " "));
            Ok(())
        }
        other => other.with_context(|| side.name),
    }
}

fn sides(machine: &Machine) -> Result<Vec<Side>> {
    allow_container_class(machine)?;
    hide_unified(machine)?;
    let root = root_folder(machine, &images::busybox())?;
    let runsc = machine.containerd.folder().join("runsc");
    script(&runsc, "exec runsc --network=none --platform=ptrace --ignore-cgroups \"$@\"")?;
    let Some(runsc) = runsc.to_str() else { bail!("{} is no text", runsc.display()) };
    Ok(vec![
        Side::new("runc", &[RUNC]),
        Side::new("crun", &[RUNC]).only_run(&["--runc-binary", "crun"]),
        Side::new("runsc (ptrace)", &[RUNC]).only_run(&["--runc-binary", runsc]),
        Side::new("Bailey clone", &[OURS, "--annotation", "dev.bailey.start=warm"]),
        Side::new("Bailey warm", &[OURS, "--annotation", "dev.bailey.start=warm"]).with_spare(),
        Side::new("Bailey cold", &[OURS, "--annotation", "dev.bailey.start=cold"]),
        Side::new("runc, plain", &[RUNC]).plain((root.clone(), None)),
        Side::new("Bailey container", &[OURS]).plain((root, Some(("dev.bailey.class", "container")))),
    ])
}

/// crun refuses machines with cgroups of both versions: takes those of version 2 out of this containerd's view.
fn hide_unified(machine: &Machine) -> Result<()> {
    let unified = "/sys/fs/cgroup/unified";
    if Path::new(unified).join("cgroup.controllers").exists() {
        process::run(machine.containerd.command("umount").arg(unified), LIMIT)?.success()?;
    }
    Ok(())
}

fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).context("writing a script")?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("writing a script")
}

/// What `ctr` itself takes for one question to containerd; a part of every number.
fn client(machine: &Machine, rounds: usize) -> Result<Samples> {
    let mut samples = Samples::default();
    for _ in 0..rounds {
        let begun = Instant::now();
        machine.ctr(&["version"])?.success()?;
        samples.add_time(begun.elapsed());
    }
    Ok(samples)
}

fn report(rounds: usize, sides: &[Side], client: &Samples) {
    let Some(runc) = sides.first() else { return };
    say(format_args!(
        "\n{rounds} rounds in turns; milliseconds: median, min, max; × is the ratio of medians to runc"
    ));
    for (what, samples) in [
        ("ctr run --rm /bin/true, to the end (wall)", (|side: &Side| &side.wall) as fn(&Side) -> &Samples),
        ("the same, processor time of ctr, containerd, shim and all below", |side| &side.cpu),
        ("ctr task start to the first byte of output (wall)", |side| &side.first_byte),
    ] {
        say(format_args!("\n{what}"));
        for side in sides.iter().filter(|side| !samples(side).is_empty()) {
            let ratio = samples(side).median() / samples(runc).median();
            say(format_args!("  {:18}{}  × {ratio:.2}", side.name, samples(side)));
        }
    }
    for side in sides {
        if let Some(failure) = &side.failure {
            say(format_args!("  {} does not work here: {failure}", side.name));
        }
    }
    say(format_args!("\n  ctr version alone {client}"));
    let named = |name: &str| sides.iter().find(|side| side.name == name);
    if let (Some(plain), Some(container)) = (named("runc, plain"), named("Bailey container")) {
        say(format_args!(
            "  container class : runc, of the same plain folder with users of its own = {:.2} (wall), {:.2} (processor)",
            container.wall.median() / plain.wall.median(),
            container.cpu.median() / plain.cpu.median()
        ));
        let more = container.wall.with(&plain.wall, |ours, runc| ours - runc);
        say(format_args!("  the platform's part, by rounds  {more}"));
    }
    let Some(cold) = named("Bailey cold") else { return };
    for warm in [named("Bailey clone"), named("Bailey warm")].into_iter().flatten() {
        let ratio = |of: fn(&Side) -> &Samples| of(cold).median() / of(warm).median();
        let net = |side: &Side| side.first_byte.median() - client.median();
        say(format_args!(
            "  cold : {} = {:.2} to the end, {:.2} to the first byte, {:.2} less ctr alone, which leaves {:.1} ms",
            warm.name,
            ratio(|side| &side.wall),
            ratio(|side| &side.first_byte),
            net(cold) / net(warm),
            net(warm)
        ));
    }
}
