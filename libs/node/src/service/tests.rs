use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use proto::v1::node_client::NodeClient;
use tonic::service::Routes;
use types::{Epoch, NodeId, Role};

use super::*;
use crate::serve::{Config, Listeners, Readiness, Server};
use crate::tls::ClientCertificates;
use crate::{Channel, Metrics, Tls, channel};

/// A node that does nothing, on a free port, until it is dropped.
pub(crate) struct IdleNode {
    pub(crate) address: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    drained: Arc<AtomicBool>,
}

impl Drop for IdleNode {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub(crate) async fn idle_node() -> IdleNode {
    idle_node_over(None, ClientCertificates::Required).await
}

pub(crate) async fn idle_node_over(tls: Option<Tls>, clients: ClientCertificates) -> IdleNode {
    struct Idle;
    impl LoadSource for Idle {
        fn load(&self) -> LoadReport {
            LoadReport {
                free_blocks: 7,
                ..LoadReport::default()
            }
        }
    }
    let config = Config::default();
    let listeners = Listeners::bind(&config).await.expect("free ports");
    let address = listeners.grpc_address();
    let shutdown = CancellationToken::new();
    struct Flag(Arc<AtomicBool>);
    impl Drainable for Flag {
        fn drain(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
        fn cordon(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
        fn resume(&self) -> Result<(), Error> {
            match self.0.swap(false, Ordering::SeqCst) {
                true => Ok(()),
                false => Err(Error::unavailable("the node ends")),
            }
        }
    }
    let drained = Arc::new(AtomicBool::new(false));
    let drain = Arc::new(Flag(Arc::clone(&drained)));
    let service = NodeService::new(record(address), Arc::new(Idle), drain, shutdown.clone());
    let server = Server::new(&config, Readiness::new([]), Metrics::new())
        .tls(tls, clients)
        .grpc(Routes::new(service.server()));
    tokio::spawn(server.run(listeners, shutdown.clone()));
    IdleNode {
        address,
        shutdown,
        drained,
    }
}

fn record(address: SocketAddr) -> NodeRecord {
    NodeRecord {
        id: NodeId::new("store-0"),
        epoch: Epoch(3),
        role: Role::Store,
        grpc_endpoint: address.to_string(),
        http_endpoint: String::new(),
        transfer_endpoint: String::new(),
        model: String::new(),
        kv_space: None,
        capacity_blocks: 8,
        context_tokens_max: 0,
    }
}

fn client(node: &IdleNode) -> NodeClient<Channel> {
    NodeClient::new(channel(&node.address.to_string()).expect("is an address"))
}

#[tokio::test]
async fn a_node_says_who_it_is_and_drains_when_told() {
    let node = idle_node().await;
    let mut client = client(&node);
    let info = client
        .info(v1::InfoRequest {})
        .await
        .expect("answers")
        .into_inner();
    assert_eq!(
        proto::convert::record(&info.record_json),
        Ok(record(node.address))
    );
    assert_eq!(info.version, env!("CARGO_PKG_VERSION"));
    assert!(!node.drained.load(Ordering::SeqCst));
    client.drain(v1::DrainRequest {}).await.expect("answers");
    assert!(node.drained.load(Ordering::SeqCst));
    client.resume(v1::ResumeRequest {}).await.expect("answers");
    assert!(!node.drained.load(Ordering::SeqCst));
    let refused = client.resume(v1::ResumeRequest {}).await.expect_err("refused");
    assert_eq!(
        proto::status::from_status(&refused),
        Error::unavailable("the node ends")
    );
}

#[tokio::test]
async fn reports_are_numbered_and_end_with_the_node() {
    let node = idle_node().await;
    let mut client = client(&node);
    let request = v1::WatchLoadRequest { interval_ms: 1 };
    let started = Instant::now();
    let mut reports = client.watch_load(request).await.expect("answers").into_inner();
    for sequence in 1..=4 {
        let report = reports.message().await.expect("alive").expect("goes on");
        assert_eq!((report.sequence, report.free_blocks), (sequence, 7));
    }
    // Three intervals passed, of which none is shorter than the least one.
    assert!(started.elapsed() >= 3 * REPORT_INTERVAL_MIN - Duration::from_millis(3));
    node.shutdown.cancel();
    while reports.message().await.expect("ends in order").is_some() {}
}
