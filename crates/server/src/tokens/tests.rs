use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::random::SystemEntropy;
use crate::store::clock::TokioClock;
use crate::store::embedded::EmbeddedStore;

/// A clock that only moves when it is told to.
#[derive(Default)]
struct Hand(AtomicU64);

impl WallClock for Hand {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::Relaxed))
    }
}

struct World {
    clock: Arc<Hand>,
    store: Arc<dyn Store>,
    tokens: Tokens,
}

async fn world() -> World {
    let store: Arc<dyn Store> =
        Arc::new(EmbeddedStore::in_memory(Arc::new(TokioClock::new())).await.unwrap());
    let clock = Arc::new(Hand::default());
    let tokens = Tokens::new(Arc::clone(&store), clock.clone(), Arc::new(SystemEntropy));
    World { clock, store, tokens }
}

fn tenant(name: &str) -> Owner {
    Owner::Tenant(name.parse().unwrap())
}

fn wanted(owner: Owner) -> NewToken {
    NewToken { owner, label: "ci".into(), scopes: [Scope::Read, Scope::Write].into(), life: LIFE_DEFAULT }
}

/// Stands for an audit record.
fn record(number: u32) -> Op {
    let key = key(&["record", &number.to_string()]).unwrap();
    Op::Put { key, value: bytes::Bytes::from_static(b"{}"), lease: None }
}

async fn make(tokens: &Tokens, new: NewToken) -> Result<(Token, Secret), TokenError> {
    tokens
        .make(new, Vec::new(), |token| {
            Ok(Op::Put { key: key(&["made", token.id.as_str()])?, value: records::write(&())?, lease: None })
        })
        .await
}

#[tokio::test]
async fn a_token_proves_whose_it_is_until_it_expires() {
    let World { clock, tokens, .. } = world().await;
    let (token, secret) = make(&tokens, wanted(tenant("acme"))).await.unwrap();
    assert_eq!(tokens.check(secret.expose()).await.unwrap(), Ok(token.clone()));
    clock.0.store(token.expires.0 - 1, Ordering::Relaxed);
    assert_eq!(tokens.check(secret.expose()).await.unwrap(), Ok(token.clone()));
    clock.0.store(token.expires.0, Ordering::Relaxed);
    assert_eq!(tokens.check(secret.expose()).await.unwrap(), Err(Refusal::Expired));
}

#[tokio::test]
async fn nothing_else_proves_anything() {
    let World { tokens, .. } = world().await;
    let (token, secret) = make(&tokens, wanted(tenant("acme"))).await.unwrap();
    for text in ["", "bly_", "Bearer x", &secret.expose().to_uppercase(), &secret.expose()[1..]] {
        assert_eq!(tokens.check(text).await.unwrap(), Err(Refusal::Form), "{text}");
    }
    // Well made, with another secret: by somebody who knows the id from a list.
    let forged = Secret::make(&token.id, &SystemEntropy).unwrap();
    assert_eq!(tokens.check(forged.expose()).await.unwrap(), Err(Refusal::Forged));
    let unknown = Secret::make(&"aaaaaaaaaaaa".parse().unwrap(), &SystemEntropy).unwrap();
    assert_eq!(tokens.check(unknown.expose()).await.unwrap(), Err(Refusal::Unknown));
}

#[tokio::test]
async fn a_revoked_one_is_refused_and_only_its_owner_can_revoke() {
    let World { tokens, .. } = world().await;
    let (token, secret) = make(&tokens, wanted(tenant("acme"))).await.unwrap();
    let others = tokens.revoke(&tenant("other"), &token.id, record(1)).await;
    let nobodys = tokens.revoke(&tenant("other"), &"aaaaaaaaaaaa".parse().unwrap(), record(2)).await;
    assert!(matches!(others, Err(TokenError::NotFound(_))));
    assert!(matches!(nobodys, Err(TokenError::NotFound(_))));
    assert!(tokens.check(secret.expose()).await.unwrap().is_ok());
    tokens.revoke(&tenant("acme"), &token.id, record(3)).await.unwrap();
    assert_eq!(tokens.check(secret.expose()).await.unwrap(), Err(Refusal::Unknown));
    assert!(tokens.list(&tenant("acme")).await.unwrap().is_empty());
}

#[tokio::test]
async fn each_owner_has_a_list_of_its_own() {
    let World { tokens, .. } = world().await;
    // One name begins with the other: that is no reason to see its tokens.
    for owner in [tenant("acme"), tenant("acme-2"), Owner::Operator] {
        make(&tokens, wanted(owner.clone())).await.unwrap();
        make(&tokens, wanted(owner)).await.unwrap();
    }
    for owner in [tenant("acme"), tenant("acme-2"), Owner::Operator] {
        let found = tokens.list(&owner).await.unwrap();
        assert!(found.len() == 2 && found.iter().all(|token| token.owner == owner), "{found:?}");
    }
}

#[tokio::test]
async fn no_secret_is_stored() {
    let World { store, tokens, .. } = world().await;
    let (_, secret) = make(&tokens, wanted(tenant("acme"))).await.unwrap();
    let all = store.range(&Range::prefix(&crate::store::Prefix::all())).await.unwrap();
    assert_eq!(all.items.len(), 3);
    for item in &all.items {
        let text = format!("{}{}", item.key, item.value.escape_ascii());
        // Not even a part of it.
        for part in secret.expose().as_bytes()[20..60].chunks(8) {
            assert!(!text.contains(std::str::from_utf8(part).unwrap()), "{text}");
        }
    }
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let World { tokens, store, .. } = world().await;
    let new = || wanted(tenant("acme"));
    let long = make(&tokens, NewToken { label: "x".repeat(LABEL_MAX + 1), ..new() }).await;
    assert!(matches!(long, Err(TokenError::LongLabel(201))));
    let none = make(&tokens, NewToken { scopes: BTreeSet::new(), ..new() }).await;
    assert!(matches!(none, Err(TokenError::NoScope)));
    for life in [Duration::ZERO, LIFE_MAX + Duration::from_secs(1)] {
        assert!(matches!(make(&tokens, NewToken { life, ..new() }).await, Err(TokenError::Life(_))));
    }
    assert!(store.range(&Range::prefix(&crate::store::Prefix::all())).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn nothing_is_made_for_an_owner_who_is_gone_or_without_a_record() {
    let World { tokens, store, .. } = world().await;
    let gone = vec![exists(&key(&["tenant", "acme"]).unwrap(), true)];
    let made = tokens.make(wanted(tenant("acme")), gone, |_| Ok(record(1))).await;
    assert!(matches!(made, Err(TokenError::Changed)));
    let unrecorded = tokens.make(wanted(tenant("acme")), Vec::new(), |_| Err(key(&[""]).unwrap_err())).await;
    assert!(matches!(unrecorded, Err(TokenError::Record(_))));
    assert!(store.range(&Range::prefix(&crate::store::Prefix::all())).await.unwrap().items.is_empty());
}
