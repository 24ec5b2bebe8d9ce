//! A program that takes a process's output, by containerd's protocol for `binary://`: it finds output at descriptor 3,
//! errors at 4, and closes 5 when it is ready. It is the operator's, as whoever speaks to containerd is, and runs on the
//! host as root.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::io::Sink;
use crate::error::{Context, Error, Kind, Result};

/// Longest wait until the program is ready, and, once its input has ended, until it has.
const READY: Duration = Duration::from_secs(10);
const ENDING: Duration = Duration::from_secs(12);

/// Puts what arrives as the standard streams to where the protocol wants it: a program can be started with no other
/// descriptors by safe means.
const ARRANGE: &str = "exec 3<&0 4<&1 5>&2 </dev/null >/dev/null 2>&1; exec \"$@\"";

/// Held by those that write to the program.
#[derive(Clone)]
pub(super) struct Program {
    /// When the last of these is gone, its input has ended.
    open: mpsc::Sender<()>,
    ended: watch::Receiver<bool>,
}

impl Program {
    /// Gives up writing, and waits for the program's end, which may be that of another writer first.
    pub(super) async fn finish(self) {
        let mut ended = self.ended;
        drop(self.open);
        // The sender is gone if the shim ends: then nobody waits.
        let _over = ended.wait_for(|ended| *ended).await;
    }
}

/// Starts the program that `uri` names for a process; gives where its output goes, and its errors.
pub(super) async fn start(uri: &str, namespace: &str, id: &str) -> Result<(Sink, Sink)> {
    let doing = || format!("starting {uri} for the container's output");
    let mut words =
        words(uri).ok_or_else(|| Error::invalid(format!("{uri} names no program by an absolute path")))?;
    let pair = || -> io::Result<(OwnedFd, pipe::Sender)> {
        let (theirs, ours) = io::pipe()?;
        Ok((theirs.into(), pipe::Sender::from_owned_fd(ours.into())?))
    };
    let ((output, our_output), (errors, our_errors)) = (pair().context(doing)?, pair().context(doing)?);
    let (ready, its_ready) = io::pipe().context(doing)?;
    let program = words.front().cloned().unwrap_or_default();
    if !std::path::Path::new(&program).is_file() {
        return Err(Error::invalid(format!("there is no program {program} for the container's output")));
    }
    let mut child = Command::new("/bin/sh")
        .args(["-c", ARRANGE, "sh"])
        .args(words.drain(..))
        .env_clear()
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .current_dir("/")
        .stdin(Stdio::from(output))
        .stdout(Stdio::from(errors))
        .stderr(Stdio::from(OwnedFd::from(its_ready)))
        .spawn()
        .context(doing)?;
    until_ready(&mut child, ready.into(), &program).await?;
    let (open, mut closed) = mpsc::channel(1);
    let (tell, ended) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ended = child.wait() => {}
            // Nothing is ever sent: this is the end of the last writer.
            _closed = closed.recv() => {
                if timeout(ENDING, child.wait()).await.is_err() {
                    tracing::warn!("the program {program} for the container's output does not end: it is killed");
                    let _gone = child.kill().await;
                }
            }
        }
        tell.send_replace(true);
    });
    let program = Program { open, ended };
    Ok((Sink::Program(our_output, program.clone()), Sink::Program(our_errors, program)))
}

async fn until_ready(child: &mut Child, ready: OwnedFd, program: &str) -> Result<()> {
    let mut ready = pipe::Receiver::from_owned_fd(ready).context(|| format!("waiting for {program}"))?;
    let said = timeout(READY, ready.read(&mut [0])).await;
    if said.is_err() {
        let _gone = child.kill().await;
        let text = format!("{program} did not become ready for the container's output within {READY:?}");
        return Err(Error::new(Kind::Unavailable, text));
    }
    // One that ends closes all of its descriptors, too.
    match timeout(Duration::from_millis(20), child.wait()).await {
        Ok(Ok(status)) if !status.success() => Err(Error::invalid(format!(
            "{program}, which was to take the container's output, ended: {status}"
        ))),
        _ => Ok(()),
    }
}

/// The program of a URI, and its arguments: names and values of the query, in their order.
fn words(uri: &str) -> Option<VecDeque<String>> {
    let rest = uri.strip_prefix("binary://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut words = VecDeque::from([decode(path, false)?]);
    if !words[0].starts_with('/') || words[0].contains('\0') {
        return None;
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        words.extend([decode(name, true)?, decode(value, true)?]);
    }
    Some(words)
}

/// Undoes the escapes of a URI.
fn decode(text: &str, query: bool) -> Option<String> {
    let (mut bytes, mut out) = (text.bytes(), Vec::new());
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' if query => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_a_program_with_arguments() {
        let read = |uri| words(uri).map(Vec::from);
        let expected = ["/bin/my logger", "a", "b c", "flag", "", "d", "1+1=2"].map(str::to_owned).to_vec();
        assert_eq!(read("binary:///bin/my%20logger?a=b+c&flag&d=1%2B1=2"), Some(expected));
        for wrong in
            ["binary://logger", "binary://", "file:///bin/logger", "binary:///a%2", "binary:///a%00b"]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
