//! What a noisy sandbox leaves its neighbour (A6).
//!
//! `noisy [ROUNDS]`: in each round a neighbour does a fixed amount of work, with its processor and with its disk, first
//! alone and then beside each kind of noise: a sandbox of one processor that spins, one that forks, one that writes to
//! its disk as fast as its annotation allows. Says how much of its own rate the neighbour kept, and how much of its
//! share of processor time the noise took.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bailey_bench::figures::Samples;
use bailey_bench::{count, say, say_machine};
use bailey_e2e::ctr::{Run, Task};
use bailey_e2e::images;
use bailey_e2e::machine;
use bailey_e2e::on_host::OnHost;

/// Fixed amounts of work: some seconds for an emulated processor.
const WORK: [(&str, &str); 2] = [
    ("processor", "i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done"),
    ("disk", "dd if=/dev/zero of=/work bs=64k count=512 oflag=direct 2>/dev/null"),
];
const SPINS: &str = "for i in 1 2 3 4; do while :; do :; done & done; ";
const FORKS: &str = "for i in 1 2 3 4; do while :; do /bin/true; done & done; ";
const WRITES: &str =
    "while :; do dd if=/dev/zero of=/noise bs=64k count=512 oflag=direct 2>/dev/null; done & ";
/// What the noise that writes may write in a second.
const RATE: &str = "16MiB";
/// Noise is at its loudest by then.
const SETTLE: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(300);

/// One kind of noise.
struct Noise {
    name: &'static str,
    script: &'static str,
    annotation: Option<(&'static str, &'static str)>,
}

const NOISES: [Noise; 4] = [
    Noise { name: "spins", script: SPINS, annotation: None },
    Noise { name: "forks", script: FORKS, annotation: None },
    Noise { name: "writes, limited", script: WRITES, annotation: Some(("dev.bailey.io.write-bps", RATE)) },
    Noise { name: "writes", script: WRITES, annotation: None },
];

/// What was measured beside one noise.
#[derive(Default)]
struct Kept {
    /// For each kind of work, the rate beside the noise by the rate alone.
    rates: [Samples; WORK.len()],
    /// Processor time of the noise by the time that passed, for one processor allowed.
    share: Samples,
}

fn main() -> Result<()> {
    let rounds = count(5)?;
    say_machine();
    machine::test_with(&images::busybox(), |machine, image| {
        let one = |script: &str| machine.run(image).memory_mib(64).option("--cpus", "1").sh(script);
        let mut neighbour = started(one("echo up; exec sleep 100000"))?;
        let mut kept: [Kept; NOISES.len()] = Default::default();
        for _ in 0..rounds {
            let alone = work(&neighbour)?;
            for (noise, kept) in NOISES.iter().zip(&mut kept) {
                let run = one(&format!("{} echo up; wait", noise.script));
                let run = noise.annotation.iter().fold(run, |run, (name, value)| run.annotation(name, value));
                beside(&neighbour, &alone, run, kept)?;
            }
        }
        report(rounds, &kept);
        neighbour.end().map(drop)
    })
}

fn started(run: Run<'_>) -> Result<Task<'_>> {
    let task = run.start()?;
    task.wait_for("up\n")?;
    Ok(task)
}

/// Lets the neighbour work beside a noise.
fn beside(neighbour: &Task<'_>, alone: &[f64], noise: Run<'_>, kept: &mut Kept) -> Result<()> {
    let mut noise = started(noise)?;
    std::thread::sleep(SETTLE);
    let host = OnHost::of(&noise)?;
    let (begun, before) = (Instant::now(), host.cpu_us()?);
    let disturbed = work(neighbour)?;
    let used = Duration::from_micros(host.cpu_us()? - before);
    kept.share.add(used.as_secs_f64() / begun.elapsed().as_secs_f64());
    for ((alone, disturbed), rates) in alone.iter().zip(disturbed).zip(&mut kept.rates) {
        rates.add(alone / disturbed);
    }
    noise.end().map(drop)
}

/// Does each kind of work once; seconds.
fn work(neighbour: &Task<'_>) -> Result<Vec<f64>> {
    let timed = |(name, script): &(&str, &str)| -> Result<f64> {
        let begun = Instant::now();
        let done = neighbour.exec(&["sh", "-c", script]).limit(LONG).output()?;
        ensure!(done.code == 0, "the work of the {name} failed: {}", done.errors());
        Ok(begun.elapsed().as_secs_f64())
    };
    WORK.iter().map(timed).collect::<Result<_>>().context("letting the neighbour work")
}

fn report(rounds: usize, kept: &[Kept]) {
    say(format_args!("{rounds} rounds; median (least to most)"));
    let show =
        |samples: &Samples| format!("{:.2} ({:.2}-{:.2})", samples.median(), samples.min(), samples.max());
    for (Noise { name, .. }, kept) in NOISES.iter().zip(kept) {
        let [processor, disk] = &kept.rates;
        say(format_args!(
            "  beside one that {name:16} processor kept {}, disk kept {}; the noise took {} of a processor",
            show(processor),
            show(disk),
            show(&kept.share)
        ));
    }
}
