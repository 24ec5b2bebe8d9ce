//! Tests of the embedded store: the suite that every store passes, and what only this one promises.

mod disk;
mod faults;
mod kept;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use proptest::test_runner::{Config, TestRunner};
use tempfile::TempDir;

use super::disk_model::DiskModel;
use super::file::Place;
use super::{EmbeddedStore, Options};
use crate::store::clock::TokioClock;
use crate::store::conformance::{Harness, conformance, property};
use crate::store::{Key, Result, Revision, Store, Txn};

/// A store and where it is kept.
struct Kept {
    store: Arc<EmbeddedStore>,
    place: Place,
    options: Options,
    _folder: Option<TempDir>,
}

impl Kept {
    async fn at(place: Place, options: Options, folder: Option<TempDir>) -> Kept {
        let store = open(&place, &options).await;
        Kept { store, place, options, _folder: folder }
    }

    async fn in_file() -> Kept {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::File(folder.path().join("store"));
        Kept::at(place, Options::default(), Some(folder)).await
    }

    /// On a disk that a test has made up, with no more memory of late revisions than it must have: so watchers read
    /// from the file.
    async fn on_model() -> Kept {
        let options = Options { recent_revisions: Some(2), ..Options::default() };
        Kept::at(Place::Model(DiskModel::default()), options, None).await
    }
}

async fn open(place: &Place, options: &Options) -> Arc<EmbeddedStore> {
    Arc::new(EmbeddedStore::start(place.clone(), options.clone(), Arc::new(TokioClock::new())).await.unwrap())
}

#[async_trait]
impl Harness for Kept {
    fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store) as Arc<dyn Store>
    }

    async fn reopen(&mut self) {
        self.store.close().await.unwrap();
        self.store = open(&self.place, &self.options).await;
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

fn key(text: &str) -> Key {
    Key::new(text.to_owned()).unwrap()
}

async fn put(store: &EmbeddedStore, name: &str, value: &str) -> Result<Revision> {
    store.transact(Txn::put(key(name), value.to_owned())).await.map(|reply| reply.revision)
}

async fn value(store: &EmbeddedStore, name: &str) -> Option<String> {
    let item = store.get(&key(name)).await.unwrap().item?;
    Some(String::from_utf8(item.value.to_vec()).unwrap())
}

async fn open_file(path: &Path) -> Result<EmbeddedStore, crate::store::OpenError> {
    EmbeddedStore::open(path, Options::default(), Arc::new(TokioClock::new())).await
}

fn in_folder(folder: &TempDir) -> PathBuf {
    folder.path().join("store")
}

/// The suite on a real file.
mod on_file {
    use super::*;

    conformance!(Kept::in_file);
}

/// The suite with nothing kept in memory for watchers.
mod on_model {
    use super::*;

    conformance!(Kept::on_model);
}

fn play(cases: u32, reopen: u32) {
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let result = runner.run(&property::histories(reopen), |steps| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let mut kept = Kept::on_model().await;
            property::agrees_with_the_model(&mut kept, steps).await;
        });
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn random_histories_agree_with_the_model() {
    play(200, 0);
}

#[test]
fn random_histories_with_restarts_agree_with_the_model() {
    play(100, 8);
}
