//! What every implementation of the store must do. The cases know the interface only.
//!
//! An implementation says by a [`Harness`] how it is started, and calls [`conformance!`] with it, which makes a test of
//! each case.

pub(crate) mod leases;
mod model;
pub(crate) mod property;
pub(crate) mod ranges;
pub(crate) mod transactions;
pub(crate) mod watches;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Batch, Key, LeaseId, Op, Prefix, Revision, Store, Txn, Watch};

/// One store under test, empty at first.
#[async_trait]
pub(crate) trait Harness: Send {
    /// The store as it is open now.
    fn store(&self) -> Arc<dyn Store>;

    /// Closes it, and opens it again with what it kept.
    async fn reopen(&mut self);

    /// Lets so much of the store's time pass.
    async fn pass(&self, time: Duration);
}

/// Makes a test of each case. The argument is a function that makes a [`Harness`]: it is called without arguments, in
/// a runtime whose time is paused.
macro_rules! conformance {
    ($harness:expr) => {
        $crate::store::conformance::conformance!($harness, transactions {
            revisions_and_versions_are_counted
            every_comparison_is_made
            all_operations_are_one_revision_and_see_each_other
            what_changes_nothing_makes_no_revision
            what_is_refused_leaves_nothing
            a_prefix_is_deleted_whole_and_alone
            who_compares_first_wins
            limits_are_kept
            all_is_there_after_a_restart
        });
        $crate::store::conformance::conformance!($harness, ranges {
            pages_make_up_one_revision
            old_revisions_can_be_read_until_they_are_compacted
            a_key_with_many_versions_is_found
            a_page_is_bounded_in_bytes
            spans_end_where_they_say
            compaction_survives_a_restart
        });
        $crate::store::conformance::conformance!($harness, watches {
            every_watcher_sees_all_in_order
            a_watcher_sees_its_prefix_only
            a_watch_can_begin_in_the_future
            a_slow_watcher_misses_nothing_or_is_told
            what_is_compacted_cannot_be_watched
            compaction_does_not_disturb_who_waits
            a_dropped_wait_loses_nothing
            a_watch_goes_on_after_a_restart_from_where_it_was
            closing_ends_a_watch
        });
        $crate::store::conformance::conformance!($harness, leases {
            an_expired_lease_takes_its_keys_in_one_revision
            a_lease_that_is_kept_alive_stays
            revoking_takes_the_keys_at_once
            a_key_goes_with_its_last_lease_only
            an_unknown_lease_is_refused
            the_time_to_live_is_told
            after_a_restart_a_lease_has_its_full_time
            lease_ids_are_not_given_twice
            a_lease_has_a_bounded_number_of_keys
        });
    };
    ($harness:expr, $subject:ident { $($case:ident)* }) => {
        mod $subject {
            #[allow(unused_imports, reason = "the argument may name anything of the module around")]
            use super::*;
            $(
                #[tokio::test(start_paused = true)]
                async fn $case() {
                    let mut harness = ($harness)().await;
                    $crate::store::conformance::$subject::$case(&mut harness).await;
                }
            )*
        }
    };
}
pub(crate) use conformance;

/// Longer than any case may wait for what must come. Paused time passes only while nothing is under way.
const LONG: Duration = Duration::from_secs(600);

fn key(text: &str) -> Key {
    Key::new(text.to_owned()).unwrap()
}

fn prefix(text: &str) -> Prefix {
    Prefix::new(text.to_owned()).unwrap()
}

fn put_op(name: &str, value: &str) -> Op {
    Op::Put { key: key(name), value: Bytes::copy_from_slice(value.as_bytes()), lease: None }
}

fn leased_op(name: &str, lease: LeaseId) -> Op {
    Op::Put { key: key(name), value: Bytes::from_static(b"leased"), lease: Some(lease) }
}

fn always(then: Vec<Op>) -> Txn {
    Txn { then, ..Txn::default() }
}

/// Stores one value, and returns the revision.
async fn put(store: &dyn Store, name: &str, value: &str) -> Revision {
    store.transact(always(vec![put_op(name, value)])).await.unwrap().revision
}

async fn value(store: &dyn Store, name: &str) -> Option<String> {
    let item = store.get(&key(name)).await.unwrap().item?;
    Some(String::from_utf8(item.value.to_vec()).unwrap())
}

/// The next batch of a watch, which must come.
async fn next(watch: &mut Box<dyn Watch>) -> Batch {
    tokio::time::timeout(LONG, watch.next()).await.expect("a batch must come").unwrap()
}

/// What a batch did, in short: `revision +key=value -key`.
fn short(batch: &Batch) -> String {
    use std::fmt::Write as _;
    let mut text = batch.revision.to_string();
    for event in &batch.events {
        match event {
            super::Event::Put(item) => {
                assert_eq!(item.modified, batch.revision);
                write!(text, " +{}={}", item.key, item.value.escape_ascii()).unwrap();
            }
            super::Event::Deleted(key) => write!(text, " -{key}").unwrap(),
        }
    }
    text
}
