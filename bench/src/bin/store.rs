//! What the embedded store does in a second: durable writes by 1 and by 64 writers, beside commits of redb alone and
//! bare `fdatasync`; reads meanwhile; and how long a store of 100,000 keys takes to open.
//!
//! `store [ROUNDS]`. All files are in one folder below the system's folder for temporary files. Each writer puts values
//! of 256 bytes, one at a time, each into a key of its own, and waits until it is acknowledged.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use bailey_bench::figures::Samples;
use bailey_bench::{count, say, say_machine};
use bailey_server::store::clock::TokioClock;
use bailey_server::store::embedded::{EmbeddedStore, Options};
use bailey_server::store::{Key, Op, Prefix, Revision, Store, Txn};
use redb::{Database, TableDefinition};

/// How long each measurement takes.
const SPAN: Duration = Duration::from_secs(2);
const VALUE: [u8; 256] = [b'v'; 256];
const MANY: usize = 64;
const KEYS: usize = 100_000;
const PLAIN: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("plain");

#[derive(Default)]
struct Figures {
    sync: Samples,
    redb_one_phase: Samples,
    redb_two_phase: Samples,
    redb_many: Samples,
    store_one: Samples,
    store_many: Samples,
    store_reads: Samples,
    store_reads_while_written: Samples,
    watched_ms: Samples,
    open_ms: Samples,
}

fn main() -> Result<()> {
    let rounds = count(5)?;
    say_machine();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build()?;
    let mut figures = Figures::default();
    for _ in 0..rounds {
        let folder = tempfile::tempdir()?;
        figures.sync.add(syncs(&folder.path().join("sync"))?);
        figures.redb_one_phase.add(commits(&folder.path().join("one"), 1, false)?);
        figures.redb_two_phase.add(commits(&folder.path().join("two"), 1, true)?);
        figures.redb_many.add(commits(&folder.path().join("many"), MANY, true)?);
        runtime.block_on(measure(folder.path(), &mut figures))?;
    }
    say("                                        median    least     most");
    for (name, samples) in [
        ("fdatasync of 4 KiB, per second", &figures.sync),
        ("redb, 1 thread, one phase, puts/s", &figures.redb_one_phase),
        ("redb, 1 thread, two phases, puts/s", &figures.redb_two_phase),
        ("redb, 64 threads, two phases, puts/s", &figures.redb_many),
        ("store, 1 writer, puts/s", &figures.store_one),
        ("store, 64 writers, puts/s", &figures.store_many),
        ("store, 1 reader, gets/s", &figures.store_reads),
        ("the same, beside 64 writers, gets/s", &figures.store_reads_while_written),
        ("put to seen by a watcher, ms", &figures.watched_ms),
        ("opening 100,000 keys, checked, ms", &figures.open_ms),
    ] {
        say(format_args!("{name:38} {samples}"));
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "a count of seconds' work is far below what a float can hold")]
fn per_second(count: u64, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}

/// The disk alone.
fn syncs(path: &Path) -> Result<f64> {
    let file = File::create(path)?;
    let (start, mut done) = (Instant::now(), 0);
    while start.elapsed() < SPAN {
        file.write_all_at(&[1; 4096], done % 256 * 4096)?;
        file.sync_data()?;
        done += 1;
    }
    Ok(per_second(done, start))
}

/// redb alone: a commit for each put.
fn commits(path: &Path, threads: usize, two_phase: bool) -> Result<f64> {
    let database = Database::create(path)?;
    let (start, done) = (Instant::now(), AtomicU64::new(0));
    let write = |thread: usize| -> Result<()> {
        let mut count = 0;
        while start.elapsed() < SPAN {
            let mut txn = database.begin_write()?;
            txn.set_two_phase_commit(two_phase);
            txn.open_table(PLAIN)?.insert(format!("{thread}/{count:09}").as_bytes(), &VALUE[..])?;
            txn.commit()?;
            count += 1;
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || write(thread))).collect();
        running.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    Ok(per_second(done.load(Ordering::Relaxed), start))
}

async fn open(path: &Path) -> Result<EmbeddedStore> {
    Ok(EmbeddedStore::open(path, Options::default(), Arc::new(TokioClock::new())).await?)
}

async fn measure(folder: &Path, figures: &mut Figures) -> Result<()> {
    let path = folder.join("store");
    let store = Arc::new(open(&path).await?);
    figures.store_one.add(puts(&store, "one", 1).await?);
    figures.store_many.add(puts(&store, "many", MANY).await?);
    figures.store_reads.add(gets(&store).await?);
    let writing = tokio::spawn({
        let store = Arc::clone(&store);
        async move { puts(&store, "beside", MANY).await }
    });
    figures.store_reads_while_written.add(gets(&store).await?);
    writing.await??;
    for number in 0..20 {
        figures.watched_ms.add_time(watched(&store, number).await?);
    }
    store.close().await?;

    let path = folder.join("large");
    let store = open(&path).await?;
    for first in (0..KEYS).step_by(100) {
        let put = |number: usize| -> Result<Op> {
            Ok(Op::Put { key: key(&format!("keys/{number:09}"))?, value: VALUE.to_vec().into(), lease: None })
        };
        let then = (first..first + 100).map(put).collect::<Result<_>>()?;
        store.transact(Txn { then, ..Txn::default() }).await?;
    }
    store.close().await?;
    let start = Instant::now();
    let store = open(&path).await?;
    figures.open_ms.add_time(start.elapsed());
    store.close().await?;
    Ok(())
}

fn key(text: &str) -> Result<Key> {
    Key::new(text.to_owned()).context("making a key")
}

async fn puts(store: &Arc<EmbeddedStore>, name: &str, writers: usize) -> Result<f64> {
    let (start, done) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let stop = Arc::new(AtomicBool::new(false));
    let mut running = Vec::new();
    for writer in 0..writers {
        let (store, done, stop) = (Arc::clone(store), Arc::clone(&done), Arc::clone(&stop));
        let name = format!("{name}/{writer}");
        running.push(tokio::spawn(async move {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                store.transact(Txn::put(key(&format!("{name}/{count:09}"))?, VALUE.to_vec())).await?;
                count += 1;
                done.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        }));
    }
    tokio::time::sleep(SPAN).await;
    stop.store(true, Ordering::Relaxed);
    for writer in running {
        writer.await??;
    }
    Ok(per_second(done.load(Ordering::Relaxed), start))
}

async fn gets(store: &EmbeddedStore) -> Result<f64> {
    let name = key("one/0/000000000")?;
    let (start, mut done) = (Instant::now(), 0);
    while start.elapsed() < SPAN {
        store.get(&name).await?.item.context("the first key is there")?;
        done += 1;
    }
    Ok(per_second(done, start))
}

/// How long it takes from the start of a put until a watcher has it.
async fn watched(store: &Arc<EmbeddedStore>, number: usize) -> Result<Duration> {
    let now = store.get(&key("any")?).await?.revision;
    let mut watch = store.watch(&Prefix::new("watched/")?, Revision(now.0 + 1)).await?;
    let seen = tokio::spawn(async move { watch.next().await.map(|_| Instant::now()) });
    tokio::time::sleep(Duration::from_millis(5)).await;
    let start = Instant::now();
    store.transact(Txn::put(key(&format!("watched/{number}"))?, VALUE.to_vec())).await?;
    Ok(seen.await??.duration_since(start))
}
