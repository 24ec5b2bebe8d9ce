//! A disk without room: told clearly, nothing lost, and all well again once there is room.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{key, put, value};
use crate::store::clock::TokioClock;
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::{ErrorKind, Prefix, Store, Txn};

const DISK_BYTES: u64 = 8 << 20;

/// Runs a test on a small disk of its own, which no other thread sees.
fn on_small_disk(test: impl AsyncFnOnce(&Path) + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        tell("left out: making a small disk needs root");
        return;
    }
    // The namespace is the thread's; the threads that it starts are in it too.
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={DISK_BYTES}");
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(&size[..])).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(test(folder.path()));
        drop(runtime);
        nix::mount::umount(folder.path()).unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[allow(clippy::print_stderr, reason = "who runs the tests as a user must see what was left out")]
fn tell(line: &str) {
    eprintln!("{line}");
}

async fn open(path: &Path, reserve_bytes: u64) -> EmbeddedStore {
    let options = Options { reserve_bytes, ..Options::default() };
    EmbeddedStore::open(&path.join("store"), options, Arc::new(TokioClock::new())).await.unwrap()
}

/// Puts new keys until it is told that there is no room. Returns how many there are.
async fn fill(store: &EmbeddedStore, from: usize) -> usize {
    let value = "v".repeat(30_000);
    for count in from..10_000 {
        match put(store, &format!("fill/{count:05}"), &value).await {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Full, "{error:?}");
                assert!(error.to_string().contains("make room"), "{error}");
                assert!(error.retryable());
                return count;
            }
        }
    }
    panic!("the disk is never full");
}

async fn check(store: &EmbeddedStore, count: usize) {
    let range = crate::store::Range::prefix(&Prefix::new("fill/").unwrap());
    let (mut found, mut next) = (0, Some(range));
    while let Some(range) = next {
        let reply = store.range(&range).await.unwrap();
        found += reply.items.len();
        next = range.next(&reply);
    }
    assert_eq!(found, count);
}

#[test]
fn short_of_room_what_grows_is_refused_and_the_rest_goes_on() {
    on_small_disk(async |folder| {
        let store = open(folder, 2 << 20).await;
        let count = fill(&store, 0).await;
        check(&store, count).await;
        // What deletes is let through, and makes room in the file.
        for number in 0..count {
            store.transact(Txn::delete(key(&format!("fill/{number:05}")))).await.unwrap();
        }
        let now = store.get(&key("x")).await.unwrap().revision;
        store.compact(now).await.unwrap();
        check(&store, 0).await;
    });
}

#[test]
fn on_a_full_disk_nothing_is_lost_and_with_room_it_goes_on() {
    on_small_disk(async |folder| {
        let store = open(folder, 0).await;
        fs::write(folder.join("ballast"), vec![1; 2 << 20]).unwrap();
        put(&store, "first", "1").await.unwrap();
        let mut watch = store.watch(&Prefix::new("last").unwrap(), crate::store::Revision(1)).await.unwrap();
        let count = fill(&store, 0).await;
        check(&store, count).await;
        assert_eq!(put(&store, "more", &"v".repeat(30_000)).await.unwrap_err().kind(), ErrorKind::Full);
        assert_eq!(value(&store, "first").await.as_deref(), Some("1"));
        fs::remove_file(folder.join("ballast")).unwrap();
        put(&store, "last", "2").await.unwrap();
        assert_eq!(watch.next().await.unwrap().events.len(), 1);
        let more = fill(&store, count).await;
        assert!(more > count, "there was room for {}", more - count);
        check(&store, more).await;
        store.close().await.unwrap();
        let store = open(folder, 0).await;
        check(&store, more).await;
        assert_eq!(value(&store, "last").await.as_deref(), Some("2"));
    });
}
