//! The tier `production`: tests of this program and of the jail once more, on a host as operators have them: KVM,
//! cgroups of version 2, AppArmor, a distribution's kernel (A2, A5, A6).
//!
//! The host is a virtual machine whose processor is emulated (see `bailey_e2e::host`), so that this runs everywhere,
//! slowly. The programs that were built here run there; each case is a process of its own with a limit of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bailey_e2e::host::{self, Base, Load, Outcome, SUITES};
use bailey_e2e::images::{Recipe, busybox, layered, unprivileged, with_program};
use bailey_e2e::machine::built_programs;
use bailey_e2e::process::text_of;
use bailey_e2e::{probe, settings};

/// Longest time for a host and all cases. A third of it is usual on a machine that has little else to do.
const LIMIT: Duration = Duration::from_secs(1500);
const BUILD_LIMIT: Duration = Duration::from_secs(1800);
const SHIM: &str = "containerd-shim-bailey-v1";
const STANDIN: &str = "bailey-jail-standin";
const FIRECRACKER: &str = "firecracker";
const JAILER: &str = "jailer";
/// The folder of guest images that the host uses.
const GUEST: &str = "guest";

/// How a case's sandboxes start. Where nothing else is said, the settings name KVM, so that it is not tried anew.
#[derive(Clone, Copy)]
enum How {
    /// The shim finds out by itself whether KVM works.
    Trial,
    /// Cloned from a template.
    Warm,
    /// From a spare. All others have none, which would only take time.
    Spare,
    /// Booted: quicker than a template and one clone.
    Cold,
    /// Cloned by Firecracker, with our own guest kernel.
    Firecracker,
}

impl How {
    /// Variables of the case's environment.
    fn variables(self) -> String {
        let (start, accel, guest, vmm) = match self {
            How::Trial => ("warm", "auto", GUEST, "qemu"),
            How::Warm | How::Spare => ("warm", "kvm", GUEST, "qemu"),
            How::Cold => ("cold", "kvm", GUEST, "qemu"),
            How::Firecracker => ("warm", "kvm", GUEST, "firecracker"),
        };
        let spares = u8::from(matches!(self, How::Spare));
        let mut variables = format!(
            "BAILEY_E2E_START={start} BAILEY_E2E_ACCEL={accel} BAILEY_E2E_VMM={vmm} BAILEY_E2E_SPARES={spares} \
             BAILEY_GUEST_DIR={}",
            host::inside(guest).display()
        );
        if let How::Firecracker = self {
            for (variable, name) in [("BAILEY_FIRECRACKER", FIRECRACKER), ("BAILEY_JAILER", JAILER)] {
                variables
                    .push_str(&format!(" {variable}={}", host::inside(&format!("bin/{name}")).display()));
            }
        }
        variables
    }
}

/// The cases of this program, the longest first. Together they use every step of a sandbox's life.
const SANDBOX_CASES: [(&str, How); 23] = [
    ("host::kvm_is_used_where_it_works", How::Trial),
    ("walls::sandboxes_never_share_what_must_be_random", How::Warm),
    ("bad_input::an_image_changed_on_disk_is_not_read", How::Warm),
    ("spares::a_sandbox_starts_in_one_and_the_next_comes", How::Spare),
    ("templates::what_was_cloned_outlives_it", How::Warm),
    ("class::it_is_hardened", How::Cold),
    ("host::the_vmms_cgroup_bounds_it_on_the_host", How::Cold),
    ("host::the_vmm_is_under_apparmor_where_the_host_has_it", How::Cold),
    ("bad_input::a_guest_that_panics_is_quoted", How::Cold),
    ("run::output_goes_to_its_own_stream", How::Warm),
    ("run::exit_codes_arrive", How::Warm),
    ("run::input_is_interactive", How::Cold),
    ("run::terminal", How::Cold),
    ("life::exec_has_its_own_streams_code_folder_and_user", How::Cold),
    ("life::a_signal_reaches_its_handler", How::Cold),
    ("life::pause_stops_it_and_resume_lets_it_go_on", How::Cold),
    ("life::a_killed_shim_leaves_nothing", How::Warm),
    ("files::layers_add_replace_and_delete", How::Cold),
    ("files::a_full_scratch_disk_is_an_error_like_any_other", How::Cold),
    ("limits::too_much_memory_ends_the_process_and_is_told", How::Cold),
    ("limits::a_fork_bomb_stays_inside", How::Cold),
    ("walls::a_privileged_container_owns_its_machine_and_no_other", How::Cold),
    ("walls::what_is_written_is_noise_on_the_hosts_disk", How::Cold),
];

/// The cases that run with Firecracker, too, where somebody has named it and its jailer.
const FIRECRACKER_CASES: [&str; 7] = [
    "walls::sandboxes_never_share_what_must_be_random",
    "run::output_goes_to_its_own_stream",
    "run::exit_codes_arrive",
    "life::pause_stops_it_and_resume_lets_it_go_on",
    "life::a_killed_shim_leaves_nothing",
    "files::a_full_scratch_disk_is_an_error_like_any_other",
    "bad_input::an_image_changed_on_disk_is_not_read",
];

/// Those of them that are run where our own guest kernel was not built: they boot none. The distribution's takes long on a
/// processor that is emulated twice, and now and then does not come up there at all.
const WITHOUT_OWN_KERNEL: [&str; 1] = ["class::it_is_hardened"];

/// What cannot be on a release: the name of a case, and of the release. With a specification that has users of its own,
/// `ctr` of containerd 1.7 sends every runtime but its own options that no shim of that version knows.
const LEFT_OUT: [(&str, &str); 1] = [("class::it_is_hardened", "trixie")];

/// The cases of the jail's tests.
const JAIL_CASES: [&str; 7] = [
    "jail::seccomp::each_request_of_kvm_passes_and_its_near_misses_kill",
    "jail::apparmor::alone_it_stops_exactly_what_the_matrix_says",
    "jail::apparmor::it_is_reported_and_a_profile_that_is_not_loaded_is_an_error",
    "jail::attacks::every_attack_works_where_there_is_no_jail",
    "jail::attacks::no_attack_works_in_the_jail",
    "jail::spawning::devices_and_scratch_space_are_there_when_asked_for",
    "jail::spawning::the_jail_ends_with_its_parent",
];

/// Images that the cases use.
fn images() -> Result<[Recipe; 4]> {
    Ok([busybox(), layered(), unprivileged(), with_program("probe", probe::build()?)])
}

#[test]
fn on_a_host_as_operators_have_it() -> Result<()> {
    for suite in settings::hosts() {
        on(&suite).with_context(|| format!("on a host of {suite}, one of {SUITES:?}"))?;
    }
    Ok(())
}

/// Runs all cases on a host of that release.
fn on(suite: &str) -> Result<()> {
    let base = Base::of(suite)?;
    let (load, cases) = load(suite)?;
    eprintln!("on a host of {suite}:");
    let outcome = host::run(&base, load, LIMIT, |line| eprintln!("  {line}"))?;
    let results = results(&outcome.said);
    let is_wrong =
        |case: &&String| !results.get(case.as_str()).is_some_and(|result| result.starts_with("ok"));
    let wrong: Vec<&String> = cases.iter().filter(is_wrong).collect();
    let all_well = wrong.is_empty() && outcome.code == Some(0);
    ensure!(all_well, "failed, or never ended: {wrong:?}\n{}", quoted(&outcome));
    eprintln!("{} cases in {} s", cases.len(), outcome.took.as_secs());
    Ok(())
}

fn quoted(outcome: &Outcome) -> String {
    format!("the host said:\n{}\nand its console at last:\n{}", outcome.said, outcome.console)
}

/// What became of each case, by the lines that `production.sh` writes.
fn results(said: &str) -> BTreeMap<&str, &str> {
    said.lines().filter_map(|line| line.trim_end().strip_prefix("case ")?.split_once(": ")).collect()
}

/// All that goes in, and the names of the cases that have to come out.
fn load(suite: &str) -> Result<(Load, Vec<String>)> {
    let bin_dir = built_programs()?;
    let load = Load::new(include_str!("production.sh"))?;
    let (jail_tests, standin) = jail_programs()?;
    let own = std::env::current_exe().context("finding the running program")?;
    for (from, name) in [
        (own, "sandbox-tests"),
        (jail_tests, "jail-tests"),
        (bin_dir.join(SHIM), SHIM),
        (probe::build()?, probe::NAME),
        (standin.clone(), STANDIN),
    ] {
        load.add(&from, &format!("bin/{name}"))?;
    }
    for recipe in images()? {
        let image = recipe.image()?;
        let name = image.archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        load.add(&image.archive, &format!("cache/bailey/test-images/{name}"))?;
    }
    let guest = settings::guest_dir()?;
    for flavour in ["bailey", "debian"].iter().filter(|flavour| guest.join(flavour).exists()) {
        load.add(&guest.join(flavour), &format!("{GUEST}/{flavour}"))?;
    }
    load.add(&settings::repository().join("crates/host/apparmor"), "apparmor")?;
    let sandbox = SANDBOX_CASES
        .iter()
        .map(|(case, how)| ((*case).to_owned(), format!("sandbox-tests {}", how.variables())));
    let own_kernel = guest.join("bailey").exists();
    if !own_kernel {
        eprintln!(
            "our own guest kernel is not there (cargo xtask guest-kernel): the cases that boot a guest are left out"
        );
    }
    let sandbox = sandbox.filter(|(case, _)| own_kernel || WITHOUT_OWN_KERNEL.contains(&case.as_str()));
    let jail = JAIL_CASES.iter().map(|case| ((*case).to_owned(), "jail-tests".to_owned()));
    let firecracker = match settings::firecracker() {
        Some((program, jailer)) => {
            load.add(&program, &format!("bin/{FIRECRACKER}"))?;
            load.add(&jailer, &format!("bin/{JAILER}"))?;
            &FIRECRACKER_CASES[..]
        }
        None => &[],
    };
    let with_firecracker = |case: &&str| {
        (format!("{case}@{FIRECRACKER}"), format!("sandbox-tests {}", How::Firecracker.variables()))
    };
    let possible = |case: &(String, String)| !LEFT_OUT.contains(&(&case.0, suite));
    let all = sandbox.chain(firecracker.iter().map(with_firecracker)).chain(jail).filter(possible);
    let (names, lines): (Vec<_>, Vec<_>) =
        all.map(|(case, how)| (case.clone(), format!("{case} {how}\n"))).unzip();
    load.write("cases", &lines.concat())?;
    // Where the jail's tests were told that their helper is.
    load.write("standin-path", &standin.to_string_lossy())?;
    Ok((load, names))
}

/// The program of the jail's tests and its helper, built now if need be.
fn jail_programs() -> Result<(PathBuf, PathBuf)> {
    let mut cargo = std::process::Command::new(settings::cargo());
    cargo.args(["test", "--quiet", "--locked", "--package", "bailey-host", "--no-run"]);
    cargo.arg("--message-format=json").current_dir(settings::repository());
    let told = text_of(&mut cargo, BUILD_LIMIT).context("building the tests of the jail")?;
    let artifacts: Vec<serde_json::Value> =
        told.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let executable = |kind: &str, name: &str| {
        let is_it = |artifact: &&serde_json::Value| {
            artifact["target"]["kind"][0] == kind && artifact["target"]["name"] == name
        };
        let found = artifacts.iter().filter(is_it).find_map(|artifact| artifact["executable"].as_str());
        found.map(PathBuf::from).with_context(|| format!("cargo built no {kind} {name}"))
    };
    Ok((executable("test", "main")?, executable("bin", STANDIN)?))
}

/// A case that is renamed must not go missing.
#[test]
fn the_cases_of_the_production_tier_exist() -> Result<()> {
    let mut own = std::process::Command::new(std::env::current_exe().context("finding this program")?);
    let listed = text_of(own.arg("--list"), Duration::from_secs(60))?;
    let cases = SANDBOX_CASES.map(|(case, _)| case);
    for case in cases.into_iter().chain(WITHOUT_OWN_KERNEL).chain(FIRECRACKER_CASES) {
        if !listed.lines().any(|line| line == format!("{case}: test")) {
            bail!("there is no test {case}");
        }
    }
    Ok(())
}
