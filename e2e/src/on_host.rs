//! What the host's kernel counts for a sandbox, and lets it have at most.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::ctr::Task;

/// The folders of a task's cgroup on the host: one, or one for each controller.
pub struct OnHost(Vec<PathBuf>);

impl OnHost {
    /// Finds them by the VMM's process.
    pub fn of(task: &Task<'_>) -> Result<Self> {
        let vmm = task.pid()?.context("the task has no process")?;
        let text = fs::read_to_string(format!("/proc/{vmm}/cgroup")).context("finding the cgroup")?;
        let fields = text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
        let found = fields.flat_map(|(controllers, path)| {
            let top = PathBuf::from("/sys/fs/cgroup");
            let names =
                controllers.split(',').map(move |name| top.join(name).join(path.trim_start_matches('/')));
            names.collect::<Vec<_>>()
        });
        Ok(Self(found.filter(|folder| folder.is_dir()).collect()))
    }

    /// The first of these files that is there: its name depends on the version of cgroups.
    pub fn read(&self, names: [&str; 2]) -> Result<String> {
        let files = self.0.iter().flat_map(|folder| names.map(|name| folder.join(name)));
        let file = files.into_iter().find(|file| file.exists());
        let file = file.with_context(|| format!("none of {names:?} is in {:?}", self.0))?;
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }

    /// As [`read`](Self::read), of a file that holds one number.
    pub fn number(&self, names: [&str; 2]) -> Result<u64> {
        self.read(names)?.trim().parse().with_context(|| format!("{names:?} is no number"))
    }

    /// Microseconds of processor time that were used.
    pub fn cpu_us(&self) -> Result<u64> {
        let text = self.read(["cpu.stat", "cpuacct.usage"])?;
        let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        match usage {
            Some(us) => us.trim().parse().context("reading cpu.stat"),
            None => Ok(self.number(["cpuacct.usage", "cpuacct.usage"])? / 1000),
        }
    }
}
