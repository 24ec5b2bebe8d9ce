//! Firecracker's API: HTTP/1.1 with JSON on a Unix socket, one request after the other.
//!
//! What answers may be a Firecracker that its guest has taken over: every length and every wait has a limit.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Context, Error, Kind, Result};

/// Longest head and body of an answer, in bytes: the real ones are a hundred.
const HEAD_MAX: usize = 8 << 10;
const BODY_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 32;

/// Longest fault message that is shown, in characters.
const FAULT_MAX: usize = 1000;

/// The oldest version whose API is as this driver uses it: see `docs/firecracker.md`.
const OLDEST: (u32, u32) = (1, 7);

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) body: Option<Value>,
}

impl Request {
    pub(super) fn put(path: &'static str, body: Value) -> Request {
        Request { method: "PUT", path, body: Some(body) }
    }

    pub(super) fn patch(path: &'static str, body: Value) -> Request {
        Request { method: "PATCH", path, body: Some(body) }
    }

    fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn bytes(&self) -> Vec<u8> {
        let body = self.body.as_ref().map(Value::to_string).unwrap_or_default();
        let mut head = format!("{} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n", self.line());
        if self.body.is_some() {
            head.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        head.push_str(&body);
        head.into_bytes()
    }
}

/// A connection to the API.
pub(super) struct Api {
    /// None after a failure, when nobody knows what would come next.
    stream: Option<UnixStream>,
}

impl Api {
    pub(super) fn new(stream: UnixStream) -> Api {
        Api { stream: Some(stream) }
    }

    /// Whether an answer failed to come, so that there will be no more.
    pub(super) fn is_lost(&self) -> bool {
        self.stream.is_none()
    }

    /// Makes a request, and gives the body of the answer.
    pub(super) async fn ask(&mut self, request: &Request, patience: Duration) -> Result<Vec<u8>> {
        let failed = |error: Error| {
            Error::internal(format!("asking {} of Firecracker", request.line())).because(error)
        };
        let Some(mut stream) = self.stream.take() else {
            return Err(failed(Error::internal("its API failed earlier")));
        };
        let answer = timeout(patience, exchange(&mut stream, &request.bytes())).await;
        let (status, body) = answer
            .unwrap_or_else(|_| {
                let text = format!("it has not answered for {} s", patience.as_secs_f32());
                Err(Error::new(Kind::Unavailable, text))
            })
            .map_err(failed)?;
        self.stream = Some(stream);
        if (200..300).contains(&status) { Ok(body) } else { Err(refused(request, status, &body)) }
    }

    /// Refuses a Firecracker that is too old.
    pub(super) async fn check_version(&mut self, patience: Duration) -> Result<()> {
        let request = Request { method: "GET", path: "/version", body: None };
        let body = self.ask(&request, patience).await?;
        let answer: Option<Value> = serde_json::from_slice(&body).ok();
        let version = answer.as_ref().and_then(|answer| answer["firecracker_version"].as_str()).unwrap_or("");
        let mut numbers = version.trim_start_matches('v').split('.').map_while(|part| part.parse().ok());
        match (numbers.next(), numbers.next()) {
            (Some(major), Some(minor)) if (major, minor) >= OLDEST && major == OLDEST.0 => Ok(()),
            _ => {
                let text = format!(
                    "Firecracker says that its version is {:?}: install version 1.7 to 1.17, with the jailer of the same version",
                    shown(version, 40)
                );
                Err(Error::new(Kind::Unavailable, text))
            }
        }
    }
}

async fn exchange(stream: &mut UnixStream, request: &[u8]) -> Result<(u16, Vec<u8>)> {
    stream.write_all(request).await.context(|| "writing".into())?;
    let mut got = Vec::new();
    let (status, start, length) = loop {
        if let Some(head) = parse(&got)? {
            break head;
        }
        if got.len() >= HEAD_MAX {
            return Err(nonsense(&format!("a head of more than {HEAD_MAX} bytes")));
        }
        read_some(stream, &mut got, HEAD_MAX).await?;
    };
    if length > BODY_MAX {
        return Err(nonsense(&format!("a body of {length} bytes, where {BODY_MAX} are allowed")));
    }
    while got.len() < start + length {
        read_some(stream, &mut got, start + length).await?;
    }
    if got.len() > start + length {
        return Err(nonsense("more than one answer"));
    }
    Ok((status, got.split_off(start)))
}

async fn read_some(stream: &mut UnixStream, got: &mut Vec<u8>, upto: usize) -> Result<()> {
    let room = upto.saturating_sub(got.len());
    let mut limited = stream.take(room as u64);
    match limited.read_buf(got).await.context(|| "reading the answer".into())? {
        0 => Err(Error::internal("it closed the connection before it had answered")),
        _ => Ok(()),
    }
}

/// The status, where the body starts, and its length; none when the head is not whole yet.
fn parse(got: &[u8]) -> Result<Option<(u16, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let start = match response.parse(got) {
        Ok(httparse::Status::Complete(start)) => start,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(nonsense("no HTTP").because(error)),
    };
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = length.map_or(Some(0), |header| std::str::from_utf8(header.value).ok()?.trim().parse().ok());
    match (response.code, length) {
        (Some(status), Some(length)) => Ok(Some((status, start, length))),
        _ => Err(nonsense("a length that is no number")),
    }
}

fn nonsense(what: &str) -> Error {
    Error::internal(format!("its answer makes no sense: {what}"))
}

/// An answer that says no: what was asked, the fault message, what to do.
fn refused(request: &Request, status: u16, body: &[u8]) -> Error {
    let answer: Option<Value> = serde_json::from_slice(body).ok();
    let fault = answer.as_ref().and_then(|answer| answer["fault_message"].as_str());
    let fault = fault.map_or_else(|| "it gave no reason".to_owned(), |fault| shown(fault, FAULT_MAX));
    let (kind, remedy) = remedy(request.path, &fault);
    Error::new(
        kind,
        format!("Firecracker refused {} with status {status}: {fault}: {remedy}", request.line()),
    )
}

fn remedy(path: &str, fault: &str) -> (Kind, &'static str) {
    if fault.to_ascii_lowercase().contains("kvm") {
        let text = "it needs a KVM that truly works: on this host set vmm = \"qemu\"";
        return (Kind::Unavailable, text);
    }
    let text = match path {
        "/boot-source" => "make the guest image again with `cargo xtask guest-image`",
        "/machine-config" => "ask for memory and processors that Firecracker can give",
        "/snapshot/load" => "drop the namespace's templates (drop-templates), then try again",
        _ => "see that its version is 1.7 to 1.17 and that the disk is not full",
    };
    (Kind::Internal, text)
}

/// Words of others, fit to be shown.
fn shown(text: &str, longest: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(longest).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    async fn ask_one_that_says(answer: Vec<u8>) -> Result<Vec<u8>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let says = tokio::spawn(async move {
            let mut request = [0; 4096];
            let _count = theirs.read(&mut request).await.unwrap();
            // It is not listened to to the end when it makes no sense.
            let _cut = theirs.write_all(&answer).await;
        });
        let request = Request::put("/drives/root", json!({"drive_id": "root"}));
        let answer = Api::new(ours).ask(&request, Duration::from_secs(5)).await;
        says.abort();
        answer
    }

    #[tokio::test]
    async fn an_answer_is_read_whole() {
        let answer = ask_one_that_says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}".to_vec()).await;
        assert_eq!(answer.unwrap(), b"{}");
        assert!(ask_one_that_says(b"HTTP/1.1 204 \r\n\r\n".to_vec()).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_refused_within_limits() {
        let endless_head = [b"HTTP/1.1 200 OK\r\n".to_vec(), b"A: b\r\n".repeat(5000)].concat();
        let one_long_header = [b"HTTP/1.1 200 OK\r\nA: ".to_vec(), vec![b'b'; 1 << 20]].concat();
        for (answer, why) in [
            (b"nonsense\r\n\r\n".to_vec(), "no HTTP"),
            (vec![0xff; 100], "no HTTP"),
            (endless_head, "no HTTP"),
            (one_long_header, "head of more than"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".to_vec(), "body of"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n".to_vec(), "no number"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}".to_vec(), "closed the connection"),
            (b"HTTP/1.1 204 \r\n\r\nHTTP/1.1 204 \r\n\r\n".to_vec(), "more than one"),
            (Vec::new(), "closed the connection"),
        ] {
            let error = ask_one_that_says(answer).await.unwrap_err().chain();
            assert!(error.contains(why), "{error}");
            assert!(error.contains("PUT /drives/root"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_refusal_names_the_request_the_fault_and_the_remedy() {
        let answer = |fault: &str| {
            let body = json!({ "fault_message": fault }).to_string();
            format!("HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
        };
        let error = ask_one_that_says(answer("no such file\u{1b}[31m")).await.unwrap_err();
        assert_eq!(
            error.chain(),
            "Firecracker refused PUT /drives/root with status 400: no such file[31m: \
             see that its version is 1.7 to 1.17 and that the disk is not full"
        );
        let error = ask_one_that_says(answer("Error creating KVM object")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.chain().contains("vmm = \"qemu\""));
        let long = ask_one_that_says(answer(&"x".repeat(5000))).await.unwrap_err().chain();
        assert!(long.len() < 1500, "{}", long.len());
    }

    #[tokio::test]
    async fn only_versions_whose_api_is_known_are_driven() {
        for (version, driven) in
            [("1.7.0", true), ("1.17.0-dev", true), ("1.6.0", false), ("2.0.0", false), ("x", false)]
        {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let body = json!({ "firecracker_version": version }).to_string();
            let answer = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
            theirs.write_all(answer.as_bytes()).await.unwrap();
            let checked = Api::new(ours).check_version(Duration::from_secs(5)).await;
            assert_eq!(checked.is_ok(), driven, "{version}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_never_answers_is_not_waited_for_and_not_asked_again() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut api = Api::new(ours);
        let request = Request::patch("/vm", json!({"state": "Paused"}));
        let error = api.ask(&request, Duration::from_secs(10)).await.unwrap_err().chain();
        assert!(error.contains("PATCH /vm") && error.contains("not answered for 10 s"), "{error}");
        let error = api.ask(&request, Duration::from_secs(10)).await.unwrap_err().chain();
        assert!(error.contains("failed earlier"), "{error}");
    }
}
