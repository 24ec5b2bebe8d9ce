//! Leases: what nobody keeps alive goes.

use std::time::Duration;

use super::{Harness, always, key, leased_op, next, prefix, put, put_op, short, value};
use crate::store::{ErrorKind, LEASE_KEYS_MAX, LeaseId, Prefix, Revision, TXN_PARTS_MAX};

const TTL: Duration = Duration::from_secs(10);

pub(crate) async fn an_expired_lease_takes_its_keys_in_one_revision(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "stays", "1").await;
    let lease = store.grant(TTL).await.unwrap();
    store.transact(always(vec![leased_op("a", lease), leased_op("b", lease)])).await.unwrap();
    store.transact(always(vec![leased_op("c", lease)])).await.unwrap();
    let mut watch = store.watch(&Prefix::all(), Revision(4)).await.unwrap();
    harness.pass(TTL - Duration::from_secs(2)).await;
    assert_eq!(value(&*store, "a").await.as_deref(), Some("leased"));
    harness.pass(Duration::from_secs(2)).await;
    assert_eq!(short(&next(&mut watch).await), "4 -a -b -c");
    assert_eq!(value(&*store, "a").await, None);
    assert_eq!(value(&*store, "stays").await.as_deref(), Some("1"));
    assert_eq!(store.keep_alive(lease).await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
    assert_eq!(store.time_to_live(lease).await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
    assert_eq!(store.revoke(lease).await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
}

pub(crate) async fn a_lease_that_is_kept_alive_stays(harness: &mut impl Harness) {
    let store = harness.store();
    let kept = store.grant(TTL).await.unwrap();
    let left = store.grant(TTL).await.unwrap();
    store.transact(always(vec![leased_op("kept", kept), leased_op("left", left)])).await.unwrap();
    let mut watch = store.watch(&prefix("left"), Revision(2)).await.unwrap();
    for _ in 0..5 {
        harness.pass(TTL / 2).await;
        assert_eq!(store.keep_alive(kept).await.unwrap(), TTL);
    }
    assert_eq!(short(&next(&mut watch).await), "2 -left");
    assert_eq!(value(&*store, "kept").await.as_deref(), Some("leased"));
    assert_eq!(store.keep_alive(left).await.unwrap_err().kind(), ErrorKind::LeaseNotFound);
    let mut watch = store.watch(&prefix("kept"), Revision(3)).await.unwrap();
    harness.pass(TTL).await;
    assert_eq!(short(&next(&mut watch).await), "3 -kept");
}

pub(crate) async fn revoking_takes_the_keys_at_once(harness: &mut impl Harness) {
    let store = harness.store();
    let lease = store.grant(TTL).await.unwrap();
    let empty = store.grant(TTL).await.unwrap();
    store
        .transact(always(vec![leased_op("b", lease), leased_op("a", lease), put_op("c", "3")]))
        .await
        .unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(value(&*store, "a").await, None);
    let mut watch = store.watch(&Prefix::all(), Revision(2)).await.unwrap();
    assert_eq!(short(&next(&mut watch).await), "2 -a -b");
    store.revoke(empty).await.unwrap();
    assert_eq!(put(&*store, "d", "4").await, Revision(3), "without keys there is nothing to delete");
}

pub(crate) async fn a_key_goes_with_its_last_lease_only(harness: &mut impl Harness) {
    let store = harness.store();
    let first = store.grant(TTL).await.unwrap();
    let second = store.grant(TTL).await.unwrap();
    let names = ["moved", "freed", "gone"];
    store.transact(always(names.iter().map(|name| leased_op(name, first)).collect())).await.unwrap();
    let ops = vec![leased_op("moved", second), put_op("freed", "x"), crate::store::Op::Delete(key("gone"))];
    store.transact(always(ops)).await.unwrap();
    put(&*store, "gone", "again").await;
    assert_eq!(store.get(&key("moved")).await.unwrap().item.unwrap().lease, Some(second));
    assert_eq!(store.get(&key("freed")).await.unwrap().item.unwrap().lease, None);
    store.revoke(first).await.unwrap();
    for (name, there) in [("moved", "leased"), ("freed", "x"), ("gone", "again")] {
        assert_eq!(value(&*store, name).await.as_deref(), Some(there), "{name}");
    }
    store.revoke(second).await.unwrap();
    assert_eq!(value(&*store, "moved").await, None);
}

pub(crate) async fn an_unknown_lease_is_refused(harness: &mut impl Harness) {
    let store = harness.store();
    let unknown = LeaseId(404);
    let put = store.transact(always(vec![leased_op("a", unknown)])).await.unwrap_err();
    let kinds = [
        put.kind(),
        store.keep_alive(unknown).await.unwrap_err().kind(),
        store.revoke(unknown).await.unwrap_err().kind(),
        store.time_to_live(unknown).await.unwrap_err().kind(),
    ];
    assert_eq!(kinds, [ErrorKind::LeaseNotFound; 4]);
    for ttl in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(31 * 24 * 60 * 60)] {
        assert_eq!(store.grant(ttl).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

pub(crate) async fn the_time_to_live_is_told(harness: &mut impl Harness) {
    let store = harness.store();
    let lease = store.grant(TTL).await.unwrap();
    store.transact(always(vec![leased_op("b", lease), leased_op("a", lease)])).await.unwrap();
    harness.pass(Duration::from_secs(4)).await;
    let status = store.time_to_live(lease).await.unwrap();
    assert_eq!(status.granted, TTL);
    assert!(status.remaining <= Duration::from_secs(6), "{:?}", status.remaining);
    assert!(status.remaining > Duration::from_secs(4), "{:?}", status.remaining);
    assert_eq!(status.keys, [key("a"), key("b")]);
}

pub(crate) async fn after_a_restart_a_lease_has_its_full_time(harness: &mut impl Harness) {
    let store = harness.store();
    let lease = store.grant(TTL).await.unwrap();
    store.transact(always(vec![leased_op("a", lease)])).await.unwrap();
    harness.pass(TTL - Duration::from_secs(2)).await;
    drop(store);
    harness.reopen().await;
    let store = harness.store();
    assert!(store.time_to_live(lease).await.unwrap().remaining > TTL - Duration::from_secs(2));
    harness.pass(TTL - Duration::from_secs(2)).await;
    assert_eq!(value(&*store, "a").await.as_deref(), Some("leased"));
    let mut watch = store.watch(&Prefix::all(), Revision(2)).await.unwrap();
    harness.pass(Duration::from_secs(2)).await;
    assert_eq!(short(&next(&mut watch).await), "2 -a");
}

pub(crate) async fn lease_ids_are_not_given_twice(harness: &mut impl Harness) {
    let mut given = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let store = harness.store();
        for _ in 0..3 {
            let lease = store.grant(TTL).await.unwrap();
            assert!(given.insert(lease), "{lease}");
            store.revoke(lease).await.unwrap();
        }
        drop(store);
        harness.reopen().await;
    }
}

pub(crate) async fn a_lease_has_a_bounded_number_of_keys(harness: &mut impl Harness) {
    let store = harness.store();
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    let names: Vec<String> = (0..LEASE_KEYS_MAX).map(|count| format!("k/{count}")).collect();
    for some in names.chunks(TXN_PARTS_MAX) {
        store.transact(always(some.iter().map(|name| leased_op(name, lease)).collect())).await.unwrap();
    }
    let error = store.transact(always(vec![leased_op("one more", lease)])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    store.transact(always(vec![leased_op("k/0", lease)])).await.expect("a key that it has already");
    store.revoke(lease).await.unwrap();
    let left = store.range(&crate::store::Range::prefix(&Prefix::all())).await.unwrap();
    assert!(left.items.is_empty());
}
