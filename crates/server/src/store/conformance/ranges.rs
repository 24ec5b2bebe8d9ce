//! Reading ranges: pages, old revisions, compaction.

use super::{Harness, always, key, prefix, put, value};
use crate::store::{
    ErrorKind, Key, Op, PAGE_BYTES_MAX, Prefix, Range, Revision, Span, Store, Txn, VALUE_BYTES_MAX,
};

/// All pages of a range, in short.
async fn read(store: &dyn Store, first: Range) -> (Vec<String>, usize) {
    let (mut found, mut pages) = (Vec::new(), 0);
    let mut next = Some(first);
    while let Some(range) = next {
        let reply = store.range(&range).await.unwrap();
        found.extend(reply.items.iter().map(|item| format!("{}={}", item.key, item.value.escape_ascii())));
        next = range.next(&reply);
        pages += 1;
    }
    (found, pages)
}

fn at(revision: u64) -> Range {
    Range { at: Some(Revision(revision)), ..Range::prefix(&Prefix::all()) }
}

pub(crate) async fn pages_make_up_one_revision(harness: &mut impl Harness) {
    let store = harness.store();
    for count in 0..25 {
        put(&*store, &format!("k/{count:02}"), "old").await;
    }
    put(&*store, "l", "outside").await;
    let mut range = Range { limit: 10, ..Range::prefix(&prefix("k/")) };
    let mut found: Vec<Key> = Vec::new();
    loop {
        let reply = store.range(&range).await.unwrap();
        assert_eq!(reply.revision, Revision(26));
        assert!(reply.items.iter().all(|item| item.value == "old"));
        found.extend(reply.items.iter().map(|item| item.key.clone()));
        let Some(next) = range.next(&reply) else { break };
        assert_eq!(reply.items.len(), 10);
        range = next;
        // What happens between two pages is in neither.
        put(&*store, "k/15", "new").await;
        put(&*store, &format!("k/{}x", found.len()), "new").await;
        store.transact(Txn::delete(key("k/24"))).await.unwrap();
    }
    let expected: Vec<Key> = (0..25).map(|count| key(&format!("k/{count:02}"))).collect();
    assert_eq!(found, expected);
    let none = Range { limit: 0, ..Range::prefix(&prefix("k/")) };
    assert_eq!(store.range(&none).await.unwrap_err().kind(), ErrorKind::Invalid);
    let exact = Range { limit: 1, ..Range::prefix(&prefix("l")) };
    assert!(!store.range(&exact).await.unwrap().more, "the last page says that it is the last");
}

pub(crate) async fn old_revisions_can_be_read_until_they_are_compacted(harness: &mut impl Harness) {
    let store = harness.store();
    put(&*store, "a", "1").await;
    put(&*store, "b", "2").await;
    put(&*store, "a", "3").await;
    store.transact(Txn::delete(key("b"))).await.unwrap();
    put(&*store, "b", "5").await;
    let expected = [
        (0, vec![]),
        (1, vec!["a=1"]),
        (2, vec!["a=1", "b=2"]),
        (3, vec!["a=3", "b=2"]),
        (4, vec!["a=3"]),
        (5, vec!["a=3", "b=5"]),
    ];
    for (revision, items) in &expected {
        assert_eq!(read(&*store, at(*revision)).await.0, *items, "at {revision}");
    }
    assert_eq!(store.range(&at(6)).await.unwrap_err().kind(), ErrorKind::Future);
    assert_eq!(store.compact(Revision(6)).await.unwrap_err().kind(), ErrorKind::Future);
    store.compact(Revision(4)).await.unwrap();
    store.compact(Revision(2)).await.unwrap();
    for revision in 0..4 {
        assert_eq!(
            store.range(&at(revision)).await.unwrap_err().kind(),
            ErrorKind::Compacted,
            "at {revision}"
        );
    }
    assert_eq!(read(&*store, at(4)).await.0, ["a=3"]);
    assert_eq!(read(&*store, at(5)).await.0, ["a=3", "b=5"]);
}

pub(crate) async fn a_key_with_many_versions_is_found(harness: &mut impl Harness) {
    let store = harness.store();
    for count in 1..=40 {
        put(&*store, "b", &count.to_string()).await;
    }
    put(&*store, "a", "first").await;
    put(&*store, "c", "last").await;
    assert_eq!(read(&*store, at(42)).await.0, ["a=first", "b=40", "c=last"]);
    for revision in [1, 2, 20, 39] {
        assert_eq!(read(&*store, at(revision)).await.0, [format!("b={revision}")]);
    }
    store.compact(Revision(42)).await.unwrap();
    assert_eq!(read(&*store, at(42)).await.0, ["a=first", "b=40", "c=last"]);
    assert_eq!(value(&*store, "b").await.as_deref(), Some("40"));
}

pub(crate) async fn a_page_is_bounded_in_bytes(harness: &mut impl Harness) {
    let store = harness.store();
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        store.transact(Txn::put(key(name), vec![b'x'; VALUE_BYTES_MAX])).await.unwrap();
    }
    let reply = store.range(&Range::prefix(&Prefix::all())).await.unwrap();
    let bytes: usize = reply.items.iter().map(|item| item.value.len()).sum();
    assert!(reply.more && bytes <= PAGE_BYTES_MAX + VALUE_BYTES_MAX, "{bytes} bytes");
    let (found, pages) = read(&*store, Range::prefix(&Prefix::all())).await;
    assert_eq!((found.len(), pages), (7, 2));
}

pub(crate) async fn spans_end_where_they_say(harness: &mut impl Harness) {
    let store = harness.store();
    for name in ["a", "b", "b\0", "bb", "c"] {
        put(&*store, name, "").await;
    }
    let between = |start: &str, end: &str| Range {
        span: Span::between(&key(start), &key(end)),
        ..Range::prefix(&Prefix::all())
    };
    assert_eq!(read(&*store, between("b", "c")).await.0, ["b=", "b\\x00=", "bb="]);
    assert_eq!(read(&*store, between("b", "bb")).await.0, ["b=", "b\\x00="]);
    assert!(read(&*store, between("c", "a")).await.0.is_empty());
    let behind = Range { after: Some(key("b")), ..between("a", "c") };
    assert_eq!(read(&*store, behind).await.0, ["b\\x00=", "bb="]);
    store.transact(always(vec![Op::DeletePrefix(prefix("b"))])).await.unwrap();
    assert_eq!(read(&*store, between("a", "d")).await.0, ["a=", "c="]);
}

pub(crate) async fn compaction_survives_a_restart(harness: &mut impl Harness) {
    let store = harness.store();
    for count in 0..30 {
        put(&*store, &format!("k{}", count % 3), &count.to_string()).await;
    }
    store.compact(Revision(20)).await.unwrap();
    drop(store);
    harness.reopen().await;
    let store = harness.store();
    assert_eq!(store.range(&at(19)).await.unwrap_err().kind(), ErrorKind::Compacted);
    assert_eq!(read(&*store, at(20)).await.0, ["k0=18", "k1=19", "k2=17"]);
    assert_eq!(read(&*store, at(30)).await.0, ["k0=27", "k1=28", "k2=29"]);
}
