//! How many idle sandboxes fit on a host (goal P5).
//!
//! `density [COUNT]`: starts that many sandboxes of 128 MiB that do nothing, adds up what their VMMs, their shims and the
//! keepers of their templates have in memory and use of the processors, and says how many would fit into 24 GiB.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use bailey_bench::process::{self, Memory, Process};
use bailey_bench::{count, say, say_machine};
use bailey_e2e::ctr::Task;
use bailey_e2e::images;
use bailey_e2e::machine;

const MEMORY_MIB: u64 = 128;
const HOST_MIB: f64 = 24.0 * 1024.0;
/// What a start leaves to do is done by then.
const SETTLE: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(10);
const KIB_PER_MIB: f64 = 1024.0;

/// The processes of the sandboxes, by what they are.
struct Groups {
    vmms: Vec<i32>,
    shims: Vec<i32>,
    keepers: Vec<i32>,
}

fn main() -> Result<()> {
    let wanted = count(20)?;
    say_machine();
    machine::test_with(&images::busybox(), |machine, image| {
        let mut tasks = Vec::new();
        let run = || machine.run(image).memory_mib(MEMORY_MIB).args(&["sleep", "infinity"]).detach();
        let started = (0..wanted).try_for_each(|_| run().map(|task| tasks.push(task)));
        let measured = started.and_then(|()| measure(&tasks));
        // All go, whatever happened before.
        let removed: Vec<Result<()>> = tasks.iter_mut().map(Task::remove).collect();
        measured?;
        removed.into_iter().collect()
    })
}

fn measure(tasks: &[Task<'_>]) -> Result<()> {
    std::thread::sleep(SETTLE);
    let groups = groups(tasks)?;
    let before = spent_ms(&groups)?;
    std::thread::sleep(IDLE);
    let idle_ms = spent_ms(&groups)? - before;
    report(tasks.len(), &groups, idle_ms)
}

fn groups(tasks: &[Task<'_>]) -> Result<Groups> {
    let pid = |task: &Task<'_>| -> Result<i32> {
        let pid = task.pid()?.ok_or_else(|| anyhow!("{} has no process", task.id))?;
        pid.parse().context("reading a process id")
    };
    let vmms = tasks.iter().map(pid).collect::<Result<Vec<_>>>()?;
    let parents: BTreeSet<i32> =
        vmms.iter().filter_map(|vmm| Process::read(*vmm)).map(|vmm| vmm.parent).collect();
    let ours = process::shims().into_iter().map(|shim| shim.pid);
    let keepers = ours.filter(|pid| !parents.contains(pid) && !vmms.contains(pid)).collect();
    Ok(Groups { vmms, shims: parents.into_iter().collect(), keepers })
}

fn spent_ms(groups: &Groups) -> Result<f64> {
    let all = groups.vmms.iter().chain(&groups.shims).chain(&groups.keepers);
    let read = |pid: &i32| Process::read(*pid).ok_or_else(|| anyhow!("process {pid} is gone"));
    all.map(|pid| read(pid).map(|one| one.own_ms)).sum()
}

fn report(wanted: usize, groups: &Groups, idle_ms: f64) -> Result<()> {
    let number = f64::from(u32::try_from(wanted).context("counting")?);
    let memory = |pids: &[i32]| -> Result<Vec<Memory>> { pids.iter().map(|pid| Memory::of(*pid)).collect() };
    let mut all = Vec::new();
    say(format_args!(
        "{wanted} idle sandboxes of {MEMORY_MIB} MiB; MiB: PSS of all, PSS of one, private of one"
    ));
    for (name, pids) in [("VMM", &groups.vmms), ("shim", &groups.shims), ("keeper", &groups.keepers)] {
        let parts = memory(pids)?;
        let sum = Memory::sum(&parts);
        let each = f64::from(u32::try_from(pids.len().max(1)).context("counting")?) * KIB_PER_MIB;
        say(format_args!(
            "  {:3} × {name:8} {:9.1} {:8.2} {:8.2}",
            pids.len(),
            sum.proportional / KIB_PER_MIB,
            sum.proportional / each,
            sum.private / each
        ));
        all.extend(parts);
    }
    let sum = Memory::sum(&all);
    let (pss, private) = (sum.proportional / KIB_PER_MIB, sum.private / KIB_PER_MIB);
    say(format_args!(
        "  on 24 GiB: {HOST_MIB} MiB / ({pss:.1} / {wanted}) = {:.0}",
        HOST_MIB / (pss / number)
    ));
    let shared = pss - private;
    say(format_args!(
        "  the same with the shared part counted once: ({HOST_MIB} − {shared:.1}) / ({private:.1} / {wanted}) = {:.0}",
        (HOST_MIB - shared) / (private / number)
    ));
    let percent = idle_ms / (IDLE.as_secs_f64() * 1e3) * 100.0;
    say(format_args!(
        "  idle: {idle_ms:.0} ms of processor time in {IDLE:?}: {percent:.2} % of a core, {:.3} % for each",
        percent / number
    ));
    Ok(())
}
