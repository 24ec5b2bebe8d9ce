//! What a sandbox tells by itself: ends of processes, want of memory, its own end.

use std::sync::Arc;
use std::time::Duration;

use bailey_types::guest::ProcessId;
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::io::AllCarried;
use super::process::{Exit, Process};
use super::service::{Service, Task};
use crate::clock;
use crate::guest::Event;

/// How long the word of a container's end waits for its output.
const OUTPUT_FIRST: Duration = Duration::from_secs(1);

/// Longest wait for a container's output to be taken after its end.
const LAST_WORDS: Duration = Duration::from_secs(60);

/// What a process counts as that its sandbox took with it: as if it was killed.
const LOST: u32 = 128 + libc::SIGKILL.cast_unsigned();

/// Follows the guest until it, or its VMM, has ended.
pub(super) async fn follow(
    service: Arc<Service>,
    mut events: mpsc::Receiver<Event>,
    mut outputs: AllCarried,
) {
    while let Some(event) = events.recv().await {
        if let Event::Exited { id: ProcessId::INIT, .. } = event {
            if let Some(outputs) = service.task.lock().await.as_mut().and_then(|task| task.outputs.take()) {
                outputs.hurry();
            }
            // Callers expect all output when they learn of the end. Who does not take it learns of it nevertheless.
            let _late = timeout(OUTPUT_FIRST, outputs.wait()).await;
        }
        let mut state = service.task.lock().await;
        let Some(task) = state.as_mut() else { return };
        match event {
            Event::OutOfMemory => {
                let event = TaskOOM { container_id: service.id.clone(), ..TaskOOM::default() };
                service.publisher.publish(&event);
            }
            Event::Exited { id, status } => {
                if let Some(process) = task.processes.values_mut().find(|process| process.id == id) {
                    report(&service, process, status.into());
                }
                if id == ProcessId::INIT {
                    // The kernel has ended all others with the first.
                    end_others(&service, task);
                    drop(state);
                    return rest(&service, outputs).await;
                }
            }
        }
    }
    let mut state = service.task.lock().await;
    let Some(task) = state.as_mut() else { return };
    if task.init().is_some_and(|init| init.exited().is_none()) {
        let why = task.sandbox.guest.ended().await;
        tracing::error!(
            "the sandbox ended before its container: {why}; {}",
            task.sandbox.machine.last_words()
        );
        // Whatever broke the protocol runs no longer.
        task.sandbox.machine.kill();
        end_others(&service, task);
    }
}

/// Once all that a container wrote has been taken, or nobody takes it, its VM is of no use: it gives its memory
/// back, though the task is there until it is deleted.
async fn rest(service: &Service, mut outputs: AllCarried) {
    // Those who do not take their output in time lose it.
    let _late = timeout(LAST_WORDS, outputs.wait()).await;
    if let Some(task) = service.task.lock().await.as_ref() {
        task.sandbox.machine.kill();
    }
}

fn end_others(service: &Service, task: &mut Task) {
    for process in task.processes.values_mut() {
        if process.exited().is_none() && process.started {
            report(service, process, LOST);
        }
    }
}

fn report(service: &Service, process: &mut Process, status: u32) {
    if process.exited().is_some() {
        return;
    }
    let exit = Exit { status, at: clock::since_epoch() };
    process.exit.send_replace(Some(exit));
    let id = if process.exec_id.is_empty() { &service.id } else { &process.exec_id };
    service.publisher.publish(&TaskExit {
        container_id: service.id.clone(),
        id: id.clone(),
        pid: process.pid,
        exit_status: exit.status,
        exited_at: MessageField::some(clock::timestamp(exit.at)),
        ..TaskExit::default()
    });
}
