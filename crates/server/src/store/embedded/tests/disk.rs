//! A loss of power at any moment: what was acknowledged is there, and nothing is there by half.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Kept, key, open, value};
use crate::store::embedded::disk_model::DiskModel;
use crate::store::embedded::file::Place;
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::{Op, Store, Txn};

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
async fn what_the_model_of_a_disk_has_synced_it_keeps() {
    let kept = Kept::on_model().await;
    super::put(&kept.store, "a", "1").await.unwrap();
    let Place::Model(disk) = &kept.place else { panic!("it is on a model") };
    disk.lose_power(|| false);
    assert!(super::put(&kept.store, "a", "2").await.is_err());
    let store = open(&kept.place, &Options::default()).await;
    assert_eq!(value(&store, "a").await.as_deref(), Some("1"));
}
