//! A bounded memory of what a guest's console, or the VMM itself, said last.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

/// How a kernel says that it gives up.
const PANIC: &str = "Kernel panic";

/// Bytes that are remembered.
const REMEMBERED: usize = 4096;

/// Bytes taken at once, and the pause after each: so a guest that babbles on its console costs next to nothing.
const TAKEN: usize = 1024;
const PAUSE: Duration = Duration::from_millis(5);

/// Longest wait for the last bytes of a stream whose writer has ended.
const DRAINED: Duration = Duration::from_millis(500);

/// Lines of each that are shown when a guest ends by itself.
const LAST_LINES: usize = 5;

/// What a VMM complained of and its guest's console showed last.
pub(crate) fn last_words(complaints: &Tail, console: &Tail) -> String {
    let words = [complaints, console].map(|tail| tail.lines(LAST_LINES));
    words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" | ")
}

/// The last bytes of a stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// Makes a stream whose other end a VMM writes to, and remembers what comes.
    pub(crate) fn listen() -> io::Result<(Tail, OwnedFd)> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut ours = UnixStream::from_std(ours)?;
        let tail = Tail::default();
        let memory = tail.clone();
        tokio::spawn(async move {
            let mut buffer = [0; TAKEN];
            while let Ok(count @ 1..) = ours.read(&mut buffer).await {
                memory.remember(&buffer[..count]);
                tokio::time::sleep(PAUSE).await;
            }
        });
        Ok((tail, theirs.into()))
    }

    /// Waits until all was read that was written before the writer ended, but not for long.
    pub(crate) async fn drained(&self) {
        // The reader's own copy goes when it has come to the end.
        let read = async {
            while Arc::strong_count(&self.0) > 1 {
                tokio::time::sleep(PAUSE).await;
            }
        };
        // What comes later than this is not worth the wait.
        let _late = tokio::time::timeout(DRAINED, read).await;
    }

    fn remember(&self, bytes: &[u8]) {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        memory.extend(bytes);
        let excess = memory.len().saturating_sub(REMEMBERED);
        memory.drain(..excess);
    }

    /// The last few lines, fit to be shown: control characters are the guest's, and are left out.
    pub(crate) fn lines(&self, count: usize) -> String {
        let memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = memory.iter().copied().collect();
        let text: String =
            String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\n' || !c.is_control()).collect();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        // What follows a panic's first line is addresses: the cause is in the line itself and those before it.
        let end = lines.iter().rposition(|line| line.contains(PANIC)).map_or(lines.len(), |line| line + 1);
        let lines = &lines[..end];
        lines[lines.len().saturating_sub(count)..].join(" | ")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn what_was_said_last_is_there_when_it_was_waited_for() {
        let (tail, theirs) = Tail::listen().unwrap();
        let mut theirs = StdStream::from(theirs);
        theirs.write_all(&vec![b'x'; 10 * TAKEN]).unwrap();
        theirs.write_all(b"\nlast").unwrap();
        drop(theirs);
        tail.drained().await;
        assert_eq!(tail.lines(1), "last");
    }

    #[test]
    fn a_panic_is_shown_by_its_cause() {
        let tail = Tail::default();
        tail.remember(b"no init\nKernel panic - not syncing: no init found\nCall Trace:\n 0x1\n 0x2\n 0x3\n");
        assert_eq!(tail.lines(2), "no init | Kernel panic - not syncing: no init found");
    }

    #[test]
    fn a_babbling_console_is_remembered_by_its_end_alone() {
        let tail = Tail::default();
        for n in 0..10_000 {
            tail.remember(format!("line {n}\x1b[31m\r\n").as_bytes());
        }
        assert_eq!(tail.lines(2), "line 9998[31m | line 9999[31m");
        assert!(tail.0.lock().unwrap().len() <= REMEMBERED);
    }
}
