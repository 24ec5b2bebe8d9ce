//! Windows of the stdio streams: how much either side may send before the other has taken it.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use bailey_types::guest::frame::Frame;
use bailey_types::guest::message::ToGuest;
use bailey_types::guest::{ProcessId, Stdio, StreamId, WINDOW};
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc};

use super::Guest;
use crate::error::{Error, Result};

/// How a guest can break a stream's rules.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum StreamError {
    #[error("it sent on channel {0}, which is no stream of output")]
    NoOutput(u32),
    #[error("it sent more on channel {0} than it was let")]
    Flooded(u32),
    #[error("it took more on channel {0} than it was sent")]
    TookTooMuch(u32),
}

#[derive(Default)]
pub(super) struct Streams {
    outputs: HashMap<StreamId, Output>,
    inputs: HashMap<ProcessId, Input>,
}

struct Output {
    /// Bytes that came and were not granted again yet: never more than a window.
    outstanding: Arc<std::sync::Mutex<u32>>,
    bytes: mpsc::UnboundedSender<Vec<u8>>,
}

struct Input {
    credit: Arc<Semaphore>,
}

/// What an output stream's taker holds.
pub(super) struct OutputQueue {
    bytes: mpsc::UnboundedReceiver<Vec<u8>>,
    outstanding: Arc<std::sync::Mutex<u32>>,
}

impl Streams {
    pub(super) fn open_output(&mut self, stream: StreamId) -> OutputQueue {
        // Unbounded in itself: the window bounds it.
        let (sender, bytes) = mpsc::unbounded_channel();
        let outstanding = Arc::default();
        self.outputs.insert(stream, Output { outstanding: Arc::clone(&outstanding), bytes: sender });
        OutputQueue { bytes, outstanding }
    }

    pub(super) fn open_input(&mut self, process: ProcessId) -> Arc<Semaphore> {
        let credit = Arc::new(Semaphore::new(WINDOW as usize));
        self.inputs.insert(process, Input { credit: Arc::clone(&credit) });
        credit
    }

    pub(super) fn forget(&mut self, process: ProcessId) {
        self.outputs.retain(|stream, _| stream.process != process);
        self.inputs.remove(&process);
    }

    /// Every reader sees the end, every writer that there is no way.
    pub(super) fn clear(&mut self) {
        self.outputs.clear();
        for (_, input) in self.inputs.drain() {
            input.credit.close();
        }
    }

    /// Takes a frame of output.
    pub(super) fn take(&mut self, frame: Frame) -> std::result::Result<(), StreamError> {
        let Frame { channel, payload } = frame;
        let stream = StreamId::from_channel(channel).filter(|stream| stream.stdio != Stdio::In);
        let stream = stream.ok_or(StreamError::NoOutput(channel))?;
        // Nobody takes it: the last words of a process that was deleted.
        let Some(output) = self.outputs.get(&stream) else { return Ok(()) };
        if payload.is_empty() {
            self.outputs.remove(&stream);
            return Ok(());
        }
        {
            let mut outstanding = output.outstanding.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            *outstanding = outstanding.saturating_add(bytes);
            if *outstanding > WINDOW {
                return Err(StreamError::Flooded(channel));
            }
        }
        // Its taker is gone: the process was deleted.
        let _deleted = output.bytes.send(payload);
        Ok(())
    }

    /// The guest has taken bytes of an input.
    pub(super) fn credited(&mut self, channel: u32, bytes: u32) -> std::result::Result<(), StreamError> {
        let stream = StreamId::from_channel(channel).filter(|stream| stream.stdio == Stdio::In);
        let stream = stream.ok_or(StreamError::TookTooMuch(channel))?;
        let Some(input) = self.inputs.get(&stream.process) else { return Ok(()) };
        if input.credit.available_permits() + bytes as usize > WINDOW as usize {
            return Err(StreamError::TookTooMuch(channel));
        }
        input.credit.add_permits(bytes as usize);
        Ok(())
    }
}

/// What one process writes to one of its streams.
pub(crate) struct OutputStream {
    guest: Guest,
    stream: StreamId,
    queue: OutputQueue,
}

impl OutputStream {
    pub(super) fn new(guest: Guest, stream: StreamId, queue: OutputQueue) -> OutputStream {
        OutputStream { guest, stream, queue }
    }

    /// The next bytes; none at the end.
    pub(crate) async fn next(&mut self) -> Option<Vec<u8>> {
        self.queue.bytes.recv().await
    }

    /// Lets the guest send as many bytes more. Call it when bytes have gone where they belong.
    pub(crate) async fn taken(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        {
            let mut outstanding = self.queue.outstanding.lock().unwrap_or_else(PoisonError::into_inner);
            *outstanding = outstanding.saturating_sub(bytes);
        }
        // A guest that is gone needs no credit.
        let _gone = self.guest.send(&ToGuest::Credit { channel: self.stream.channel(), bytes }).await;
    }
}

/// The way to one process's standard input.
pub(crate) struct InputStream {
    guest: Guest,
    channel: u32,
    credit: Arc<Semaphore>,
}

impl InputStream {
    pub(super) fn new(guest: Guest, process: ProcessId, credit: Arc<Semaphore>) -> InputStream {
        let channel = StreamId { process, stdio: Stdio::In }.channel();
        InputStream { guest, channel, credit }
    }

    /// Sends bytes, as fast as the process takes them.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Result<()> {
        // No chunk may be larger than what can ever be granted at once.
        for chunk in bytes.chunks(WINDOW as usize / 4) {
            let wanted = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            let permit = self.credit.acquire_many(wanted).await;
            permit.map_err(|_| Error::internal("the guest is gone"))?.forget();
            self.guest.send_frame(self.channel, chunk).await?;
        }
        Ok(())
    }

    /// Tells that nothing follows.
    pub(crate) async fn close(&self) -> Result<()> {
        self.guest.send_frame(self.channel, &[]).await
    }
}
