//! Between a process's streams and what containerd gave for them: pipes with names, or files.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::logger::{self, Program};
use crate::error::{Context, Error, Kind, Result};
use crate::guest::{InputStream, OutputStream};

/// Bytes read from a pipe at once.
const READ: usize = 32 * 1024;

/// Where output goes.
pub(super) enum Sink {
    Pipe(pipe::Sender),
    File(tokio::fs::File),
    Program(pipe::Sender, Program),
}

impl Sink {
    /// Opens what containerd named: the path of a pipe, or `file://` and the path of a file to append to.
    pub(super) fn open(name: &str) -> Result<Sink> {
        let doing = || format!("opening {name} for the container's output");
        match name.split_once("://") {
            None | Some(("fifo", _)) => {
                let path = name.strip_prefix("fifo://").unwrap_or(name);
                // Open for both, so that a reader that comes and goes is no end and no error.
                let pipe = pipe::OpenOptions::new().read_write(true).open_sender(path);
                pipe.map(Sink::Pipe).context_as(Kind::Invalid, doing)
            }
            Some(("file", path)) => {
                let path = Path::new(path);
                if let Some(parent) = path.parent() {
                    std::fs::create_dir_all(parent).context_as(Kind::Invalid, doing)?;
                }
                let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
                file.map(|file| Sink::File(file.into())).context_as(Kind::Invalid, doing)
            }
            Some((scheme, _)) => {
                let text = format!("output to {scheme}:// is not supported; a pipe, file:// or binary:// is");
                Err(Error::invalid(text))
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Sink::Pipe(pipe) | Sink::Program(pipe, _) => pipe.write_all(bytes).await,
            Sink::File(file) => {
                file.write_all(bytes).await?;
                file.flush().await
            }
        }
    }
}

/// What a process's output and its errors go to, as the caller named both; a terminal has no errors of its own. A
/// program takes both, as containerd has it.
pub(super) async fn sinks(
    [output, error]: [&str; 2],
    terminal: bool,
    outputs: &Outputs,
    exec_id: &str,
) -> Result<[Option<Sink>; 2]> {
    let error = if terminal { "" } else { error };
    if output.starts_with("binary://") {
        let Owner { namespace, id } = &*outputs.owner;
        let id = if exec_id.is_empty() { id } else { exec_id };
        let (output, errors) = logger::start(output, namespace, id).await?;
        return Ok([Some(output), (!error.is_empty()).then_some(errors)]);
    }
    let open = |name: &str| if name.is_empty() { Ok(None) } else { Sink::open(name).map(Some) };
    Ok([open(output)?, open(error)?])
}

/// A rate that several streams share, in bytes per second: who is over it waits, and so, in the end, does the
/// process that writes.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    free_at: Mutex<Instant>,
    /// Whether it holds no longer.
    over: watch::Sender<bool>,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Arc<Pace> {
        let free_at = Mutex::new(Instant::now());
        Arc::new(Pace { bytes_per_second, free_at, over: watch::Sender::new(false) })
    }

    /// Waits for as long as so many bytes take, or until there is no hurry to be held back any more.
    async fn spend(&self, bytes: usize) {
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let nanoseconds = (bytes as u64).saturating_mul(1_000_000_000) / self.bytes_per_second;
            *free_at = (*free_at).max(Instant::now()) + Duration::from_nanos(nanoseconds);
            *free_at
        };
        let mut over = self.over.subscribe();
        tokio::select! {
            () = sleep_until(until) => {}
            _ = over.wait_for(|over| *over) => {}
        }
    }
}

/// What the outputs of a task's processes share.
#[derive(Clone)]
pub(super) struct Outputs {
    owner: Arc<Owner>,
    pace: Option<Arc<Pace>>,
    /// Counts what was taken, so that a slow reader is told from one that is gone.
    progress: Arc<AtomicU64>,
    /// Held by each for as long as it is carried.
    _open: mpsc::Sender<()>,
}

/// Whose output it is.
pub(super) struct Owner {
    pub(super) namespace: String,
    pub(super) id: String,
}

/// Tells when every output, and everything that could open one, is gone.
pub(super) struct AllCarried(mpsc::Receiver<()>);

impl Outputs {
    pub(super) fn new(owner: Owner, bytes_per_second: Option<u64>) -> (Outputs, AllCarried) {
        let (open, closed) = mpsc::channel(1);
        let pace = bytes_per_second.map(Pace::new);
        let owner = Arc::new(owner);
        (Outputs { owner, pace, progress: Arc::default(), _open: open }, AllCarried(closed))
    }

    /// How much has been taken so far, of all outputs together.
    pub(super) fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.progress)
    }

    /// Lets go of the pace: the container has ended, and what is left is little. Its caller waits for it.
    pub(super) fn hurry(&self) {
        if let Some(pace) = &self.pace {
            pace.over.send_replace(true);
        }
    }

    /// Bytes that are written at once: with a pace, a quarter of a second's.
    fn piece(&self) -> usize {
        let most = |pace: &Arc<Pace>| usize::try_from(pace.bytes_per_second / 4).unwrap_or(usize::MAX).max(1);
        self.pace.as_ref().map_or(usize::MAX, most)
    }
}

impl AllCarried {
    pub(super) async fn wait(&mut self) {
        // Nothing is ever sent: this is the end of the last sender.
        let _closed = self.0.recv().await;
    }
}

/// Carries output until it ends.
pub(super) fn carry_output(mut from: OutputStream, mut to: Sink, outputs: Outputs) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(bytes) = from.next().await {
            for piece in bytes.chunks(outputs.piece()) {
                if let Err(error) = to.write(piece).await {
                    tracing::warn!("the container's output is lost: {error}");
                    return;
                }
                outputs.progress.fetch_add(piece.len() as u64, Ordering::Relaxed);
                if let Some(pace) = &outputs.pace {
                    pace.spend(piece.len()).await;
                }
            }
            from.taken(bytes.len()).await;
        }
        drop(outputs);
        if let Sink::Program(pipe, program) = to {
            drop(pipe);
            program.finish().await;
        }
    })
}

/// Carries input until whoever writes it ends, or `closed` says so.
pub(super) fn carry_input(
    name: &str,
    to: InputStream,
    closed: Arc<tokio::sync::Notify>,
) -> Result<JoinHandle<()>> {
    let doing = || format!("opening {name} for the container's input");
    let pipe = pipe::OpenOptions::new().open_receiver(name).context_as(Kind::Invalid, doing)?;
    Ok(tokio::spawn(async move {
        // A guest or a process that is gone takes nothing more, and needs no word of it.
        let _gone = feed(pipe, &to, &closed).await;
        let _gone = to.close().await;
    }))
}

async fn feed(pipe: pipe::Receiver, to: &InputStream, closed: &tokio::sync::Notify) -> Result<()> {
    let mut buffer = vec![0; READ];
    let mut closing = false;
    loop {
        if !closing {
            tokio::select! {
                biased;
                // Nothing is read before the pipe is ready: with no writer yet, it would look like the end.
                ready = pipe.readable() => ready.context(|| "waiting for input".into())?,
                () = closed.notified() => closing = true,
            }
        }
        match pipe.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.send(&buffer[..count]).await?,
            // All that was written before the caller closed it has been read.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && closing => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context(|| "reading input".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pace_holds_over_streams_that_share_it() {
        let pace = Pace::new(1000);
        let started = Instant::now();
        for _ in 0..10 {
            pace.spend(500).await;
        }
        assert_eq!(started.elapsed().as_secs(), 5);
    }

    #[test]
    fn what_output_cannot_go_to_is_named() {
        let error = Sink::open("tcp://127.0.0.1:514").err().unwrap();
        assert!(error.chain().contains("tcp://"));
    }
}
