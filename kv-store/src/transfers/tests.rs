use std::ops::Range;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use proto::status;
use transfer::{
    Link, Mover, RegionId, RemoteRegion, StatsSnapshot, TransferBatch, TransferError, TransferStats,
    Transport,
};
use types::{Epoch, ErrorCode, Memory};

use super::*;
use crate::Config;
use crate::testing::{BLOCK_TOKENS, PATIENCE, Peer, compute, eventually, store_on, tokens, write};

/// 128 KiB in blocks of 512 bytes.
const BLOCKS: usize = 256;

fn request(peer: &Peer, bytes_max: u64) -> v1::TestTransferRequest {
    v1::TestTransferRequest {
        peer_grpc_endpoint: peer.grpc_endpoint.clone(),
        bytes_max,
        duration_ms: 1,
        direction: v1::TransferDirection::Unspecified.into(),
    }
}

async fn test(
    from: &Peer,
    request: v1::TestTransferRequest,
) -> Vec<Result<v1::TestTransferResponse, ErrorCode>> {
    let stream = from.transfer_client().test(request).await.unwrap().into_inner();
    let code = |status| status::from_status(&status).code;
    let measured = stream.map(|step| step.map_err(code)).collect();
    tokio::time::timeout(PATIENCE, measured).await.expect("it ends")
}

fn open(bytes: u64, lease_ttl_ms: u64) -> v1::OpenProbeRequest {
    v1::OpenProbeRequest {
        bytes,
        seed: 1,
        lease_ttl_ms,
    }
}

fn refusal<T: fmt::Debug>(result: Result<T, Status>) -> ErrorCode {
    status::from_status(&result.unwrap_err()).code
}

#[tokio::test]
async fn a_test_measures_both_ways_and_leaves_nothing_behind() {
    let (a, b) = (
        Peer::start(BLOCKS, Config::default()).await,
        Peer::start(BLOCKS, Config::default()).await,
    );
    let measured = test(&a, request(&b, 16 << 10)).await;
    let measured: Vec<_> = measured.into_iter().map(|step| step.unwrap()).collect();
    let what: Vec<_> = measured
        .iter()
        .map(|step| (step.direction(), step.bytes, step.step, step.steps))
        .collect();
    let (to, from) = (v1::TransferDirection::Write, v1::TransferDirection::Read);
    assert_eq!(
        what,
        [
            (to, 4 << 10, 1, 4),
            (from, 4 << 10, 2, 4),
            (to, 16 << 10, 3, 4),
            (from, 16 << 10, 4, 4)
        ]
    );
    for step in &measured {
        assert_eq!(step.mover, "tcp");
        assert!(step.transfers >= 3 && step.bytes_per_second > 0.0, "{step:?}");
        assert!(
            0.0 < step.latency_p50_us && step.latency_p50_us <= step.latency_p99_us,
            "{step:?}"
        );
    }
    let moved = b.transport.stats();
    assert!(moved.received_bytes > 0 && moved.served_bytes > 0, "{moved:?}");
    for peer in [&a, &b] {
        eventually("all blocks are back", || peer.store.available() == BLOCKS).await;
        let stats = peer.store.stats();
        assert_eq!(
            (stats.blocks.cached, stats.log_sequence, stats.evictions),
            (0, 0, 0),
            "never cached"
        );
    }
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_pool_that_lends_too_little_ends_the_test_early() {
    let (a, b) = (
        Peer::start(BLOCKS, Config::default()).await,
        // An eighth of it is 4 KiB.
        Peer::start(64, Config::default()).await,
    );
    let measured = test(&a, request(&b, 1 << 20)).await;
    let sizes: Vec<u64> = measured.iter().map(|step| step.as_ref().unwrap().bytes).collect();
    assert_eq!(sizes, [4 << 10, 4 << 10]);
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn one_test_runs_at_a_time() {
    let (a, b) = (
        Peer::start(BLOCKS, Config::default()).await,
        Peer::start(BLOCKS, Config::default()).await,
    );
    let mut client = a.transfer_client();
    let long = v1::TestTransferRequest {
        duration_ms: 60_000,
        ..request(&b, 4096)
    };
    let first = client.test(long).await.unwrap();
    assert_eq!(
        refusal(client.test(request(&b, 4096)).await),
        ErrorCode::Overloaded
    );
    // A caller that goes away ends its test.
    drop(first);
    let permits = a.transfers.tests.clone();
    eventually("the test has ended", || permits.available_permits() == 1).await;
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_said() {
    let a = Peer::start(BLOCKS, Config::default()).await;
    let nobody = v1::TestTransferRequest {
        peer_grpc_endpoint: "127.0.0.1:1".into(),
        ..v1::TestTransferRequest::default()
    };
    assert_eq!(test(&a, nobody).await, [Err(ErrorCode::Unavailable)]);
    let nonsense = v1::TestTransferRequest {
        peer_grpc_endpoint: "nowhere".into(),
        ..v1::TestTransferRequest::default()
    };
    assert_eq!(
        refusal(a.transfer_client().test(nonsense).await),
        ErrorCode::Invalid
    );
    a.stop().await;
}

#[tokio::test]
async fn a_probe_ends_with_its_lease_and_its_writer_is_fenced() {
    let peer = Peer::start(BLOCKS, Config::default()).await;
    let mut client = peer.transfer_client();
    let probe = client.open_probe(open(4096, 50)).await.unwrap().into_inner();
    assert_eq!((probe.bytes, probe.block_offsets.len()), (4096, 8));
    eventually("the blocks are back", || peer.store.available() == BLOCKS).await;
    let close = v1::CloseProbeRequest {
        probe_id: probe.probe_id,
    };
    assert_eq!(refusal(client.close_probe(close).await), ErrorCode::NotFound);
    let writable = probe.writable.unwrap();
    let batch = TransferBatch {
        region: peer.store.region(),
        remote: RemoteRegion {
            endpoint: writable.endpoint,
            epoch: Epoch(writable.epoch),
            key: writable.key,
        },
        slices: vec![transfer::Slice {
            local_offset: 0,
            remote_offset: probe.block_offsets[0],
            len: 8,
        }],
        keep: transfer::Keep::default(),
    };
    let late = peer.transport.write(batch, Instant::now() + PATIENCE).await;
    assert!(matches!(late, Err(TransferError::UnknownKey { .. })), "{late:?}");
    peer.stop().await;
}

#[tokio::test]
async fn probes_are_few_and_small() {
    let peer = Peer::start(BLOCKS, Config::default()).await;
    let mut client = peer.transfer_client();
    assert_eq!(
        refusal(client.open_probe(open(0, 1000)).await),
        ErrorCode::Invalid
    );
    assert_eq!(
        refusal(client.open_probe(open(TEST_BYTES_MAX + 1, 1000)).await),
        ErrorCode::Invalid
    );
    assert_eq!(
        refusal(client.open_probe(open(4096, 0)).await),
        ErrorCode::Invalid
    );
    let large = client
        .open_probe(open(TEST_BYTES_MAX, 60_000))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(large.bytes, (BLOCKS / 8 * 512) as u64, "an eighth of the pool");
    client.open_probe(open(512, 60_000)).await.unwrap();
    assert_eq!(
        refusal(client.open_probe(open(512, 60_000)).await),
        ErrorCode::Overloaded
    );
    peer.stop().await;
}

#[tokio::test]
async fn a_probe_costs_few_cached_blocks() {
    let peer = Peer::start(64, Config::default()).await;
    drop(compute(&peer.store, "", &tokens(1, 64 * BLOCK_TOKENS)));
    assert_eq!(peer.store.stats().blocks.cached, 64);
    let mut client = peer.transfer_client();
    let probe = client.open_probe(open(4096, 60_000)).await.unwrap().into_inner();
    assert_eq!((probe.bytes, peer.store.stats().evictions), (4 * 512, 4));
    peer.stop().await;
}

#[tokio::test]
async fn the_checksum_of_a_probe_is_of_what_was_written() {
    let peer = Peer::start(BLOCKS, Config::default()).await;
    let mut client = peer.transfer_client();
    let probe = client.open_probe(open(1000, 60_000)).await.unwrap().into_inner();
    assert_eq!(probe.block_offsets.len(), 2);
    let second = u32::try_from(probe.block_offsets[1] / 512).unwrap();
    // Beyond the run: not part of the checksum.
    let mut bytes = crate::testing::read(&peer.store, types::BlockId(second));
    bytes[500] ^= 1;
    write(&peer.store, types::BlockId(second), &bytes);
    let close = |probe_id| v1::CloseProbeRequest { probe_id };
    let closed = client
        .close_probe(close(probe.probe_id))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(closed.checksum, probe.checksum);

    let probe = client.open_probe(open(1000, 60_000)).await.unwrap().into_inner();
    let first = types::BlockId(u32::try_from(probe.block_offsets[0] / 512).unwrap());
    let mut bytes = crate::testing::read(&peer.store, first);
    bytes[0] ^= 1;
    write(&peer.store, first, &bytes);
    let closed = client
        .close_probe(close(probe.probe_id))
        .await
        .unwrap()
        .into_inner();
    assert_ne!(closed.checksum, probe.checksum);
    peer.stop().await;
}

#[tokio::test]
async fn a_transport_that_moves_nothing_is_caught() {
    let b = Peer::start(BLOCKS, Config::default()).await;
    for direction in [v1::TransferDirection::Write, v1::TransferDirection::Read] {
        let lazy = Arc::new(Lazy(b.transport.clone()));
        let a = Peer::serve(store_on(BLOCKS, Config::default(), Epoch(7), lazy)).await;
        let request = v1::TestTransferRequest {
            direction: direction.into(),
            ..request(&b, 4096)
        };
        assert_eq!(
            test(&a, request).await,
            [Err(ErrorCode::Corrupt)],
            "{direction:?}"
        );
        a.stop().await;
    }
    eventually("the peer has its blocks back", || b.store.available() == BLOCKS).await;
    b.stop().await;
}

#[tokio::test]
async fn a_node_describes_its_transfers_and_its_host() {
    let b = Peer::start(BLOCKS, Config::default()).await;
    let lazy = Arc::new(Lazy(b.transport.clone()));
    let a = Peer::serve(store_on(BLOCKS, Config::default(), Epoch(7), lazy)).await;
    let said = a
        .transfer_client()
        .describe(v1::DescribeTransfersRequest {})
        .await;
    let said = said.unwrap().into_inner();
    assert_eq!(said.endpoint, b.transport.endpoint());
    assert_eq!(
        (said.movers[0].name.as_str(), said.movers[0].usable),
        ("ucx", false)
    );
    assert_eq!(
        (said.links[0].mover.as_str(), said.links[0].written_bytes),
        ("tcp", 3)
    );
    assert_eq!(said.links[0].obstacle, "libucp.so.0 was not found");
    let host = proto::convert::host(&said.host_json).unwrap();
    assert!(!host.boot_id.is_empty(), "{host:?}");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn the_nodes_own_setting_of_the_gid_index_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [("IB_GID_INDEX".to_owned(), "3".to_owned())].into();
    let reader = HostReader::new(folder.path().to_owned(), &settings);
    assert_eq!(reader.read().await.unwrap().gid_index, Some(3));
    let settings = [("IB_GID_INDEX".to_owned(), "auto".to_owned())].into();
    let reader = HostReader::new(folder.path().to_owned(), &settings);
    assert_eq!(reader.read().await.unwrap(), HostFacts::default());
}

/// Says that it moved bytes, and did not.
struct Lazy(Arc<dyn Transport>);

impl Transport for Lazy {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn endpoint(&self) -> String {
        self.0.endpoint()
    }

    fn epoch(&self) -> Epoch {
        self.0.epoch()
    }

    fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError> {
        self.0.register(memory)
    }

    fn unregister(&self, region: RegionId) -> BoxFuture<'static, ()> {
        self.0.unregister(region)
    }

    fn expose_read(&self, region: RegionId) -> Result<RemoteRegion, TransferError> {
        self.0.expose_read(region)
    }

    fn grant_write(&self, region: RegionId, ranges: Vec<Range<u64>>) -> Result<RemoteRegion, TransferError> {
        self.0.grant_write(region, ranges)
    }

    fn revoke(&self, grant: &RemoteRegion) -> BoxFuture<'static, ()> {
        self.0.revoke(grant)
    }

    fn write(
        &self,
        _: TransferBatch,
        _: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        let stats = TransferStats {
            bytes: 4096,
            requests: 1,
            elapsed: Duration::from_micros(1),
            mover: "tcp",
        };
        std::future::ready(Ok(stats)).boxed()
    }

    fn read(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.write(batch, deadline)
    }

    fn flush(&self, endpoint: &str, deadline: Instant) -> BoxFuture<'static, Result<(), TransferError>> {
        self.0.flush(endpoint, deadline)
    }

    fn call(
        &self,
        call: transfer::Call,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<transfer::Answered, TransferError>> {
        self.0.call(call, deadline)
    }

    fn serve_calls(&self, calls: std::sync::Weak<dyn transfer::Calls>) {
        self.0.serve_calls(calls);
    }

    fn tear_down(&self, endpoint: &str) {
        self.0.tear_down(endpoint);
    }

    fn stats(&self) -> StatsSnapshot {
        self.0.stats()
    }

    fn links(&self) -> Vec<Link> {
        vec![Link {
            endpoint: "tcp://10.0.0.1:9000".into(),
            mover: "tcp".into(),
            lanes: Vec::new(),
            obstacle: "libucp.so.0 was not found".into(),
            connections: 2,
            written_bytes: 3,
            read_bytes: 4,
            failures: 5,
        }]
    }

    fn movers(&self) -> Vec<Mover> {
        vec![Mover {
            name: "ucx".into(),
            usable: false,
            detail: "libucp.so.0 was not found".into(),
        }]
    }
}
