//! Random histories: whatever is done, the store answers what the model answers.

use bytes::Bytes;
use proptest::prelude::*;

use super::model::Model;
use super::{Harness, LONG};
use crate::store::{
    Compare, ErrorKind, Key, LeaseId, Op, Prefix, Range, Relation, Revision, Store, Subject, Txn,
};

/// One step of a history. Revisions and leases are chosen among those that there are when it is done.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Transact(Txn),
    Grant,
    Revoke(u8),
    Compact(u8),
    ReadAt(u8, usize),
    Watch(Prefix, u8),
    Reopen,
}

/// Few keys, some of them below others, so that steps meet.
fn keys() -> impl Strategy<Value = Key> {
    prop::sample::select(vec!["a", "a/", "a/1", "a/2", "ab", "b", "b/\u{ff}"])
        .prop_map(|text| Key::new(text).unwrap())
}

fn prefixes() -> impl Strategy<Value = Prefix> {
    prop::sample::select(vec!["", "a", "a/", "b", "c"]).prop_map(|text| Prefix::new(text).unwrap())
}

fn values() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "x", "y", "longer than the others"]).prop_map(Bytes::from)
}

fn ops() -> impl Strategy<Value = Op> {
    let lease = prop::option::weighted(0.3, (1u64..5).prop_map(LeaseId));
    prop_oneof![
        5 => (keys(), values(), lease).prop_map(|(key, value, lease)| Op::Put { key, value, lease }),
        2 => keys().prop_map(Op::Delete),
        1 => prefixes().prop_map(Op::DeletePrefix),
        1 => keys().prop_map(Op::Get),
    ]
}

fn compares() -> impl Strategy<Value = Compare> {
    let relation =
        || prop::sample::select(vec![Relation::Equal, Relation::NotEqual, Relation::Less, Relation::Greater]);
    let subject = prop_oneof![
        (relation(), 0u64..4).prop_map(|(relation, version)| Subject::Version(relation, version)),
        (relation(), 0u64..20)
            .prop_map(|(relation, revision)| Subject::Created(relation, Revision(revision))),
        (relation(), 0u64..20)
            .prop_map(|(relation, revision)| Subject::Modified(relation, Revision(revision))),
        (relation(), values()).prop_map(|(relation, value)| Subject::Value(relation, value)),
        any::<bool>().prop_map(Subject::Exists),
        prop::option::of((1u64..5).prop_map(LeaseId)).prop_map(Subject::Lease),
    ];
    (keys(), subject).prop_map(|(key, subject)| Compare { key, subject })
}

fn txns() -> impl Strategy<Value = Txn> {
    let list = || prop::collection::vec(ops(), 0..4);
    (prop::collection::vec(compares(), 0..3), list(), list()).prop_map(|(compare, then, otherwise)| Txn {
        compare,
        then,
        otherwise,
    })
}

/// Histories, with `reopen` as the share of restarts among 100 steps.
pub(crate) fn histories(reopen: u32) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        60 => txns().prop_map(Step::Transact),
        5 => Just(Step::Grant),
        5 => any::<u8>().prop_map(Step::Revoke),
        5 => any::<u8>().prop_map(Step::Compact),
        10 => (any::<u8>(), 1usize..4).prop_map(|(at, limit)| Step::ReadAt(at, limit)),
        10 => (prefixes(), any::<u8>()).prop_map(|(prefix, from)| Step::Watch(prefix, from)),
        reopen => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

/// Plays a history on an empty store and on the model.
pub(crate) async fn agrees_with_the_model(harness: &mut impl Harness, steps: Vec<Step>) {
    let mut model = Model::new();
    for step in steps {
        let store = harness.store();
        match step {
            Step::Transact(txn) => match (store.transact(txn.clone()).await, model.transact(&txn)) {
                (Ok(reply), Some(expected)) => assert_eq!(reply, expected, "{txn:?}"),
                (Err(error), None) => {
                    assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::LeaseNotFound), "{error}");
                }
                (reply, expected) => panic!("{txn:?}: {reply:?} is not {expected:?}"),
            },
            Step::Grant => {
                model.leases.insert(store.grant(LONG).await.unwrap());
            }
            Step::Revoke(which) => {
                if let Some(lease) =
                    model.leases.iter().nth(usize::from(which) % model.leases.len().max(1)).copied()
                {
                    store.revoke(lease).await.unwrap();
                    model.revoke(lease);
                }
            }
            Step::Compact(share) => {
                let revision = chosen(&model, share);
                store.compact(revision).await.unwrap();
                model.compacted = model.compacted.max(revision.0);
            }
            Step::ReadAt(share, limit) => read_at(&*store, &model, chosen(&model, share), limit).await,
            Step::Watch(prefix, share) => watch(&*store, &model, &prefix, chosen(&model, share)).await,
            Step::Reopen => {
                drop(store);
                harness.reopen().await;
            }
        }
    }
    let store = harness.store();
    read_at(&*store, &model, model.revision(), 3).await;
    watch(&*store, &model, &Prefix::all(), Revision(model.compacted).next()).await;
}

/// A revision between 0 and the newest.
fn chosen(model: &Model, share: u8) -> Revision {
    Revision(model.revision().0 * u64::from(share) / u64::from(u8::MAX))
}

async fn read_at(store: &dyn Store, model: &Model, at: Revision, limit: usize) {
    let mut next = Some(Range { at: Some(at), limit, ..Range::prefix(&Prefix::all()) });
    let mut found = Vec::new();
    while let Some(range) = next {
        let reply = match store.range(&range).await {
            Ok(reply) => reply,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Compacted);
                assert!(at.0 < model.compacted, "{error}");
                return;
            }
        };
        assert!(reply.items.len() <= limit && reply.revision == at);
        next = range.next(&reply);
        found.extend(reply.items);
    }
    assert!(at.0 >= model.compacted, "{at} is compacted");
    let content = &model.history[usize::try_from(at.0).unwrap()];
    assert_eq!(found, content.values().cloned().collect::<Vec<_>>(), "at {at}");
}

async fn watch(store: &dyn Store, model: &Model, prefix: &Prefix, from: Revision) {
    let expected = model.batches(prefix, from);
    let mut watch = match store.watch(prefix, from).await {
        Ok(watch) => watch,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Compacted);
            assert!(from.0 <= model.compacted, "{error}");
            return;
        }
    };
    assert!(from.0 > model.compacted || model.compacted == 0, "{from} is compacted");
    for batch in expected {
        assert_eq!(tokio::time::timeout(LONG / 2, watch.next()).await.unwrap().unwrap(), batch);
    }
}
