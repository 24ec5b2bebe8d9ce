//! What hangs below the disks of a running VM, and its replacement by other files.

use std::fs::File;

use serde_json::{Value, json};

use super::args::DiskFile;
use super::disks::{self, Backing, Disk, ROOT, SCRATCH};
use super::qmp::Monitor;
use super::size;
use crate::error::{Error, Result};
use crate::vmm::Disks;

/// What hangs below both disks.
pub(super) struct Hung {
    below: [Below; 2],
    throttled: bool,
    /// Numbers that were given so far.
    number: u32,
}

/// What hangs below one disk.
#[derive(Default)]
struct Below {
    /// Names of nodes, the lowest first.
    nodes: Vec<String>,
    fdset: Option<i64>,
}

impl Hung {
    /// What a VM was started with.
    pub(super) fn new(files: Option<&[DiskFile; 2]>) -> Hung {
        let throttled = files.is_some_and(|[root, _]| disks::limits(&root.io).is_some());
        let below =
            [ROOT, SCRATCH].map(|disk| Below { nodes: vec![format!("{}-0", disk.name)], fdset: None });
        Hung { below, throttled, number: 0 }
    }

    /// Hangs other files below both disks, and lets go of what hung there.
    pub(super) async fn replace(&mut self, monitor: &mut Monitor, files: &Disks) -> Result<()> {
        if self.throttled {
            return Err(Error::internal("the disks have their limits already, and keep them"));
        }
        self.number += 1;
        let limits = disks::limits(&files.io);
        if let Some(limits) = &limits {
            monitor.ask("object-add", disks::limits_object(limits)).await?;
            self.throttled = true;
        }
        for (index, (disk, file)) in [(ROOT, &files.root), (SCRATCH, &files.scratch)].into_iter().enumerate()
        {
            let new = hang(monitor, disk, file, limits.is_some(), self.number).await?;
            let old = std::mem::replace(&mut self.below[index], new);
            let_go(monitor, old).await?;
        }
        Ok(())
    }
}

async fn hang(monitor: &mut Monitor, disk: Disk, file: &File, throttled: bool, number: u32) -> Result<Below> {
    let bytes = size(file)?;
    let answer = monitor.pass(file, "add-fd", json!({})).await?;
    let fdset = answer.get("fdset-id").and_then(Value::as_i64);
    let fdset = fdset.ok_or_else(|| Error::internal("QEMU did not say where it put a descriptor"))?;
    let mut new = Below { nodes: Vec::new(), fdset: Some(fdset) };
    for (name, node) in disk.below(Backing { fdset, throttled, number }) {
        monitor.ask("blockdev-add", node).await?;
        new.nodes.push(name);
    }
    let top = new.nodes.last().cloned().unwrap_or_default();
    // QEMU holds a new size against the old file: the file changes first, with no bound, and then the bound.
    for bound in [None, Some(bytes)] {
        monitor.ask("blockdev-reopen", json!({"options": [disk.top(&top, bound)]})).await?;
    }
    Ok(new)
}

async fn let_go(monitor: &mut Monitor, old: Below) -> Result<()> {
    for name in old.nodes.iter().rev() {
        monitor.ask("blockdev-del", json!({"node-name": name})).await?;
    }
    if let Some(fdset) = old.fdset {
        monitor.ask("remove-fd", json!({"fdset-id": fdset})).await?;
    }
    Ok(())
}
