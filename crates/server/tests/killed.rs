//! `kill -9` in the middle of writes: what was acknowledged is there afterwards, and nothing is there by half.
//!
//! The process that is killed is this test program itself, started again for the one test that writes.
#![allow(clippy::unwrap_used, reason = "this is a test: what fails, fails it")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bailey_server::store::clock::TokioClock;
use bailey_server::store::embedded::{EmbeddedStore, Options};
use bailey_server::store::{Event, Key, Op, Prefix, Revision, Store, Txn};

/// Names the store to a process that shall be killed.
const PLACE: &str = "BAILEY_TEST_KILLED_STORE";
const ROUNDS: u64 = 40;
const WRITERS: usize = 4;

fn key(text: String) -> Key {
    Key::new(text).unwrap()
}

async fn open(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path, Options::default(), Arc::new(TokioClock::new())).await.unwrap()
}

async fn number(store: &EmbeddedStore, name: String) -> u64 {
    let item = store.get(&key(name)).await.unwrap().item;
    item.map_or(0, |item| std::str::from_utf8(&item.value).unwrap().trim_end_matches('.').parse().unwrap())
}

/// Does nothing unless it was started to be killed: then it counts up in the store, and says each number once it was
/// acknowledged.
#[test]
fn the_one_that_is_killed() {
    let Some(path) = std::env::var_os(PLACE).map(PathBuf::from) else { return };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    runtime.block_on(async {
        let store = Arc::new(open(&path).await);
        let writers: Vec<_> =
            (0..WRITERS).map(|writer| tokio::spawn(count_up(Arc::clone(&store), writer))).collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

async fn count_up(store: Arc<EmbeddedStore>, writer: usize) {
    let mut count = number(&store, format!("left/{writer}")).await;
    loop {
        count += 1;
        // Of several pages now and then, so that there is more to be torn.
        let filling = if count.is_multiple_of(7) { 20_000 } else { 0 };
        let value = format!("{count}{}", ".".repeat(filling));
        let put = |side: &str| Op::Put {
            key: key(format!("{side}/{writer}")),
            value: value.clone().into(),
            lease: None,
        };
        let txn = Txn { then: vec![put("left"), put("right")], ..Txn::default() };
        let revision = store.transact(txn).await.unwrap().revision;
        // At once: half a line would be read as another number.
        let line = format!("acknowledged {writer} {count} {revision}\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        if writer == 0 && count.is_multiple_of(50) {
            store.compact(Revision(revision.0 - 20)).await.unwrap();
        }
    }
}

fn start(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["the_one_that_is_killed", "--exact", "--nocapture"])
        .env(PLACE, path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[derive(Default)]
struct Acknowledged {
    counts: [u64; WRITERS],
    revision: u64,
}

impl Acknowledged {
    fn read(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("acknowledged ") else { return };
        let numbers: Vec<u64> = rest.split(' ').map(|text| text.parse().unwrap()).collect();
        self.counts[usize::try_from(numbers[0]).unwrap()] = numbers[1];
        self.revision = self.revision.max(numbers[2]);
    }
}

#[test]
fn what_was_acknowledged_outlives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut acknowledged = Acknowledged::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    for round in 0..ROUNDS {
        let mut child = start(&path);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ms = round * 7919 % 150;
        if round.is_multiple_of(8) {
            // While it opens, or makes, the store.
            std::thread::sleep(Duration::from_millis(ms / 4));
        } else {
            // Only once it writes.
            acknowledged.read(&lines.next().expect("it writes").unwrap());
            let until = Instant::now() + Duration::from_millis(ms);
            while Instant::now() < until {
                acknowledged.read(&lines.next().expect("it goes on").unwrap());
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died.
        lines.for_each(|line| acknowledged.read(&line.unwrap()));
        runtime.block_on(check(&path, round, &mut acknowledged));
    }
    assert!(acknowledged.revision > ROUNDS, "it has written {} revisions only", acknowledged.revision);
}

async fn check(path: &Path, round: u64, acknowledged: &mut Acknowledged) {
    let store = open(path).await;
    let newest = store.get(&key("any".to_owned())).await.unwrap().revision;
    assert!(newest.0 >= acknowledged.revision, "round {round}: at {newest} after {}", acknowledged.revision);
    for (writer, count) in (0..).zip(&mut acknowledged.counts) {
        let left = number(&store, format!("left/{writer}")).await;
        let right = number(&store, format!("right/{writer}")).await;
        assert_eq!(left, right, "round {round}: half a transaction");
        assert!(left == *count || left == *count + 1, "round {round}: {left} after {count}");
        *count = left;
    }
    // History is whole, too: each revision has both sides.
    let first = Revision(newest.0.saturating_sub(10).max(1));
    if newest.0 > 0 {
        let mut watch = store.watch(&Prefix::all(), first).await.unwrap();
        for revision in first.0..=newest.0 {
            let batch = watch.next().await.unwrap();
            assert_eq!((batch.revision, batch.events.len()), (Revision(revision), 2), "round {round}");
            assert!(batch.events.iter().all(|event| matches!(event, Event::Put(_))));
        }
    }
    store.close().await.unwrap();
}
