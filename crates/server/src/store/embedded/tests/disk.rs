//! A loss of power at any moment: what was acknowledged is there, and nothing is there by half.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Kept, key, open, value};
use crate::store::embedded::disk_model::DiskModel;
use crate::store::embedded::file::Place;
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::{ErrorKind, Op, Prefix, Revision, Store, Txn};

/// A small generator, so that a failing round can be repeated by its number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// Puts ever greater numbers into two keys of its own, until the store fails. Returns the last that was acknowledged.
async fn count_until_it_fails(
    store: Arc<EmbeddedStore>,
    writer: u64,
    first: u64,
    acknowledged: Arc<AtomicU64>,
) -> u64 {
    let mut last = first;
    loop {
        let text = (last + 1).to_string();
        let op = |side: &str| Op::Put {
            key: key(&format!("{side}/{writer}")),
            value: text.clone().into(),
            lease: None,
        };
        let txn = Txn { then: vec![op("left"), op("right")], ..Txn::default() };
        if store.transact(txn).await.is_err() {
            return last;
        }
        last += 1;
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_of_power_loses_nothing_that_was_acknowledged() {
    const ROUNDS: u64 = 60;
    const WRITERS: usize = 4;
    let disk = DiskModel::default();
    let place = Place::Model(disk.clone());
    let mut counts = [0; WRITERS];
    for round in 0..ROUNDS {
        let mut dice = Dice(round);
        let store = open(&place, &Options::default()).await;
        for (writer, count) in (0..).zip(&mut counts) {
            let read = |side: &str| format!("{side}/{writer}");
            let (left, right) = (value(&store, &read("left")).await, value(&store, &read("right")).await);
            assert_eq!(left, right, "round {round}: half a transaction");
            let found: u64 = left.map_or(0, |text| text.parse().unwrap());
            // What was under way may have been done.
            assert!(found == *count || found == *count + 1, "round {round}: {found} after {count}");
            *count = found;
        }
        let acknowledged = Arc::new(AtomicU64::new(0));
        let writers: Vec<_> = (0..)
            .zip(&counts)
            .map(|(writer, count)| {
                tokio::spawn(count_until_it_fails(
                    Arc::clone(&store),
                    writer,
                    *count,
                    Arc::clone(&acknowledged),
                ))
            })
            .collect();
        let enough = dice.roll() % 60;
        while acknowledged.load(Ordering::Relaxed) < enough {
            tokio::task::yield_now().await;
        }
        disk.lose_power(|| dice.roll().is_multiple_of(2));
        for (writer, count) in writers.into_iter().zip(&mut counts) {
            *count = writer.await.unwrap();
        }
        // It cannot tidy up: the disk is gone for it.
        let _cannot = store.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn after_an_error_of_the_disk_nothing_more_is_done_and_what_was_synced_is_there() {
    let kept = Kept::on_model().await;
    super::put(&kept.store, "a", "1").await.unwrap();
    let Place::Model(disk) = &kept.place else { panic!("it is on a model") };
    disk.lose_power(|| false);
    // Nobody knows what this disk still has: nothing more is done with it.
    for _ in 0..2 {
        let error = super::put(&kept.store, "a", "2").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("check its disk"), "{error}");
        assert_eq!(kept.store.get(&key("a")).await.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    let store = open(&kept.place, &Options::default()).await;
    assert_eq!(value(&store, "a").await.as_deref(), Some("1"));
}

/// Whatever step of a commit it is that finds no room: the answer is true, and watchers see what is there.
#[tokio::test(start_paused = true)]
async fn an_answer_is_true_wherever_the_room_ends() {
    const STEPS: u64 = 40;
    let kept = Kept::on_model().await;
    let Place::Model(disk) = &kept.place else { panic!("it is on a model") };
    let mut watch = kept.store.watch(&Prefix::all(), Revision(1)).await.unwrap();
    let (mut revision, mut full, mut unknown) = (Revision(0), 0, 0);
    for (number, refusals) in (0..STEPS).flat_map(|steps| [1, 2, 5].map(|refusals| (steps, refusals))) {
        disk.fill_up(number, refusals);
        let text = format!("{number}/{refusals}");
        let reply = super::put(&kept.store, "a", &text).await;
        disk.fill_up(u64::MAX, 0);
        let is_there = value(&kept.store, "a").await.as_deref() == Some(&text);
        match reply {
            Ok(_) => assert!(is_there, "{text}"),
            Err(error) if error.kind() == ErrorKind::Full => {
                full += 1;
                assert!(!is_there, "{text}: it was said that nothing was written");
            }
            Err(error) => {
                unknown += 1;
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{text}: {error}");
            }
        }
        let now = kept.store.get(&key("a")).await.unwrap().revision;
        assert_eq!(now.0 - revision.0, u64::from(is_there), "{text}");
        if is_there {
            let batch =
                tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect(&text).unwrap();
            assert_eq!(batch.revision, now);
        }
        revision = now;
    }
    assert!(full > 0 && unknown > 0 && revision.0 > 0, "{full} full, {unknown} unknown, {revision} done");
}
