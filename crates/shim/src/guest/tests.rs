//! A guest that misbehaves, at the other end of a socket.

use bailey_types::guest::{Stdio, WINDOW};
use tokio::io::AsyncWriteExt;

use super::*;

fn pair() -> (UnixStream, Guest, mpsc::Receiver<Event>) {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let (guest, events) = Guest::connect(ours);
    (theirs, guest, events)
}

async fn say(stream: &mut UnixStream, message: &FromGuest) {
    let mut frame = Vec::new();
    encode(CONTROL, &message::encode(message), &mut frame);
    stream.write_all(&frame).await.unwrap();
}

async fn say_on(stream: &mut UnixStream, channel: u32, bytes: &[u8]) {
    let mut frame = Vec::new();
    encode(channel, bytes, &mut frame);
    stream.write_all(&frame).await.unwrap();
}

const OUT: StreamId = StreamId { process: ProcessId::INIT, stdio: Stdio::Out };

#[tokio::test]
async fn a_guest_of_another_version_is_refused_with_the_remedy() {
    let (mut theirs, guest, _events) = pair();
    say(&mut theirs, &FromGuest::Ready { version: VERSION + 1 }).await;
    let error = guest.ready().await.unwrap_err().chain();
    assert!(error.contains("make the guest image again"), "{error}");
}

#[tokio::test]
async fn an_answer_reaches_who_asked() {
    let (mut theirs, guest, _events) = pair();
    let asking = guest.clone();
    let asked = tokio::spawn(async move { asking.request(Request::Pids).await });
    let result = Ok(Response::Pids(vec![7]));
    say(&mut theirs, &FromGuest::Reply { seq: 1, result }).await;
    assert_eq!(asked.await.unwrap().unwrap(), Response::Pids(vec![7]));
}

#[tokio::test]
async fn a_request_of_a_guest_that_ends_fails_with_the_reason() {
    let (theirs, guest, _events) = pair();
    let asking = guest.clone();
    let asked = tokio::spawn(async move { asking.request(Request::Pids).await });
    tokio::task::yield_now().await;
    drop(theirs);
    assert!(asked.await.unwrap().unwrap_err().chain().contains("closed"));
}

#[tokio::test]
async fn a_frame_too_long_ends_the_listening() {
    let (mut theirs, guest, _events) = pair();
    theirs.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    theirs.write_all(&0_u32.to_le_bytes()).await.unwrap();
    assert!(guest.ended().await.contains("broke the protocol"));
}

#[tokio::test]
async fn words_without_meaning_end_the_listening() {
    let (mut theirs, guest, _events) = pair();
    say_on(&mut theirs, CONTROL, b"\xff\xff\xff nonsense").await;
    assert!(guest.ended().await.contains("broke the protocol"));
}

#[tokio::test]
async fn a_stream_brings_what_was_said_and_then_its_end() {
    let (mut theirs, guest, _events) = pair();
    let mut output = guest.output(OUT);
    say_on(&mut theirs, OUT.channel(), b"hello").await;
    say_on(&mut theirs, OUT.channel(), b"").await;
    assert_eq!(output.next().await.unwrap(), b"hello");
    assert_eq!(output.next().await, None);
}

#[tokio::test]
async fn a_babbling_guest_is_held_to_its_window() {
    let (mut theirs, guest, _events) = pair();
    let _never_taken = guest.output(OUT);
    let babble = vec![0; GUEST_FRAME_MAX];
    for _ in 0..=WINDOW as usize / GUEST_FRAME_MAX {
        say_on(&mut theirs, OUT.channel(), &babble).await;
    }
    let why = guest.ended().await;
    assert!(why.contains("more on channel"), "{why}");
}

#[tokio::test]
async fn a_guest_that_grants_what_was_never_sent_is_found_out() {
    let (mut theirs, guest, _events) = pair();
    let _input = guest.input(ProcessId::INIT);
    let channel = StreamId { process: ProcessId::INIT, stdio: Stdio::In }.channel();
    say(&mut theirs, &FromGuest::Credit { channel, bytes: 1 }).await;
    let why = guest.ended().await;
    assert!(why.contains("took more"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_does_not_keep_its_host_waiting() {
    let (_theirs, guest, _events) = pair();
    let error = guest.request(Request::Pids).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.chain().contains("not answered"));
}

#[tokio::test]
async fn a_sender_waits_for_the_process_to_take() {
    let (_theirs, guest, _events) = pair();
    let input = guest.input(ProcessId::INIT);
    input.send(&vec![0; WINDOW as usize]).await.unwrap();
    let one_more = timeout(Duration::from_millis(20), input.send(b"x")).await;
    assert!(one_more.is_err(), "nothing was granted");
}
