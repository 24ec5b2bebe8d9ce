use bytes::Bytes;

use super::*;
use crate::store::clock::TokioClock;
use crate::store::embedded::EmbeddedStore;

async fn store() -> Arc<dyn Store> {
    Arc::new(EmbeddedStore::in_memory(Arc::new(TokioClock::new())).await.unwrap())
}

fn event(number: u64, tenant: Option<&str>) -> Event {
    let letters: String =
        format!("{number:020}").bytes().map(|digit| char::from(digit - b'0' + b'a')).collect();
    Event {
        request: letters.parse().unwrap(),
        at: Timestamp(number),
        actor: "token:abcdefgh2345".into(),
        action: "tenant.create".into(),
        object: format!("tenant/t{number}"),
        tenant: tenant.map(|name| name.parse().unwrap()),
        from: "127.0.0.1:5".into(),
        outcome: Outcome::Done,
    }
}

/// A chain of so many links.
async fn chain(count: u64) -> (Arc<dyn Store>, Audit) {
    let store = store().await;
    let audit = Audit::new(Arc::clone(&store));
    for number in 1..=count {
        audit.note(&event(number, None)).await.unwrap();
    }
    assert_eq!(audit.seal().await.unwrap(), count);
    (store, audit)
}

/// What somebody does who can write to the store.
async fn tamper(store: &Arc<dyn Store>, op: Op) {
    assert!(store.transact(Txn { then: vec![op], ..Txn::default() }).await.unwrap().succeeded);
}

async fn stored(store: &Arc<dyn Store>, number: u64) -> Bytes {
    store.get(&link_key(number).unwrap()).await.unwrap().item.unwrap().value
}

fn put(number: u64, value: Bytes) -> Op {
    Op::Put { key: link_key(number).unwrap(), value, lease: None }
}

#[tokio::test]
async fn an_event_is_there_exactly_if_what_it_tells_of_is() {
    let store = store().await;
    let audit = Audit::new(Arc::clone(&store));
    let name = key(&["thing", "a"]).unwrap();
    for number in 1..=2 {
        let put = Op::Put { key: name.clone(), value: Bytes::from_static(b"x"), lease: None };
        let txn = Txn {
            compare: vec![records::exists(&name, false)],
            then: vec![put, Audit::op(&event(number, None)).unwrap()],
            otherwise: Vec::new(),
        };
        assert_eq!(store.transact(txn).await.unwrap().succeeded, number == 1);
    }
    audit.seal().await.unwrap();
    let links = audit.list(1, 10, None).await.unwrap();
    assert_eq!(links.len(), 1);
    assert_eq!((links[0].number, &links[0].event), (1, &event(1, None)));
}

#[tokio::test]
async fn the_chain_has_the_order_of_what_happened() {
    // More than one batch, and keys whose order is another one.
    let store = store().await;
    let audit = Audit::new(Arc::clone(&store));
    let numbers: Vec<u64> = (1..=150).rev().collect();
    for number in &numbers {
        audit.note(&event(*number, None)).await.unwrap();
    }
    assert_eq!(audit.seal().await.unwrap(), 150);
    assert_eq!(audit.seal().await.unwrap(), 0);
    let found: Vec<u64> =
        audit.list(1, 1000, None).await.unwrap().iter().map(|link| link.event.at.0).collect();
    assert_eq!(found, numbers);
    let head = audit.verify(None).await.unwrap();
    assert_eq!((head.links, head), (150, audit.head().await.unwrap()));
}

#[tokio::test]
async fn it_goes_on_where_another_process_stopped() {
    let (store, audit) = chain(3).await;
    let before = audit.head().await.unwrap();
    drop(audit);
    let audit = Audit::new(store);
    audit.note(&event(4, None)).await.unwrap();
    audit.seal().await.unwrap();
    let head = audit.verify(Some(before)).await.unwrap();
    assert_eq!(head.links, 4);
}

#[tokio::test]
async fn a_tenant_sees_its_own_alone() {
    let store = store().await;
    let audit = Audit::new(store);
    for (number, tenant) in [(1, Some("acme")), (2, Some("other")), (3, None), (4, Some("acme"))] {
        audit.note(&event(number, tenant)).await.unwrap();
    }
    audit.seal().await.unwrap();
    let acme: TenantName = "acme".parse().unwrap();
    let of = |links: Vec<Link>| links.iter().map(|link| link.number).collect::<Vec<_>>();
    assert_eq!(of(audit.list(1, 10, Some(&acme)).await.unwrap()), [1, 4]);
    assert_eq!(of(audit.list(2, 10, Some(&acme)).await.unwrap()), [4]);
    assert_eq!(of(audit.list(1, 1, Some(&acme)).await.unwrap()), [1]);
    assert_eq!(of(audit.list(1, 10, None).await.unwrap()), [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_changed_record_is_found() {
    let (store, audit) = chain(5).await;
    let text = String::from_utf8(stored(&store, 3).await.to_vec()).unwrap();
    assert!(text.contains("tenant/t3"));
    tamper(&store, put(3, text.replace("tenant/t3", "tenant/t9").into())).await;
    assert!(matches!(audit.verify(None).await, Err(AuditError::Changed { number: 3 })));
}

#[tokio::test]
async fn a_record_that_was_taken_out_or_put_in_is_found() {
    for number in [1, 3, 5] {
        let (store, audit) = chain(5).await;
        tamper(&store, Op::Delete(link_key(number).unwrap())).await;
        let found = audit.verify(None).await;
        assert!(
            matches!(found, Err(AuditError::Missing { number: missing }) if missing == number),
            "{found:?}"
        );
    }
    let (store, audit) = chain(5).await;
    let copy = stored(&store, 5).await;
    tamper(&store, put(6, copy)).await;
    assert!(audit.verify(None).await.is_err());
}

#[tokio::test]
async fn two_that_changed_places_are_found() {
    let (store, audit) = chain(5).await;
    let (two, three) = (stored(&store, 2).await, stored(&store, 3).await);
    tamper(&store, put(2, three)).await;
    tamper(&store, put(3, two)).await;
    assert!(matches!(audit.verify(None).await, Err(AuditError::Changed { number: 2 })));
}

#[tokio::test]
async fn a_new_chain_in_the_place_of_the_old_is_found_by_a_head_that_was_kept() {
    let (_, audit) = chain(5).await;
    let kept = audit.head().await.unwrap();
    // Somebody who can write all of the store makes it anew, without what it was about.
    let other = store().await;
    let forged = Audit::new(Arc::clone(&other));
    for number in [1, 2, 4, 5, 6] {
        forged.note(&event(number, None)).await.unwrap();
    }
    forged.seal().await.unwrap();
    assert!(forged.verify(None).await.is_ok());
    assert!(matches!(forged.verify(Some(kept)).await, Err(AuditError::OtherHead { .. })));
    // Or cuts it off.
    let short = Audit::new(chain(4).await.0);
    assert!(matches!(short.verify(Some(kept)).await, Err(AuditError::Missing { number: 5 })));
}

#[tokio::test]
async fn only_one_process_chains() {
    let (store, audit) = chain(1).await;
    audit.note(&event(2, None)).await.unwrap();
    let open = audit.open().await.unwrap();
    // Another one is faster.
    Audit::new(store).seal().await.unwrap();
    assert!(matches!(audit.chain(&open).await, Err(AuditError::NotAlone)));
    assert_eq!(audit.verify(None).await.unwrap().links, 2);
}
