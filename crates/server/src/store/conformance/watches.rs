//! Watches: all of it, in order, each once.

use std::sync::Arc;
use std::time::Duration;

use super::{Harness, always, key, next, prefix, put, put_op, short};
use crate::store::{Batch, ErrorKind, Op, Prefix, Revision, Store, Txn, Watch};

/// Writes from several tasks at once, and returns the last revision.
async fn write_at_once(store: &Arc<dyn Store>, tasks: usize, times: usize) -> Revision {
    let write = |task: usize, store: Arc<dyn Store>| async move {
        for time in 0..times {
            let own = format!("own/{task}");
            let shared = format!("shared/{}", time % 3);
            let ops = match time % 4 {
                3 => vec![Op::Delete(key(&own)), put_op(&shared, &own)],
                _ => vec![put_op(&own, &time.to_string()), put_op(&shared, &own)],
            };
            store.transact(always(ops)).await.unwrap();
        }
    };
    let running: Vec<_> = (0..tasks).map(|task| tokio::spawn(write(task, Arc::clone(store)))).collect();
    for task in running {
        task.await.unwrap();
    }
    store.get(&key("any")).await.unwrap().revision
}

/// Reads a watch up to a revision, which must have something for it.
async fn read_to(mut watch: Box<dyn Watch>, last: Revision) -> Vec<Batch> {
    let mut batches = Vec::new();
    while batches.last().is_none_or(|batch: &Batch| batch.revision < last) {
        batches.push(next(&mut watch).await);
    }
    batches
}

pub(crate) async fn every_watcher_sees_all_in_order(harness: &mut impl Harness) {
    const TASKS: usize = 8;
    const TIMES: usize = 20;
    let store = harness.store();
    put(&*store, "shared/first", "").await;
    let last = Revision(1 + (TASKS * TIMES) as u64);
    let mut watchers = Vec::new();
    for from in [0, 1, 2, 60] {
        let watch = store.watch(&prefix("shared/"), Revision(from)).await.unwrap();
        watchers.push((from, tokio::spawn(read_to(watch, last))));
    }
    let writing = tokio::spawn({
        let store = Arc::clone(&store);
        async move { write_at_once(&store, TASKS, TIMES).await }
    });
    // Some come while it is written, and begin in the past.
    for from in [1, 7, 33] {
        put(&*store, "elsewhere", "").await;
        let watch = store.watch(&prefix("shared/"), Revision(from)).await.unwrap();
        watchers.push((from, tokio::spawn(read_to(watch, last))));
    }
    let end = writing.await.unwrap();
    let late = store.watch(&prefix("shared/"), Revision(1)).await.unwrap();
    let all = read_to(late, last).await;
    assert!(all.windows(2).all(|pair| pair[0].revision < pair[1].revision));
    assert!(end >= last);
    for (from, watcher) in watchers {
        let seen = watcher.await.unwrap();
        let expected: Vec<&Batch> = all.iter().filter(|batch| batch.revision.0 >= from).collect();
        let up_to = seen.len().min(expected.len());
        assert_eq!(seen[..up_to].iter().collect::<Vec<_>>(), expected[..up_to], "from {from}");
        assert_eq!(seen.len(), expected.len(), "from {from}");
    }
}

pub(crate) async fn a_watcher_sees_its_prefix_only(harness: &mut impl Harness) {
    let store = harness.store();
    let mut one = store.watch(&prefix("a/"), Revision(1)).await.unwrap();
    let mut all = store.watch(&Prefix::all(), Revision(1)).await.unwrap();
    store.transact(always(vec![put_op("b", "0"), put_op("a/2", "2"), put_op("a/1", "1")])).await.unwrap();
    put(&*store, "a", "not below").await;
    store.transact(always(vec![Op::DeletePrefix(prefix("a/"))])).await.unwrap();
    assert_eq!(short(&next(&mut one).await), "1 +a/1=1 +a/2=2");
    assert_eq!(short(&next(&mut one).await), "3 -a/1 -a/2");
    assert_eq!(short(&next(&mut all).await), "1 +a/1=1 +a/2=2 +b=0");
    assert_eq!(short(&next(&mut all).await), "2 +a=not below");
    assert_eq!(short(&next(&mut all).await), "3 -a/1 -a/2");
}

pub(crate) async fn a_watch_can_begin_in_the_future(harness: &mut impl Harness) {
    let store = harness.store();
    let mut watch = store.watch(&Prefix::all(), Revision(3)).await.unwrap();
    for value in ["1", "2", "3", "4"] {
        put(&*store, "a", value).await;
    }
    assert_eq!(short(&next(&mut watch).await), "3 +a=3");
    assert_eq!(short(&next(&mut watch).await), "4 +a=4");
}

pub(crate) async fn a_slow_watcher_misses_nothing_or_is_told(harness: &mut impl Harness) {
    let store = harness.store();
    let mut patient = store.watch(&prefix("shared/"), Revision(1)).await.unwrap();
    let mut late = store.watch(&prefix("shared/"), Revision(1)).await.unwrap();
    let last = write_at_once(&store, 8, 40).await;
    for revision in 1..=last.0 {
        assert_eq!(next(&mut patient).await.revision, Revision(revision));
    }
    let middle = last.0 / 2;
    store.compact(Revision(middle)).await.unwrap();
    // It may still have what it did not read. If not, it is told, and never given something behind a gap.
    let mut expected = 1;
    loop {
        match tokio::time::timeout(super::LONG, late.next()).await.expect("something must come") {
            Ok(batch) => assert_eq!(batch.revision, Revision(expected)),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Compacted);
                assert_eq!(late.next().await.unwrap_err().kind(), ErrorKind::Compacted);
                break;
            }
        }
        if expected == last.0 {
            break;
        }
        expected += 1;
    }
    let watch = store.watch(&prefix("shared/"), Revision(middle).next()).await.unwrap();
    let rest = read_to(watch, last).await;
    assert_eq!(rest.len() as u64, last.0 - middle);
}

pub(crate) async fn what_is_compacted_cannot_be_watched(harness: &mut impl Harness) {
    let store = harness.store();
    for value in ["1", "2", "3"] {
        put(&*store, "a", value).await;
    }
    store.compact(Revision(2)).await.unwrap();
    for from in [0, 1, 2] {
        let error = store.watch(&Prefix::all(), Revision(from)).await.err().expect("it is compacted");
        assert_eq!(error.kind(), ErrorKind::Compacted);
        assert!(error.to_string().contains("before 3 has been compacted"), "{error}");
    }
    let mut watch = store.watch(&Prefix::all(), Revision(3)).await.unwrap();
    assert_eq!(short(&next(&mut watch).await), "3 +a=3");
}

pub(crate) async fn compaction_does_not_disturb_who_waits(harness: &mut impl Harness) {
    let store = harness.store();
    let mut idle = store.watch(&prefix("idle/"), Revision(1)).await.unwrap();
    let begun = tokio::time::timeout(Duration::from_secs(1), idle.next()).await;
    assert!(begun.is_err(), "there is nothing for it yet");
    for count in 0..50 {
        put(&*store, "busy", &count.to_string()).await;
    }
    store.compact(Revision(50)).await.unwrap();
    put(&*store, "idle/a", "now").await;
    assert_eq!(short(&next(&mut idle).await), "51 +idle/a=now");
}

pub(crate) async fn a_dropped_wait_loses_nothing(harness: &mut impl Harness) {
    let store = harness.store();
    let mut watch = store.watch(&Prefix::all(), Revision(1)).await.unwrap();
    let writing = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for count in 0..60 {
                put(&*store, "a", &count.to_string()).await;
            }
        }
    });
    let mut seen = 0;
    while seen < 60 {
        tokio::select! {
            biased;
            batch = watch.next() => {
                seen += 1;
                assert_eq!(batch.unwrap().revision, Revision(seen));
            }
            // Ready at once: each wait is dropped after one look.
            () = tokio::task::yield_now() => {}
        }
    }
    writing.await.unwrap();
}

pub(crate) async fn a_watch_goes_on_after_a_restart_from_where_it_was(harness: &mut impl Harness) {
    let store = harness.store();
    for value in ["1", "2", "3"] {
        put(&*store, "a", value).await;
    }
    let mut watch = store.watch(&Prefix::all(), Revision(1)).await.unwrap();
    let seen = next(&mut watch).await.revision;
    drop((watch, store));
    harness.reopen().await;
    let store = harness.store();
    let mut watch = store.watch(&Prefix::all(), seen.next()).await.unwrap();
    assert_eq!(short(&next(&mut watch).await), "2 +a=2");
    assert_eq!(short(&next(&mut watch).await), "3 +a=3");
    store.transact(Txn::delete(key("a"))).await.unwrap();
    assert_eq!(short(&next(&mut watch).await), "4 -a");
}

pub(crate) async fn closing_ends_a_watch(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "a", "1").await;
    let mut watch = store.watch(&Prefix::all(), Revision(2)).await.unwrap();
    let waiting = tokio::spawn(async move { watch.next().await.unwrap_err().kind() });
    tokio::task::yield_now().await;
    harness.reopen().await;
    assert_eq!(waiting.await.unwrap(), ErrorKind::Unavailable);
    let error = store.transact(Txn::put(key("a"), "2")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(store.get(&key("a")).await.unwrap_err().kind(), ErrorKind::Unavailable);
}
