//! QEMU's machine protocol: one request at a time, over a connected socket.
//!
//! Contract: QEMU's `docs/interop/qmp-spec.txt`. QEMU may have been taken over by its guest: what it says is bounded,
//! and nothing of it is believed beyond the answer to our own question.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Context, Error, Result};

/// Longest line that is read, in bytes.
const LINE_MAX: u64 = 1 << 20;

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// How often a save is looked at until it is done.
const POLL: Duration = Duration::from_millis(1);

pub(super) struct Monitor {
    stream: BufReader<UnixStream>,
    greeted: bool,
}

impl Monitor {
    pub(super) fn new(stream: UnixStream) -> Monitor {
        Monitor { stream: BufReader::new(stream), greeted: false }
    }

    /// Asks, and gives the answer's `return`.
    pub(super) async fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let doing = || format!("asking QEMU to {command}");
        timeout(ANSWER, self.ask_patiently(command, arguments)).await.context(doing)?
    }

    async fn ask_patiently(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.greet().await?;
        self.exchange(command, arguments).await
    }

    /// The greeting comes by itself, and is answered once.
    async fn greet(&mut self) -> Result<()> {
        if !self.greeted {
            self.line().await?;
            self.greeted = true;
            self.exchange("qmp_capabilities", json!({})).await?;
        }
        Ok(())
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let doing = || format!("asking QEMU to {command}");
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.stream.get_mut().write_all(text.as_bytes()).await.context(doing)?;
        self.answer(command).await
    }

    async fn answer(&mut self, command: &str) -> Result<Value> {
        loop {
            let mut line = self.line().await?;
            if let Some(error) = line.get("error") {
                let text = error.get("desc").and_then(Value::as_str).unwrap_or("it did not say why");
                return Err(Error::internal(format!("QEMU did not {command}")).because(text));
            }
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    async fn line(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        let doing = || "reading QEMU's answer".to_owned();
        let count = (&mut self.stream).take(LINE_MAX).read_until(b'\n', &mut line).await.context(doing)?;
        if count == 0 {
            return Err(Error::internal("QEMU has closed its monitor"));
        }
        serde_json::from_slice(&line).context(doing)
    }

    /// Saves the devices into `file`, the guest being stopped.
    pub(super) async fn save(&mut self, file: &File) -> Result<()> {
        self.leave_memory_alone().await?;
        self.pass(file, "getfd", json!({"fdname": "state"})).await?;
        self.ask("migrate", json!({"uri": "fd:state"})).await?;
        loop {
            let answer = self.ask("query-migrate", json!({})).await?;
            match answer.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") | None => {
                    return Err(Error::internal(format!("QEMU did not save the VM: {answer}")));
                }
                Some(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Loads devices that were saved, from a descriptor that QEMU was started with. Then the machine runs.
    pub(super) async fn load(&mut self, fd: RawFd) -> Result<()> {
        self.leave_memory_alone().await?;
        self.ask("migrate-incoming", json!({"uri": format!("fd:{fd}")})).await.map(drop)
    }

    /// What is saved and loaded is of devices alone: the memory is a file that both sides map.
    async fn leave_memory_alone(&mut self) -> Result<()> {
        let capability = json!({"capability": "x-ignore-shared", "state": true});
        self.ask("migrate-set-capabilities", json!({"capabilities": [capability]})).await.map(drop)
    }

    /// Asks for something to be done with a descriptor, which goes with the request.
    pub(super) async fn pass(&mut self, file: &File, command: &str, arguments: Value) -> Result<Value> {
        self.greet().await?;
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        let stream = self.stream.get_mut();
        let fds = [file.as_raw_fd()];
        let send = || {
            let rights = [ControlMessage::ScmRights(&fds)];
            let parts = [IoSlice::new(text.as_bytes())];
            let sent = sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None);
            sent.map_err(std::io::Error::from)
        };
        stream.async_io(Interest::WRITABLE, send).await.context(|| "handing QEMU a descriptor".into())?;
        self.answer(command).await
    }
}
