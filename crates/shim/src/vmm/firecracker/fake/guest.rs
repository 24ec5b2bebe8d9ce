//! The vsock of the false Firecracker, and behind it a guest of a few lines that speaks our protocol.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bailey_types::guest::frame::{CONTROL, Decoder, encode};
use bailey_types::guest::message::{self, FromGuest, Request, Response, ToGuest};
use bailey_types::guest::{HOST_FRAME_MAX, VERSION, VSOCK_PORT};

/// What the guest and the VM around it share.
#[derive(Clone, Default)]
pub(super) struct Processors(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// When the guest listens.
    listens: Option<Instant>,
    paused: bool,
}

impl Processors {
    pub(super) fn boot(&self, takes: Duration) {
        self.with(|state| state.listens = Some(Instant::now() + takes));
    }

    pub(super) fn pause(&self, paused: bool) {
        self.with(|state| state.paused = paused);
    }

    pub(super) fn paused(&self) -> bool {
        self.with(|state| state.paused)
    }

    fn listens(&self) -> bool {
        self.with(|state| state.listens.is_some_and(|at| at <= Instant::now()))
    }

    fn wait(&self) {
        while self.paused() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves the socket for ever.
pub(super) fn serve(listener: UnixListener, processors: Processors, answer: &'static str) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let processors = processors.clone();
            thread::spawn(move || {
                // The host going away is no failure.
                let _gone = connection(stream, &processors, answer);
            });
        }
    });
}

fn connection(mut stream: UnixStream, processors: &Processors, answer: &str) -> std::io::Result<()> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < 32 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line != format!("CONNECT {VSOCK_PORT}\n").as_bytes() || !processors.listens() {
        return Ok(());
    }
    processors.wait();
    stream.write_all(answer.as_bytes())?;
    say(&mut stream, &FromGuest::Ready { version: VERSION })?;
    let mut decoder = Decoder::new(HOST_FRAME_MAX);
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => decoder.feed(&buffer[..count]),
        }
        while let Ok(Some(frame)) = decoder.next_frame() {
            processors.wait();
            if let Ok(ToGuest::Request { seq, request }) = message::decode(&frame.payload) {
                let response = match request {
                    Request::Create(_) | Request::Exec { .. } => Response::Started { pid: 42 },
                    Request::Pids => Response::Pids(vec![42]),
                    _ => Response::Done,
                };
                say(&mut stream, &FromGuest::Reply { seq, result: Ok(response) })?;
            }
        }
    }
}

fn say(stream: &mut UnixStream, message: &FromGuest) -> std::io::Result<()> {
    let mut frame = Vec::new();
    encode(CONTROL, &message::encode(message), &mut frame);
    stream.write_all(&frame)
}
