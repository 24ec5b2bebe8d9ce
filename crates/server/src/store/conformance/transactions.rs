//! Transactions: compared, done at once or not at all, one revision.

use std::sync::Arc;

use bytes::Bytes;

use super::{Harness, always, key, prefix, put, put_op, value};
use crate::store::{
    Compare, ErrorKind, KeyValue, LeaseId, Op, OpReply, Relation, Revision, Store, Subject, TXN_PARTS_MAX,
    Txn, VALUE_BYTES_MAX,
};

pub(crate) async fn revisions_and_versions_are_counted(harness: &mut impl Harness) {
    let store = harness.store();
    assert_eq!(store.get(&key("a")).await.unwrap().revision, Revision(0));
    assert_eq!(put(&*store, "a", "one").await, Revision(1));
    assert_eq!(put(&*store, "b", "other").await, Revision(2));
    assert_eq!(put(&*store, "a", "two").await, Revision(3));
    let got = store.get(&key("a")).await.unwrap();
    let expected = KeyValue {
        key: key("a"),
        value: Bytes::from_static(b"two"),
        created: Revision(1),
        modified: Revision(3),
        version: 2,
        lease: None,
    };
    assert_eq!((got.revision, got.item), (Revision(3), Some(expected)));
    let deleted = store.transact(Txn::delete(key("a"))).await.unwrap();
    assert_eq!((deleted.revision, &deleted.replies[..]), (Revision(4), &[OpReply::Deleted(1)][..]));
    assert_eq!(value(&*store, "a").await, None);
    put(&*store, "a", "three").await;
    let item = store.get(&key("a")).await.unwrap().item.unwrap();
    assert_eq!((item.created, item.modified, item.version), (Revision(5), Revision(5), 1));
}

pub(crate) async fn every_comparison_is_made(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "other", "x").await;
    put(&*store, "a", "m").await;
    put(&*store, "a", "m").await;
    let text = |text: &'static str| Bytes::from_static(text.as_bytes());
    let cases = [
        (Subject::Version(Relation::Equal, 2), true),
        (Subject::Version(Relation::Greater, 2), false),
        (Subject::Created(Relation::Equal, Revision(2)), true),
        (Subject::Created(Relation::Less, Revision(2)), false),
        (Subject::Modified(Relation::NotEqual, Revision(2)), true),
        (Subject::Modified(Relation::Less, Revision(3)), false),
        (Subject::Value(Relation::Equal, text("m")), true),
        (Subject::Value(Relation::Less, text("n")), true),
        (Subject::Value(Relation::Greater, text("m")), false),
        (Subject::Exists(true), true),
        (Subject::Exists(false), false),
        (Subject::Lease(None), true),
        (Subject::Lease(Some(LeaseId(1))), false),
    ];
    for (subject, holds) in cases {
        let compare = |subject| Compare { key: key("a"), subject };
        let one = vec![compare(subject.clone())];
        let both = vec![compare(Subject::Exists(true)), compare(subject.clone())];
        for compare in [one, both] {
            let reply = store.transact(Txn { compare, ..Txn::default() }).await.unwrap();
            assert_eq!(reply.succeeded, holds, "{subject:?}");
        }
    }
    let compare = vec![Compare { key: key("a"), subject: Subject::Exists(false) }];
    let txn = Txn { compare, then: vec![put_op("a", "then")], otherwise: vec![put_op("b", "otherwise")] };
    let reply = store.transact(txn).await.unwrap();
    assert!(!reply.succeeded);
    assert_eq!(value(&*store, "a").await.as_deref(), Some("m"));
    assert_eq!(value(&*store, "b").await.as_deref(), Some("otherwise"));
}

pub(crate) async fn all_operations_are_one_revision_and_see_each_other(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "old", "x").await;
    let ops = vec![
        Op::Get(key("a")),
        put_op("a", "1"),
        Op::Get(key("a")),
        put_op("b", "2"),
        Op::Delete(key("old")),
        Op::Get(key("old")),
        Op::Delete(key("old")),
        Op::DeletePrefix(prefix("ol")),
    ];
    let reply = store.transact(always(ops)).await.unwrap();
    assert_eq!(reply.revision, Revision(2));
    let [before, OpReply::Put, OpReply::Got(Some(after)), OpReply::Put, rest @ ..] = &reply.replies[..]
    else {
        panic!("{:?}", reply.replies);
    };
    assert_eq!(before, &OpReply::Got(None));
    assert_eq!((after.modified, &after.value[..]), (Revision(2), &b"1"[..]));
    assert_eq!(rest, &[OpReply::Deleted(1), OpReply::Got(None), OpReply::Deleted(0), OpReply::Deleted(0)]);
    for name in ["a", "b"] {
        assert_eq!(store.get(&key(name)).await.unwrap().item.unwrap().modified, Revision(2));
    }
}

pub(crate) async fn what_changes_nothing_makes_no_revision(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "a", "1").await;
    for txn in [
        Txn::default(),
        always(vec![Op::Get(key("a"))]),
        Txn::delete(key("absent")),
        always(vec![Op::DeletePrefix(prefix("absent"))]),
    ] {
        assert_eq!(store.transact(txn).await.unwrap().revision, Revision(1));
    }
    assert_eq!(put(&*store, "a", "1").await, Revision(2), "a put is a change, whatever it puts");
}

pub(crate) async fn what_is_refused_leaves_nothing(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "a", "1").await;
    let unknown = Op::Put { key: key("c"), value: Bytes::new(), lease: Some(LeaseId(99)) };
    let txn = always(vec![put_op("b", "2"), Op::Delete(key("a")), unknown]);
    let error = store.transact(txn).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseNotFound);
    assert_eq!(value(&*store, "a").await.as_deref(), Some("1"));
    assert_eq!(value(&*store, "b").await, None);
    assert_eq!(put(&*store, "d", "3").await, Revision(2));
}

pub(crate) async fn a_prefix_is_deleted_whole_and_alone(harness: &mut impl Harness) {
    let store = harness.store();
    for name in ["a", "a/", "a/1", "a/2", "a0", "b"] {
        put(&*store, name, name).await;
    }
    let reply = store.transact(always(vec![Op::DeletePrefix(prefix("a/"))])).await.unwrap();
    assert_eq!(reply.replies, [OpReply::Deleted(3)]);
    for (name, is_there) in
        [("a", true), ("a/", false), ("a/1", false), ("a/2", false), ("a0", true), ("b", true)]
    {
        assert_eq!(value(&*store, name).await.is_some(), is_there, "{name}");
    }
    let reply = store.transact(always(vec![Op::DeletePrefix(prefix(""))])).await.unwrap();
    assert_eq!(reply.replies, [OpReply::Deleted(3)]);
}

pub(crate) async fn who_compares_first_wins(harness: &mut impl Harness) {
    const TASKS: u64 = 16;
    const TIMES: u64 = 8;
    let store = harness.store();
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(count_up(Arc::clone(&store), TIMES))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(value(&*store, "count").await, Some((TASKS * TIMES).to_string()));
    assert_eq!(store.get(&key("count")).await.unwrap().item.unwrap().version, TASKS * TIMES);
}

async fn count_up(store: Arc<dyn Store>, times: u64) {
    let mut done = 0;
    while done < times {
        let item = store.get(&key("count")).await.unwrap().item;
        let seen = item.as_ref().map_or(Revision(0), |item| item.modified);
        let count: u64 = item.map_or(0, |item| std::str::from_utf8(&item.value).unwrap().parse().unwrap());
        let compare = vec![Compare { key: key("count"), subject: Subject::Modified(Relation::Equal, seen) }];
        let then = vec![put_op("count", &(count + 1).to_string())];
        let reply = store.transact(Txn { compare, then, ..Txn::default() }).await.unwrap();
        done += u64::from(reply.succeeded);
    }
}

pub(crate) async fn limits_are_kept(harness: &mut impl Harness) {
    let store = harness.store();
    let kind = async |txn: Txn| store.transact(txn).await.unwrap_err().kind();
    assert_eq!(kind(Txn::put(key("a"), vec![0; VALUE_BYTES_MAX + 1])).await, ErrorKind::TooLarge);
    assert_eq!(kind(always(vec![Op::Get(key("a")); TXN_PARTS_MAX + 1])).await, ErrorKind::TooLarge);
    assert_eq!(kind(always(vec![put_op("a", "1"), put_op("a", "2")])).await, ErrorKind::Invalid);
    assert_eq!(kind(always(vec![put_op("a", "1"), Op::DeletePrefix(prefix(""))])).await, ErrorKind::Invalid);
    store.transact(Txn::put(key("a"), vec![7; VALUE_BYTES_MAX])).await.unwrap();
    let item = store.get(&key("a")).await.unwrap().item.unwrap();
    assert_eq!(item.value.len(), VALUE_BYTES_MAX);
}

pub(crate) async fn all_is_there_after_a_restart(harness: &mut impl Harness) {
    let store = harness.store();
    for count in 0..20 {
        put(&*store, &format!("key/{}", count % 7), &count.to_string()).await;
    }
    store.transact(Txn::delete(key("key/3"))).await.unwrap();
    let before = store.range(&crate::store::Range::prefix(&prefix(""))).await.unwrap();
    drop(store);
    harness.reopen().await;
    let store = harness.store();
    assert_eq!(store.range(&crate::store::Range::prefix(&prefix(""))).await.unwrap(), before);
    assert_eq!(put(&*store, "next", "x").await, before.revision.next());
}
