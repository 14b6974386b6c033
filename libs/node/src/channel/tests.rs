use std::sync::atomic::{AtomicBool, Ordering};

use proto::v1;
use proto::v1::node_client::NodeClient;
use rstest::rstest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use types::ErrorCode;

use super::*;
use crate::service::tests::idle_node;

/// Longer than anything here takes; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(30);
const FAST: KeepAlive = KeepAlive {
    interval: Duration::from_millis(50),
    timeout: Duration::from_millis(200),
};

#[rstest]
#[case("")]
#[case("localhost")]
#[case("localhost:")]
#[case(":80")]
#[case("localhost:0")]
#[case("localhost:65536")]
#[case("local host:80")]
#[case("https://localhost")]
fn an_endpoint_that_is_no_address_is_refused(#[case] endpoint: &str) {
    let error = configure(endpoint, KEEP_ALIVE).expect_err("must be refused");
    assert_eq!(error.code, ErrorCode::Invalid);
    assert!(error.message.contains(endpoint), "{error}");
}

#[rstest]
#[case("10.0.0.1:9000", "http://10.0.0.1:9000/")]
#[case("[::1]:9000", "http://[::1]:9000/")]
#[case("http://decode-0:9000/", "http://decode-0:9000/")]
fn an_endpoint_becomes_a_url(#[case] endpoint: &str, #[case] url: &str) {
    let endpoint = configure(endpoint, KEEP_ALIVE).expect("is an address");
    assert_eq!(endpoint.uri().to_string(), url);
    assert_eq!(endpoint.get_connect_timeout(), Some(CONNECT_TIMEOUT));
    assert!(endpoint.get_tcp_nodelay());
}

#[tokio::test]
async fn the_channel_that_was_unused_for_longest_is_dropped() {
    let channels = Channels::with_capacity(Connector::default(), 2);
    for endpoint in ["a:1", "b:1", "a:1", "c:1"] {
        channels.clone().get(endpoint).expect("is an address");
    }
    assert_eq!(channels.len(), 2);
    let held = |endpoint| {
        channels
            .shared
            .lock()
            .expect("not poisoned")
            .entries
            .contains_key(endpoint)
    };
    assert!(held("a:1") && held("c:1"));
    channels.forget("a:1");
    assert!(!held("a:1"));
    assert!(channels.get("no address").is_err());
}

#[tokio::test]
async fn a_channel_works_again_after_a_partition_heals() {
    let server = idle_node().await;
    let proxy = Proxy::start(server.address.to_string()).await;
    let channel = configure(&proxy.address, FAST)
        .expect("is an address")
        .connect_lazy();
    let mut client = NodeClient::new(channel);
    client.info(v1::InfoRequest {}).await.expect("reachable");

    proxy.partitioned.store(true, Ordering::SeqCst);
    // No deadline on the call: keep-alive alone must end it.
    let call = tokio::time::timeout(DEADLINE, client.info(v1::InfoRequest {})).await;
    call.expect("keep-alive ends the call")
        .expect_err("the peer cannot be reached");

    proxy.partitioned.store(false, Ordering::SeqCst);
    let healed = async { while client.info(v1::InfoRequest {}).await.is_err() {} };
    tokio::time::timeout(DEADLINE, healed)
        .await
        .expect("the channel connects anew");
}

/// Forwards connections; what arrives while partitioned is lost, as in a network that drops packets.
struct Proxy {
    address: String,
    partitioned: Arc<AtomicBool>,
}

impl Proxy {
    async fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let partitioned = Arc::new(AtomicBool::new(false));
        let drops = Arc::clone(&partitioned);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&target).await else {
                    continue;
                };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::spawn(forward(near_read, far_write, Arc::clone(&drops)));
                tokio::spawn(forward(far_read, near_write, Arc::clone(&drops)));
            }
        });
        Self { address, partitioned }
    }
}

async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, drops: Arc<AtomicBool>) {
    let mut buffer = [0; 4096];
    let mut lost = false;
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        // A connection that lost bytes can never go on: TCP would resend them, this proxy cannot.
        lost |= drops.load(Ordering::SeqCst);
        if !lost && to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    if lost {
        // Nor does the other side hear that this one hung up.
        std::future::pending::<()>().await;
    }
}
