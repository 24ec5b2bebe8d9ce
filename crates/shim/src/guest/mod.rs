//! The host's end of the channel to a guest.
//!
//! Every byte here may come from a guest that was taken over. Frames are bounded by their decoder, streams by their
//! windows, requests by a time limit; what breaks the protocol ends the sandbox with a word on what it was.

mod streams;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bailey_types::guest::frame::{CONTROL, Decoder, Frame, encode};
use bailey_types::guest::message::{self, ErrorKind, FromGuest, GuestError, Request, Response, ToGuest};
use bailey_types::guest::{GUEST_FRAME_MAX, ProcessId, StreamId, VERSION};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use self::streams::Streams;
pub(crate) use self::streams::{InputStream, OutputStream};
use crate::error::{Context, Error, Kind, Result};

/// What the guest tells by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Exited { id: ProcessId, status: u8 },
    OutOfMemory,
}

/// Longest wait for an answer. A guest under emulation, on a busy host, has been seen to take seconds.
const ANSWER: Duration = Duration::from_secs(60);

/// Messages that wait for being written, and events that wait for being read.
const QUEUE: usize = 32;

/// A guest that we are connected to. Clones speak with the same guest.
#[derive(Clone)]
pub(crate) struct Guest(Arc<Shared>);

struct Shared {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<std::result::Result<Response, GuestError>>>>,
    streams: Mutex<Streams>,
    out: mpsc::Sender<Vec<u8>>,
    ready: watch::Sender<bool>,
    /// Why the connection ended.
    ended: watch::Sender<Option<String>>,
}

impl Guest {
    /// Takes a channel over.
    pub(crate) fn connect(channel: UnixStream) -> (Guest, mpsc::Receiver<Event>) {
        let (read, write) = channel.into_split();
        let (out, queue) = mpsc::channel(QUEUE);
        let (events, told) = mpsc::channel(QUEUE);
        let guest = Guest(Arc::new(Shared {
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
            streams: Mutex::default(),
            out,
            ready: watch::Sender::new(false),
            ended: watch::Sender::new(None),
        }));
        tokio::spawn(write_all(write, queue));
        let reader = guest.clone();
        tokio::spawn(async move {
            let why = match reader.read_all(read, events).await {
                Ok(()) => "the guest's channel was closed".to_owned(),
                Err(error) => error.chain(),
            };
            reader.end(why);
        });
        (guest, told)
    }

    /// Waits until the guest has greeted.
    pub(crate) async fn ready(&self) -> Result<()> {
        let mut ready = self.0.ready.subscribe();
        tokio::select! {
            _ = ready.wait_for(|ready| *ready) => Ok(()),
            why = self.ended() => Err(Error::internal(why)),
        }
    }

    /// Waits until the connection has ended; gives why.
    pub(crate) async fn ended(&self) -> String {
        let mut ended = self.0.ended.subscribe();
        let why = ended.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or_default()
    }

    /// Asks the guest, and waits for its answer.
    pub(crate) async fn request(&self, request: Request) -> Result<Response> {
        let seq = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        lock(&self.0.waiting).insert(seq, answer);
        let result = timeout(ANSWER, async {
            self.send(&ToGuest::Request { seq, request }).await?;
            answered.await.map_err(|_| Error::internal(self.why()))
        });
        let result = result.await.unwrap_or_else(|_| {
            let text = format!("the guest has not answered for {} s", ANSWER.as_secs());
            Err(Error::new(Kind::Unavailable, text))
        });
        lock(&self.0.waiting).remove(&seq);
        result?.map_err(from_guest)
    }

    /// Asks for something that has no answer but that it is done.
    pub(crate) async fn command(&self, request: Request) -> Result<()> {
        self.request(request).await.map(drop)
    }

    /// Starts to take what a process writes.
    pub(crate) fn output(&self, stream: StreamId) -> OutputStream {
        let bytes = lock(&self.0.streams).open_output(stream);
        OutputStream::new(self.clone(), stream, bytes)
    }

    /// Opens the way to a process's standard input.
    pub(crate) fn input(&self, process: ProcessId) -> InputStream {
        let credit = lock(&self.0.streams).open_input(process);
        InputStream::new(self.clone(), process, credit)
    }

    /// Forgets the streams of a process.
    pub(crate) fn forget(&self, process: ProcessId) {
        lock(&self.0.streams).forget(process);
    }

    async fn send(&self, message: &ToGuest) -> Result<()> {
        self.send_frame(CONTROL, &message::encode(message)).await
    }

    async fn send_frame(&self, channel: u32, payload: &[u8]) -> Result<()> {
        let mut frame = Vec::new();
        encode(channel, payload, &mut frame);
        self.0.out.send(frame).await.map_err(|_| Error::internal(self.why()))
    }

    fn why(&self) -> String {
        self.0.ended.borrow().clone().unwrap_or_else(|| "the guest's channel is closed".to_owned())
    }

    async fn read_all(&self, mut read: OwnedReadHalf, events: mpsc::Sender<Event>) -> Result<()> {
        let mut decoder = Decoder::new(GUEST_FRAME_MAX);
        let mut buffer = vec![0; GUEST_FRAME_MAX];
        loop {
            let count = match read.read(&mut buffer).await {
                Ok(count) => count,
                // Closed with words of ours unread: an end like any other.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
                Err(error) => return Err(error).context(|| "reading from the guest".into()),
            };
            if count == 0 {
                return Ok(());
            }
            decoder.feed(&buffer[..count]);
            while let Some(frame) = decoder.next_frame().map_err(nonsense)? {
                self.take(frame, &events).await?;
            }
        }
    }

    async fn take(&self, frame: Frame, events: &mpsc::Sender<Event>) -> Result<()> {
        if frame.channel != CONTROL {
            return lock(&self.0.streams).take(frame).map_err(nonsense);
        }
        match message::decode(&frame.payload).map_err(nonsense)? {
            FromGuest::Ready { version: VERSION } => {
                self.0.ready.send_replace(true);
            }
            FromGuest::Ready { version } => {
                let text = format!(
                    "the guest speaks version {version} of the protocol, this shim {VERSION}: make the guest image again"
                );
                return Err(Error::internal(text));
            }
            FromGuest::Reply { seq, result } => {
                // An answer that nobody waits for (any more) is no harm.
                if let Some(answer) = lock(&self.0.waiting).remove(&seq) {
                    let _given_up = answer.send(result);
                }
            }
            FromGuest::Exited { id, status } => self.tell(events, Event::Exited { id, status }).await,
            FromGuest::OutOfMemory => self.tell(events, Event::OutOfMemory).await,
            FromGuest::Credit { channel, bytes } => {
                lock(&self.0.streams).credited(channel, bytes).map_err(nonsense)?;
            }
        }
        Ok(())
    }

    /// A guest that tells more than is read waits.
    async fn tell(&self, events: &mpsc::Sender<Event>, event: Event) {
        // Nobody listens any more: the sandbox is being taken down.
        let _ending = events.send(event).await;
    }

    fn end(&self, why: String) {
        self.0.ended.send_replace(Some(why));
        lock(&self.0.waiting).clear();
        lock(&self.0.streams).clear();
    }
}

fn nonsense(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::internal("the guest broke the protocol and is not listened to any more").because(error)
}

fn from_guest(error: GuestError) -> Error {
    let kind = match error.kind {
        ErrorKind::Invalid => Kind::Invalid,
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::State => Kind::State,
        ErrorKind::Internal => Kind::Internal,
    };
    // The text is the guest's: long or unprintable ones are its fault, and cut.
    let text: String = error.text.chars().filter(|c| !c.is_control()).take(1000).collect();
    Error::new(kind, text)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write_all(mut write: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = queue.recv().await {
        // The reader learns of it, too, and says so.
        if write.write_all(&frame).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
