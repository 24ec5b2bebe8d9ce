//! The way to the guest: a connection to its vsock, through the socket that Firecracker has for that.
//!
//! The host says `CONNECT <port>` and a newline, Firecracker answers `OK <its port>` and a newline when the guest has
//! accepted, and from then on the stream is the guest's. It closes the connection when nobody listens there (yet).

use std::io;
use std::time::Duration;

use bailey_types::guest::VSOCK_PORT;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::place::Root;
use super::requests::VSOCK;
use crate::error::{Error, Result};

/// Longest answer: `OK 4294967295` and a newline, in bytes.
const ANSWER_MAX: usize = 14;

/// Pauses between attempts: a clone listens at once, a kernel boots for a while.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Connects to the guest's port, as often as it takes. Never ends when the guest never listens.
pub(super) async fn connect(root: &Root) -> Result<UnixStream> {
    let mut pause = PAUSE_MIN;
    loop {
        let mut stream = root.connect(VSOCK).await?;
        if greet(&mut stream).await? {
            return Ok(stream);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Asks for the port. False when the connection was closed instead of an answer.
async fn greet(stream: &mut UnixStream) -> Result<bool> {
    match exchange(stream).await {
        Ok(answer) => match answer.strip_prefix(b"OK ").map(|port| (port.len(), port)) {
            Some((1.., port)) if port.iter().all(u8::is_ascii_digit) => Ok(true),
            _ => {
                let text = "Firecracker's vsock answered with something other than OK and a port";
                Err(Error::internal(text))
            }
        },
        Err(_closed) => Ok(false),
    }
}

/// The answer's line. Read byte by byte: what follows it is the guest's.
async fn exchange(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    while answer.len() < ANSWER_MAX {
        match stream.read_u8().await? {
            b'\n' => return Ok(answer),
            byte => answer.push(byte),
        }
    }
    // Too long; the caller sees that it is no answer.
    answer.clear();
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn greeted(answer: &[u8]) -> Result<bool> {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer).await.unwrap();
        theirs.shutdown().await.unwrap();
        greet(&mut ours).await
    }

    #[tokio::test]
    async fn only_ok_and_a_port_open_the_channel() {
        assert!(greeted(b"OK 1073741824\n").await.unwrap());
        assert!(greeted(b"OK 4294967295\n").await.unwrap());
        for closed in [b"".as_slice(), b"OK", b"OK 12"] {
            assert!(!greeted(closed).await.unwrap());
        }
        for nonsense in
            [b"OK \n".as_slice(), b"OK x\n", b"NO 1\n", b"\n", b"OK 00000000000000000001\n", &[b'x'; 100]]
        {
            assert!(greeted(nonsense).await.is_err(), "{nonsense:?}");
        }
    }

    #[tokio::test]
    async fn what_the_guest_says_right_after_is_not_lost() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"OK 7\nhello").await.unwrap();
        theirs.shutdown().await.unwrap();
        assert!(greet(&mut ours).await.unwrap());
        let mut rest = String::new();
        ours.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }
}
