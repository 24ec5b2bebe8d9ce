//! The file: locks, formats, foreign and damaged files, snapshots, compaction in pieces, memory.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::sync::Arc;

use super::{Kept, in_folder, key, open_file, put, value};
use crate::store::clock::TokioClock;
use crate::store::embedded::EmbeddedStore;
use crate::store::embedded::file::{FORMAT, Place};
use crate::store::embedded::tables::{CHANGES, META, VERSIONS};
use crate::store::{ErrorKind, Prefix, Range, Revision, Store, Txn};

#[tokio::test]
async fn a_file_is_open_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = in_folder(&folder);
    let first = open_file(&path).await.unwrap();
    let error = open_file(&path).await.err().expect("it is open");
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    assert!(error.to_string().contains("stop that process"), "{error}");
    put(&first, "a", "1").await.unwrap();
    first.close().await.unwrap();
    assert_eq!(value(&open_file(&path).await.unwrap(), "a").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn only_its_owner_may_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_file(&in_folder(&folder)).await.unwrap();
    let copy = folder.path().join("copy");
    store.snapshot_to(&copy).await.unwrap();
    for path in [in_folder(&folder), copy] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
}

#[tokio::test]
async fn a_newer_format_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = in_folder(&folder);
    open_file(&path).await.unwrap().close().await.unwrap();
    let set_format = |format: u64| {
        let database = redb::Database::open(&path).unwrap();
        let txn = database.begin_write().unwrap();
        txn.open_table(META).unwrap().insert("format", format).unwrap();
        txn.commit().unwrap();
    };
    set_format(FORMAT + 1);
    let error = open_file(&path).await.err().expect("it is too new");
    assert_eq!(error.kind(), ErrorKind::NewerFormat);
    assert!(error.to_string().contains("has format 2"), "{error}");
    set_format(FORMAT);
    open_file(&path).await.expect("nothing was done to it");
}

#[tokio::test]
async fn another_file_is_not_taken_for_a_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = in_folder(&folder);
    for content in [&b""[..], b"some text that somebody needs, longer than what a file of redb begins with"] {
        fs::write(&path, content).unwrap();
        assert_eq!(open_file(&path).await.err().expect("it is none").kind(), ErrorKind::Corrupt);
        assert_eq!(fs::read(&path).unwrap(), content);
    }
    fs::remove_file(&path).unwrap();
    drop(redb::Database::create(&path).unwrap());
    let error = open_file(&path).await.err().expect("it has no tables of ours");
    assert!(error.to_string().contains("is no store"), "{error}");
}

#[tokio::test]
async fn damage_is_found_when_it_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = in_folder(&folder);
    let store = open_file(&path).await.unwrap();
    let text = "a text that is easily found in the file ".repeat(20);
    put(&store, "a", &text).await.unwrap();
    store.close().await.unwrap();
    let bytes = fs::read(&path).unwrap();
    let places = bytes.windows(text.len()).enumerate().filter(|(_, window)| *window == text.as_bytes());
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (place, _) in places {
        file.write_all_at(b"X", place as u64 + 9).unwrap();
    }
    let error = open_file(&path).await.err().expect("it is damaged");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("restore a snapshot"), "{error}");
}

#[tokio::test]
async fn a_creation_that_broke_off_is_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = in_folder(&folder);
    fs::write(folder.path().join("store.new"), "half of it").unwrap();
    put(&open_file(&path).await.unwrap(), "a", "1").await.unwrap();
}

#[tokio::test]
async fn a_snapshot_is_a_store_as_of_one_moment() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open_file(&in_folder(&folder)).await.unwrap());
    let lease = store.grant(std::time::Duration::from_secs(60)).await.unwrap();
    put(&store, "count", "0").await.unwrap();
    let writing = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for count in 1..=200 {
                put(&store, "count", &count.to_string()).await.unwrap();
            }
        }
    });
    while store.get(&key("count")).await.unwrap().revision < Revision(20) {
        tokio::task::yield_now().await;
    }
    let path = folder.path().join("copy");
    let revision = store.snapshot_to(&path).await.unwrap();
    writing.await.unwrap();
    assert_eq!(store.snapshot_to(&path).await.unwrap_err().kind(), ErrorKind::Exists);
    let copy = open_file(&path).await.unwrap();
    let found = copy.get(&key("count")).await.unwrap();
    assert_eq!(found.revision, revision);
    let count: u64 = std::str::from_utf8(&found.item.unwrap().value).unwrap().parse().unwrap();
    assert_eq!(count + 1, revision.0);
    assert!(copy.time_to_live(lease).await.is_ok());
    let old = Range { at: Some(Revision(5)), ..Range::prefix(&Prefix::all()) };
    assert_eq!(copy.range(&old).await.unwrap().items[0].value, "4");
}

#[tokio::test]
async fn compaction_removes_all_that_cannot_be_read_in_pieces() {
    let kept = Kept::on_model().await;
    let store = &kept.store;
    for round in 0..60 {
        let ops = (0..100).map(|count| crate::store::Op::Put {
            key: key(&format!("k/{count}")),
            value: round.to_string().into(),
            lease: None,
        });
        store.transact(Txn { then: ops.collect(), ..Txn::default() }).await.unwrap();
    }
    store
        .transact(Txn {
            then: vec![crate::store::Op::DeletePrefix(Prefix::new("k/1").unwrap())],
            ..Txn::default()
        })
        .await
        .unwrap();
    store.compact(Revision(61)).await.unwrap();
    let counts = || {
        kept.store.core.read("counting", |snapshot| {
            use redb::ReadableTableMetadata as _;
            let versions = snapshot.txn.open_table(VERSIONS)?.len()?;
            let changes = snapshot.txn.open_table(CHANGES)?.len()?;
            Ok(Ok((versions, changes, snapshot.books)))
        })
    };
    // The pieces follow one another without being asked for.
    while counts().unwrap().2.scrubbed < 61 {
        tokio::task::yield_now().await;
    }
    let (versions, changes, _) = counts().unwrap();
    assert_eq!((versions, changes), (89, 0), "one version of each key that is left");
}

#[tokio::test(start_paused = true)]
async fn in_memory_it_does_the_same() {
    let store = EmbeddedStore::in_memory(Arc::new(TokioClock::new())).await.unwrap();
    put(&store, "a", "1").await.unwrap();
    let lease = store.grant(std::time::Duration::from_secs(5)).await.unwrap();
    let leased = crate::store::Op::Put { key: key("b"), value: "2".into(), lease: Some(lease) };
    store.transact(Txn { then: vec![leased], ..Txn::default() }).await.unwrap();
    let mut watch = store.watch(&Prefix::all(), Revision(3)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().revision, Revision(3));
    assert_eq!(value(&store, "a").await.as_deref(), Some("1"));
    assert!(matches!(store.core.place, Place::Memory));
}
