//! Programs started by tests: never without a time limit, and what they said is kept.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The exit code; 128 + the signal if a signal ended it.
    pub code: i32,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// This output if the program succeeded; else an error that quotes what it said.
    pub fn success(self) -> Result<Self> {
        self.expect(0)
    }

    /// This output if the program ended with that code; else an error that quotes what it said.
    pub fn expect(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!(
                "exit code {} instead of {code}\nstdout: {}\nstderr: {}",
                self.code,
                shortened(&self.text()),
                shortened(&self.errors())
            );
        }
        Ok(self)
    }
}

/// The end of a text that may be long.
pub fn shortened(text: &str) -> &str {
    const LIMIT: usize = 4000;
    let from = text.len().saturating_sub(LIMIT);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[from..].trim_end()
}

/// What is shared with the threads that read and wait.
#[derive(Default)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Streams that may still bring something.
    open: usize,
    status: Option<ExitStatus>,
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Heard)) {
        change(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until a look at what was heard finds something.
    fn wait<T>(&self, limit: Duration, mut look: impl FnMut(&mut Heard) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = look(&mut heard) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            heard = self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A running program. Dropping it kills it.
pub struct Running {
    name: String,
    pid: Pid,
    stdin: Option<ChildStdin>,
    shared: Arc<Shared>,
}

impl Running {
    /// Starts a program with pipes on its standard streams.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = described(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let pid = Pid::from_raw(i32::try_from(child.id()).context("reading a process id")?);
        let shared = Arc::new(Shared::default());
        shared.change(|heard| heard.open = 2);
        let stdin = child.stdin.take();
        if let Some(stdout) = child.stdout.take() {
            listen(stdout, Arc::clone(&shared), |heard| &mut heard.stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            listen(stderr, Arc::clone(&shared), |heard| &mut heard.stderr);
        }
        await_end(child, Arc::clone(&shared));
        Ok(Self { name, pid, stdin, shared })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Writes to its standard input, from a thread of its own: a program may write while it reads.
    pub fn feed(&mut self, bytes: Vec<u8>) -> Result<()> {
        let mut stdin = self.stdin.take().ok_or_else(|| anyhow!("{}: input was closed", self.name))?;
        // A program that stops reading has its reasons; its exit code tells.
        std::thread::spawn(move || stdin.write_all(&bytes));
        Ok(())
    }

    /// Writes a little to its standard input, which stays open.
    pub fn say(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().ok_or_else(|| anyhow!("{}: input was closed", self.name))?;
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).with_context(|| self.name.clone())
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// What it wrote to standard output until now.
    pub fn heard(&self) -> String {
        let heard = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&heard.stdout).into_owned()
    }

    /// Waits until its standard output contains a text, and returns all of it until then.
    pub fn wait_for(&self, wanted: &str, limit: Duration) -> Result<String> {
        let found = self.shared.wait(limit, |heard| {
            let text = String::from_utf8_lossy(&heard.stdout);
            let ended = heard.status.is_some() && heard.open == 0;
            (text.contains(wanted) || ended).then(|| text.into_owned())
        });
        match found {
            Some(text) if text.contains(wanted) => Ok(text),
            _ => bail!("{} did not write {wanted:?} within {limit:?}, but:\n{}", self.name, self.so_far()),
        }
    }

    /// What it wrote to both of its outputs until now, shortened.
    pub fn all_heard(&self) -> String {
        self.so_far()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let ended = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).status.is_some();
        if !ended {
            kill(self.pid, signal).with_context(|| format!("sending {signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner).status.is_some()
    }

    /// Waits for its end; a program that does not end in time is killed, which is an error.
    pub fn wait(mut self, limit: Duration) -> Result<Output> {
        self.close_input();
        self.wait_open(limit)
    }

    /// As [`wait`](Self::wait), with its standard input left as it is.
    pub fn wait_open(&mut self, limit: Duration) -> Result<Output> {
        let Some(status) = self.shared.wait(limit, |heard| heard.status) else {
            self.signal(Signal::SIGKILL)?;
            bail!("{} did not end within {limit:?}; it wrote:\n{}", self.name, self.so_far());
        };
        // Something that it started may hold its pipes for longer; then there is no more to be had.
        let grace = Duration::from_secs(5);
        let closed = self.shared.wait(grace, |heard| (heard.open == 0).then_some(()));
        if closed.is_none() {
            bail!("{} ended, but another process holds its output open", self.name);
        }
        let mut heard = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        Ok(Output {
            stdout: std::mem::take(&mut heard.stdout),
            stderr: std::mem::take(&mut heard.stderr),
            code,
        })
    }

    fn so_far(&self) -> String {
        let heard = self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let (out, err) = (String::from_utf8_lossy(&heard.stdout), String::from_utf8_lossy(&heard.stderr));
        format!("stdout: {}\nstderr: {}", shortened(&out), shortened(&err))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.signal(Signal::SIGKILL);
    }
}

fn listen(
    mut stream: impl Read + Send + 'static,
    shared: Arc<Shared>,
    into: impl Fn(&mut Heard) -> &mut Vec<u8> + Send + 'static,
) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            shared.change(|heard| into(heard).extend_from_slice(&buffer[..read]));
        }
        shared.change(|heard| heard.open -= 1);
    });
}

fn await_end(mut child: Child, shared: Arc<Shared>) {
    std::thread::spawn(move || {
        let status = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0xff00));
        shared.change(|heard| heard.status = Some(status));
    });
}

fn described(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs a program to its end, with nothing on its standard input.
pub fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    Running::start(command)?.wait(limit)
}

/// Runs a program that must succeed, and returns what it wrote.
pub fn text_of(command: &mut Command, limit: Duration) -> Result<String> {
    let name = described(command);
    Ok(run(command, limit)?.success().with_context(|| format!("running {name}"))?.text())
}
