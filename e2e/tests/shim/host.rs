//! What the host has, and the shim must find and use by itself: KVM, cgroups, AppArmor (A2, A5, A6).
//!
//! A machine that lacks one of them leaves its test out, and says so; the tier `production` boots one that has all.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::images::busybox;
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::settings::{has, only_ours};
use bailey_e2e::wait;

const SOON: Duration = Duration::from_secs(30);

/// A sandbox that uses all of the processor that it may, and the process of its VMM.
fn with_vmm(body: impl FnOnce(&Machine, &str, &str) -> Result<()>) -> Result<()> {
    if !only_ours("it has a VMM") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let run = machine.run(image).memory_mib(64).option("--cpus", "0.5");
        let mut task = run.sh("echo up; while :; do :; done").start()?;
        task.wait_for("up\n")?;
        let vmm = task.pid()?.context("the task has no process")?;
        let id = task.id.clone();
        body(machine, &vmm, &id)?;
        task.end()?.expect(137).map(drop)
    })
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    Ok(fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?.trim().to_owned())
}

/// How often a VM's processors have come out of the guest, as KVM counts it for each of its VMs.
fn exits(vmm: &str) -> Result<u64> {
    let entries = fs::read_dir("/sys/kernel/debug/kvm").context("KVM's books are not mounted")?.flatten();
    let of_vmm = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{vmm}-")));
    let book = of_vmm.map(|entry| entry.path()).next().context("KVM has no VM of this process")?;
    read(book.join("exits"))?.parse().context("reading a number")
}

#[test]
fn kvm_is_used_where_it_works() -> Result<()> {
    with_vmm(|machine, vmm, _| {
        let line = fs::read(format!("/proc/{vmm}/cmdline")).context("reading the VMM's command line")?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let files = fs::read_dir(format!("/proc/{vmm}/fd")).context("listing the VMM's files")?.flatten();
        let files: Vec<PathBuf> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
        let open = |name: &str| files.iter().any(|file| file == Path::new(name));
        if !has("kvm", line.contains("-accel kvm"))? {
            ensure!(!open("anon_inode:kvm-vm"), "a VM of KVM's, although it is emulated: {line}");
            return Ok(());
        }
        ensure!(open("anon_inode:kvm-vm") && open("anon_inode:kvm-vcpu:0"), "no VM of KVM's: {files:?}");
        let before = exits(vmm)?;
        wait::until_true("the guest to run on KVM", SOON, || Ok(exits(vmm)? > before))?;
        // What a trial has found is kept. There is no trial where the settings say which it is.
        let found = machine.containerd.shim_state_dir().join("kvm");
        ensure!(!found.exists() || read(&found)?.ends_with(" works"), "{}", read(&found)?);
        Ok(())
    })
}

#[test]
fn the_vmms_cgroup_bounds_it_on_the_host() -> Result<()> {
    with_vmm(|machine, vmm, id| {
        let own = read(format!("/proc/{vmm}/cgroup"))?;
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        if !has("cgroup2", unified)? {
            return Ok(());
        }
        let path = Path::new("/").join(machine.containerd.namespace()).join(id);
        ensure!(own == format!("0::{}", path.display()), "the VMM is in {own}");
        let folder = Path::new("/sys/fs/cgroup").join(path.strip_prefix("/")?);
        let number = |name: &str| -> Result<u64> { Ok(read(folder.join(name))?.parse()?) };
        // The guest's memory, its kernel's share, and QEMU's own: see docs/shim.md.
        let memory = number("memory.max")?;
        ensure!((128 << 20..512 << 20).contains(&memory), "memory.max is {memory}");
        ensure!(number("memory.current")? <= memory);
        ensure!(read(folder.join("cpu.max"))? == "50000 100000", "{}", read(folder.join("cpu.max"))?);
        wait::until_true("the VMM to be held back", SOON, || {
            let stat = read(folder.join("cpu.stat"))?;
            let held =
                stat.lines().find_map(|line| line.strip_prefix("nr_throttled ")).context("no count")?;
            Ok(held.parse::<u64>()? > 0)
        })?;
        // A pool of threads, and one for the processor.
        ensure!(number("pids.max")? == 81 && number("pids.current")? > 0, "{}", number("pids.max")?);
        Ok(())
    })
}

#[test]
fn the_vmm_is_under_apparmor_where_the_host_has_it() -> Result<()> {
    with_vmm(|_, vmm, _| {
        let profiles = fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default();
        let loaded = profiles.lines().any(|line| line == "bailey-vmm (enforce)");
        if !has("apparmor", loaded)? {
            return Ok(());
        }
        let current = read(format!("/proc/{vmm}/attr/apparmor/current"))?;
        ensure!(current == "bailey-vmm (enforce)", "the VMM is under {current}");
        let threads = fs::read_dir(format!("/proc/{vmm}/task")).context("listing threads")?.flatten();
        for thread in threads {
            let path = thread.path().join("attr/apparmor/current");
            ensure!(read(&path)? == current, "a thread is under {}", read(&path)?);
        }
        Ok(())
    })
}
