//! The embedded registry, served as `perigee up` serves it, in a runtime of its own that can be killed.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use node::registry::embedded::Service;
use node::serve::{Config, Listeners, Readiness, Server};
use node::{Metrics, identity};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

pub(crate) struct Embedded {
    address: SocketAddr,
    runtime: Option<Runtime>,
}

impl Embedded {
    pub(crate) fn start() -> Self {
        let mut embedded = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            runtime: None,
        };
        embedded.resume();
        embedded
    }

    pub(crate) fn url(&self) -> String {
        format!("perigee://{}", self.address)
    }

    /// Ends it with everything that it knows. Its connections break.
    pub(crate) fn kill(&mut self) {
        let runtime = self.runtime.take().expect("runs");
        runtime.shutdown_background();
    }

    /// Starts it where it was, empty.
    pub(crate) fn resume(&mut self) {
        let runtime = Runtime::new().expect("a runtime");
        let address = self.address;
        // Not `block_on`: the caller is in a runtime already.
        let (bound_tx, bound_rx) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let listeners = listen(address).await;
            bound_tx.send(listeners.grpc_address()).expect("waited for");
            let shutdown = CancellationToken::new();
            let service = Service::new(identity::epoch(SystemTime::now(), None), shutdown.clone());
            let server = Server::new(&Config::default(), Readiness::new([]), Metrics::new());
            let server = server
                .grpc(Routes::new(service.server()))
                .run(listeners, shutdown);
            let (served, ()) = tokio::join!(server, service.run());
            served.expect("serves");
        });
        self.address = bound_rx.recv_timeout(Duration::from_secs(30)).expect("binds");
        self.runtime = Some(runtime);
    }
}

/// The runtime that was killed may hold the port for a moment.
async fn listen(address: SocketAddr) -> Listeners {
    let config = Config {
        grpc_listen: address.to_string(),
        ..Config::default()
    };
    loop {
        match Listeners::bind(&config).await {
            Ok(listeners) => return listeners,
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if self.runtime.is_some() {
            self.kill();
        }
    }
}
