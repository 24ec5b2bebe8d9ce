//! What `start` leaves behind: the process that serves one sandbox until containerd says that it is over.

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use containerd_shim_protos::ttrpc::r#async::{Server, Service as TtrpcService};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::args::Args;
use crate::commands::{ADDRESS_FILE, SOCKET_FD};
use crate::config::FromContainerd;
use crate::error::{Context, Result};
use crate::log;
use crate::task::{Endpoint, Publisher, Service};
use crate::template::Spare;

/// The task API's name on the wire, in its two versions. Their messages are the same.
const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Longest wait for the last events to reach containerd.
const LAST_EVENTS: Duration = Duration::from_secs(10);

/// Serves the socket that `start` has opened.
pub(crate) fn serve(args: &Args) -> Result<()> {
    log::to_containerd(args.debug);
    let listener =
        bailey_host::sys::process::inherited(SOCKET_FD).context(|| "taking the socket over".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let events = FromContainerd::read().ttrpc_address;
    runtime.context(|| "starting the runtime".into())?.block_on(run(args, listener.into(), events, None))
}

/// Serves a socket; events go to the address of containerd's. The sandbox is the spare's, if there is one.
pub(crate) async fn run(
    args: &Args,
    listener: UnixListener,
    events: Option<String>,
    spare: Option<Spare>,
) -> Result<()> {
    let (publisher, sending) = Publisher::start(&args.namespace, events);
    let service = Service::new(&args.namespace, &args.id, publisher, spare);
    let listener = Listener::try_from(listener).context(|| "opening the socket".into())?;
    let mut server = server(listener, &service);
    server.start().await.context(|| "serving the task API".into())?;
    // containerd stops its shims by their API; what a service manager sends to all is not for us.
    let mut terminate = signal(SignalKind::terminate()).context(|| "watching for SIGTERM".into())?;
    loop {
        tokio::select! {
            () = service.shutdown.notified() => break,
            _ = terminate.recv() => {
                if service.is_over().await {
                    break;
                }
            }
        }
    }
    if let Ok(address) = std::fs::read_to_string(ADDRESS_FILE) {
        // Whoever cleans up after us may have been faster.
        let _removed = std::fs::remove_file(PathBuf::from(address.trim_start_matches("unix://")));
    }
    server.shutdown().await.context(|| "ending the task API".into())?;
    drop((server, service));
    // An event that containerd does not take within this time is lost with us.
    let _late = timeout(LAST_EVENTS, sending).await;
    Ok(())
}

fn server(listener: Listener, service: &Arc<Service>) -> Server {
    let server = Server::new().add_listener(listener);
    [TASK_V2, TASK_V3].into_iter().fold(server, |server, name| server.register_service(named(name, service)))
}

/// The service under one of its names.
fn named(name: &str, service: &Arc<Service>) -> HashMap<String, TtrpcService> {
    let methods = create_task(Arc::new(Endpoint(Arc::clone(service))));
    methods.into_values().map(|methods| (name.to_owned(), methods)).collect()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::r#async::Client;
    use containerd_shim_protos::ttrpc::{Error, Request};

    use super::*;

    /// What a request for a task that is not there comes to, under a service's name.
    async fn ask(client: &Client, service: &str) -> String {
        let request = Request {
            service: service.to_owned(),
            method: "Connect".to_owned(),
            timeout_nano: 5_000_000_000,
            ..Request::default()
        };
        match client.request(request).await {
            Err(Error::RpcStatus(status)) => status.message().to_owned(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn both_versions_of_the_task_api_are_served() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (publisher, _sending) = Publisher::start("namespace", None);
        let service = Service::new("namespace", "id", publisher, None);
        let listener = Listener::try_from(UnixListener::bind(&path).unwrap()).unwrap();
        let mut server = server(listener, &service);
        server.start().await.unwrap();
        let client = Client::connect(&format!("unix://{}", path.display())).await.unwrap();
        for name in [TASK_V2, TASK_V3] {
            assert_eq!(ask(&client, name).await, "the task is not created, or deleted");
        }
        assert!(ask(&client, "containerd.task.v9.Task").await.contains("does not exist"));
    }
}
