use bytes::Bytes;

use super::*;
use crate::store::clock::TokioClock;
use crate::store::embedded::EmbeddedStore;
use crate::time::SystemClock;

async fn tenants() -> (Arc<dyn Store>, Tenants) {
    let store: Arc<dyn Store> =
        Arc::new(EmbeddedStore::in_memory(Arc::new(TokioClock::new())).await.unwrap());
    (Arc::clone(&store), Tenants::new(store, Arc::new(SystemClock)))
}

/// Stands for an audit record: what is there can be counted.
fn record(number: u32) -> Op {
    let key = key(&["record", &number.to_string()]).unwrap();
    Op::Put { key, value: Bytes::from_static(b"{}"), lease: None }
}

async fn recorded(store: &Arc<dyn Store>) -> usize {
    store.range(&Range::prefix(&below(&["record"]).unwrap())).await.unwrap().items.len()
}

fn name(text: &str) -> TenantName {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_name_is_given_once_and_recorded_once() {
    let (store, tenants) = tenants().await;
    let made = tenants.create(&name("acme"), record(1)).await.unwrap();
    assert_eq!(tenants.get(&name("acme")).await.unwrap(), made);
    assert!(matches!(tenants.create(&name("acme"), record(2)).await, Err(TenantError::Exists(_))));
    assert_eq!(recorded(&store).await, 1);
    tenants.create(&name("abc"), record(3)).await.unwrap();
    let names: Vec<_> = tenants.list().await.unwrap().into_iter().map(|tenant| tenant.name).collect();
    assert_eq!(names, [name("abc"), name("acme")]);
}

#[tokio::test]
async fn a_closing_one_gets_nothing_new_and_keeps_its_name_until_it_is_gone() {
    let (store, tenants) = tenants().await;
    let acme = name("acme");
    tenants.create(&acme, record(1)).await.unwrap();
    assert!(matches!(tenants.forget(&acme, record(2)).await, Err(TenantError::Active(_))));
    // Somebody has looked, and makes something when it is closed already.
    let active = tenants.active(&acme).await.unwrap();
    tenants.close(&acme, record(3)).await.unwrap();
    tenants.close(&acme, record(4)).await.unwrap();
    let late = Txn { compare: vec![active], then: vec![record(5)], otherwise: Vec::new() };
    assert!(!store.transact(late).await.unwrap().succeeded);
    assert!(matches!(tenants.active(&acme).await, Err(TenantError::Closing(_))));
    assert!(matches!(tenants.create(&acme, record(6)).await, Err(TenantError::Exists(_))));
    tenants.forget(&acme, record(7)).await.unwrap();
    assert!(matches!(tenants.get(&acme).await, Err(TenantError::NotFound(_))));
    assert_eq!(recorded(&store).await, 4);
    tenants.create(&acme, record(8)).await.unwrap();
}

#[tokio::test]
async fn what_is_not_there_is_told_by_name() {
    let (store, tenants) = tenants().await;
    let nobody = name("nobody");
    for error in [
        tenants.get(&nobody).await.unwrap_err(),
        tenants.active(&nobody).await.unwrap_err(),
        tenants.close(&nobody, record(1)).await.unwrap_err(),
        tenants.forget(&nobody, record(2)).await.unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "there is no tenant nobody");
    }
    assert_eq!(recorded(&store).await, 0);
}
