//! Task events, sent to containerd in the order in which they happened.
//!
//! One queue, one sender: an event that cannot be delivered is tried again until containerd is back, so that a
//! restart of containerd loses none.

use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::context;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::clock;
use crate::error::{Context, Result};

/// Events that wait while containerd is away. More than a sandbox has in its life, but for one that is exec'd into
/// again and again.
const QUEUE: usize = 4096;

/// The wait between two tries, and how often one event is tried: five minutes in all.
const AGAIN: Duration = Duration::from_millis(500);
const TRIES: u32 = 600;

/// Longest time that one try may take, in nanoseconds.
const TRY_NS: i64 = 5_000_000_000;

/// An event with a topic.
pub(super) trait Topic: MessageFull {
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ty => $topic:ident),* $(,)?) => {
        $(impl Topic for $event { const TOPIC: &'static str = topics::$topic; })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

/// Where events are handed in.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
}

impl Publisher {
    /// Starts to send to containerd's events service at `address`; without one, events go nowhere. The task ends
    /// when every publisher is gone and the queue is empty.
    pub(crate) fn start(namespace: &str, address: Option<String>) -> (Publisher, JoinHandle<()>) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let task = tokio::spawn(send_all(address, waiting));
        (Publisher { namespace: namespace.to_owned(), queue }, task)
    }

    /// Hands an event in.
    pub(super) fn publish<T: Topic>(&self, event: &T) {
        let value = event.write_to_bytes().unwrap_or_default();
        let type_url = T::descriptor().full_name().to_owned();
        let envelope = Envelope {
            timestamp: MessageField::some(clock::timestamp(clock::since_epoch())),
            namespace: self.namespace.clone(),
            topic: T::TOPIC.to_owned(),
            event: MessageField::some(Any { type_url, value, ..Any::default() }),
            ..Envelope::default()
        };
        if self.queue.try_send(envelope).is_err() {
            tracing::warn!("an event {} is lost: containerd has been away for too long", T::TOPIC);
        }
    }
}

async fn send_all(address: Option<String>, mut waiting: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = waiting.recv().await {
        let Some(address) = &address else { continue };
        for attempt in 1..=TRIES {
            match send(&mut client, address, &envelope).await {
                Ok(()) => break,
                Err(error) if attempt == TRIES => {
                    tracing::warn!("an event {} is lost: {}", envelope.topic, error.chain());
                }
                Err(_) => {
                    client = None;
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
}

async fn send(client: &mut Option<EventsClient>, address: &str, envelope: &Envelope) -> Result<()> {
    let doing = || format!("sending events to containerd at {address}");
    let connected = match client {
        Some(client) => client,
        None => {
            let socket =
                if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
            client.insert(EventsClient::new(Client::connect(&socket).await.context(doing)?))
        }
    };
    let request =
        ForwardRequest { envelope: MessageField::some(envelope.clone()), ..ForwardRequest::default() };
    connected.forward(context::with_timeout(TRY_NS), &request).await.map(drop).context(doing)
}
