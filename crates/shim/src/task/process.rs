//! One process of the task: the container's first, or one that was run in it later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bailey_types::guest::spec;
use bailey_types::guest::{ProcessId, Stdio, StreamId};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::io::{self, Outputs};
use crate::error::Result;
use crate::guest::Guest;

/// Longest wait for output of which nothing is taken, once its process has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exit {
    pub(super) status: u32,
    /// Since the epoch.
    pub(super) at: Duration,
}

/// Names of a process's streams, as the caller gave them. Empty is none.
#[derive(Debug, Clone, Default)]
pub(super) struct StdioNames {
    pub(super) input: String,
    pub(super) output: String,
    pub(super) error: String,
    pub(super) terminal: bool,
}

pub(super) struct Process {
    pub(super) id: ProcessId,
    /// Empty for the container's first.
    pub(super) exec_id: String,
    pub(super) names: StdioNames,
    /// What to run, until it runs.
    pub(super) spec: Option<Box<spec::Process>>,
    /// Its number: the VMM's on the host for the first, the VM's own for the others. Zero before it runs.
    pub(super) pid: u32,
    pub(super) started: bool,
    pub(super) exit: watch::Sender<Option<Exit>>,
    outputs: Vec<JoinHandle<()>>,
    /// Grows while somebody takes output.
    progress: Arc<AtomicU64>,
    input: Option<JoinHandle<()>>,
    close_input: Arc<Notify>,
}

impl Process {
    pub(super) fn new(id: ProcessId, exec_id: &str, names: StdioNames, mut spec: spec::Process) -> Process {
        spec.stdin = !names.input.is_empty();
        spec.stdout = !names.output.is_empty();
        spec.stderr = !names.error.is_empty() && !names.terminal;
        Process {
            id,
            exec_id: exec_id.to_owned(),
            names,
            spec: Some(Box::new(spec)),
            pid: 0,
            started: false,
            exit: watch::Sender::new(None),
            outputs: Vec::new(),
            progress: Arc::default(),
            input: None,
            close_input: Arc::default(),
        }
    }

    pub(super) fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Opens the caller's ends of the streams and starts to carry them. Comes before the process is made: its first
    /// words must find their way.
    pub(super) async fn attach(&mut self, guest: &Guest, outputs: &Outputs) -> Result<()> {
        self.progress = outputs.progress();
        let names = [self.names.output.as_str(), self.names.error.as_str()];
        let sinks = io::sinks(names, self.names.terminal, outputs, &self.exec_id).await?;
        for (sink, stdio) in sinks.into_iter().zip([Stdio::Out, Stdio::Err]) {
            if let Some(sink) = sink {
                let stream = guest.output(StreamId { process: self.id, stdio });
                self.outputs.push(io::carry_output(stream, sink, outputs.clone()));
            }
        }
        if !self.names.input.is_empty() {
            let input = guest.input(self.id);
            self.input = Some(io::carry_input(&self.names.input, input, Arc::clone(&self.close_input))?);
        }
        Ok(())
    }

    /// Ends standard input, once what was written to it has been read.
    pub(super) fn close_input(&self) {
        self.close_input.notify_one();
    }

    /// Waits until all output has reached the caller, or nobody takes it.
    pub(super) async fn drain(&mut self) {
        for output in &mut self.outputs {
            let mut taken = self.progress.load(Ordering::Relaxed);
            while timeout(DRAIN, &mut *output).await.is_err() {
                let now = self.progress.load(Ordering::Relaxed);
                if now == taken {
                    tracing::warn!("the last output of {} was not taken", self.exec_id);
                    break;
                }
                taken = now;
            }
        }
        self.detach();
    }

    /// Stops to carry its streams.
    pub(super) fn detach(&mut self) {
        for task in self.outputs.drain(..).chain(self.input.take()) {
            task.abort();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.detach();
    }
}
