//! What every transport promises, held against each of them.
#![allow(clippy::single_range_in_vec_init)] // A grant of one range is what is meant.
#![allow(clippy::unwrap_used)] // A test.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use rstest::rstest;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use transfer::memory::{copy_in, copy_out};
use transfer::{
    Keep, MemNetwork, RegionId, RemoteRegion, Slice, TcpTransport, TransferBatch, TransferError, Transport,
    mem, tcp, ucx,
};
use types::{Checksum, Epoch, ErrorCode, Memory};

mod calls;

const BYTES: usize = 1 << 16;
const CANARY: u8 = 0xa5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Mem,
    /// Forced, so that a test never goes over TCP unnoticed. Here, peers map each other's memory.
    Ucx,
    /// The same with nothing but TCP, where UCX moves bytes by its own gets as it does over a network card.
    UcxGets,
}

impl Kind {
    /// Whether bytes pass through this processor where they land, so that they are hashed on their way.
    fn shows_bytes(self) -> bool {
        matches!(self, Self::Tcp | Self::Ucx)
    }
}

/// Whether the library is here. Tests of UCX say that they skip where it is not.
fn has(kind: Kind) -> bool {
    let missing = match kind {
        Kind::Tcp | Kind::Mem => None,
        Kind::Ucx | Kind::UcxGets => ucx_sys::Library::load(None).err(),
    };
    if let Some(missing) = &missing {
        eprintln!("skipped: {missing}");
    }
    missing.is_none()
}

/// Two transports that reach each other, each with one region.
struct Pair {
    near: Arc<dyn Transport>,
    near_memory: Arc<dyn Memory>,
    near_region: RegionId,
    far: Arc<dyn Transport>,
    far_memory: Arc<dyn Memory>,
    far_region: RegionId,
}

impl Pair {
    async fn new(kind: Kind) -> Self {
        let (near, far): (Arc<dyn Transport>, Arc<dyn Transport>) = match kind {
            Kind::Tcp | Kind::Ucx | Kind::UcxGets => (bind(kind).await, bind(kind).await),
            Kind::Mem => {
                let network = MemNetwork::new(7, mem::Faults::default());
                (network.join("near", Epoch(5)), network.join("far", Epoch(5)))
            }
        };
        let near_memory = filled(&near, |i| (i * 31 + i / 251) as u8);
        let far_memory = filled(&far, |_| CANARY);
        Self {
            near_region: near.register(near_memory.clone()).unwrap(),
            far_region: far.register(far_memory.clone()).unwrap(),
            near,
            near_memory,
            far,
            far_memory,
        }
    }

    fn batch(&self, remote: &RemoteRegion, slices: Vec<Slice>) -> TransferBatch {
        TransferBatch {
            region: self.near_region,
            remote: remote.clone(),
            slices,
            keep: Keep::default(),
        }
    }

    async fn write(&self, remote: &RemoteRegion, slices: Vec<Slice>) -> Result<(), TransferError> {
        self.near
            .write(self.batch(remote, slices), soon())
            .await
            .map(drop)
    }

    async fn read(&self, remote: &RemoteRegion, slices: Vec<Slice>) -> Result<(), TransferError> {
        self.near.read(self.batch(remote, slices), soon()).await.map(drop)
    }
}

async fn bind(kind: Kind) -> Arc<TcpTransport> {
    let (choice, lanes) = match kind {
        Kind::Tcp | Kind::Mem => (ucx::Choice::Tcp, None),
        Kind::Ucx => (ucx::Choice::Ucx, None),
        Kind::UcxGets => (ucx::Choice::Ucx, Some(("TLS".to_owned(), "tcp,self".to_owned()))),
    };
    // Small parts, so that batches of the tests are split over the connections.
    let config = tcp::Config {
        part_bytes: 1000.try_into().unwrap(),
        ucx: ucx::Config {
            choice,
            settings: lanes.into_iter().collect(),
            ..ucx::Config::default()
        },
        ..tcp::Config::default()
    };
    let address = "127.0.0.1:0".parse().unwrap();
    TcpTransport::bind(address, Epoch(5), config).await.unwrap()
}

fn filled(transport: &Arc<dyn Transport>, byte: impl Fn(usize) -> u8) -> Arc<dyn Memory> {
    let memory = transport.allocate(BYTES).unwrap();
    let bytes: Vec<u8> = (0..BYTES).map(byte).collect();
    copy_in(&*memory, 0, &bytes).unwrap();
    memory
}

fn all(memory: &dyn Memory) -> Vec<u8> {
    copy_out(memory, 0, BYTES).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn slice(local_offset: u64, remote_offset: u64, len: u64) -> Slice {
    Slice {
        local_offset,
        remote_offset,
        len,
    }
}

/// Slices that do not overlap at the destination: cells of 64 bytes there, each used at most once.
fn disjoint_slices() -> impl Strategy<Value = Vec<Slice>> {
    let cell = (
        0..BYTES as u64 / 64,
        0..(BYTES - 64) as u64,
        0..64_u64,
        0..=64_u64,
    );
    prop::collection::vec(cell, 0..200).prop_map(|cells| {
        let cells: HashMap<_, _> = cells
            .into_iter()
            .map(|(cell, from, skip, len)| (cell, (from, skip, len)))
            .collect();
        let slices = cells.into_iter().map(|(cell, (from, skip, len))| {
            let len = len.min(64 - skip);
            slice(from, cell * 64 + skip, len)
        });
        slices.collect()
    })
}

fn property_of(kind: Kind, direction: fn(Slice) -> Slice, check: impl AsyncFn(&Pair, Vec<Slice>)) {
    if !has(kind) {
        return;
    }
    let runtime = Runtime::new().unwrap();
    let config = ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(slices in disjoint_slices())| {
        runtime.block_on(async {
            let pair = Pair::new(kind).await;
            check(&pair, slices.into_iter().map(direction).collect()).await;
        });
    });
}

#[rstest]
fn a_write_lands_exactly_and_touches_nothing_else(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    property_of(
        kind,
        |slice| slice,
        async |pair, slices| {
            let source = all(&*pair.near_memory);
            let mut expected = vec![CANARY; BYTES];
            for slice in &slices {
                let (from, to, len) = (
                    slice.local_offset as usize,
                    slice.remote_offset as usize,
                    slice.len as usize,
                );
                expected[to..to + len].copy_from_slice(&source[from..from + len]);
            }
            let ranges = slices
                .iter()
                .map(|slice| slice.remote_offset..slice.remote_offset + slice.len);
            let ranges: Vec<_> = ranges.collect();
            let grant = pair.far.grant_write_hashed(pair.far_region, ranges.clone());
            let grant = grant.unwrap();
            let bytes: u64 = slices.iter().map(|slice| slice.len).sum();
            let done = pair.near.write(pair.batch(&grant, slices), soon()).await.unwrap();
            assert_eq!(done.bytes, bytes);
            assert!(all(&*pair.far_memory) == expected);
            assert!(all(&*pair.near_memory) == source);
            let seen = pair.far.revoke_hashed(&grant).await;
            let held = |range: &Range<u64>| Checksum::of(&expected[range.start as usize..range.end as usize]);
            if kind.shows_bytes() && done.requests < 2 {
                let held: Vec<_> = ranges.iter().map(|range| Some(held(range))).collect();
                assert_eq!(seen, held);
            }
            for (range, seen) in ranges.iter().zip(seen) {
                assert!(seen.is_none_or(|seen| seen == held(range)));
            }
        },
    );
}

#[rstest]
fn a_read_fetches_exactly_and_touches_nothing_else(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    let flipped = |s: Slice| slice(s.remote_offset, s.local_offset, s.len);
    property_of(kind, flipped, async |pair, slices| {
        let source: Vec<u8> = (0..BYTES).map(|i| (i * 7 + i / 13) as u8).collect();
        copy_in(&*pair.far_memory, 0, &source).unwrap();
        let mut expected = all(&*pair.near_memory);
        for slice in &slices {
            let (to, from, len) = (
                slice.local_offset as usize,
                slice.remote_offset as usize,
                slice.len as usize,
            );
            expected[to..to + len].copy_from_slice(&source[from..from + len]);
        }
        let exposed = pair.far.expose_read(pair.far_region).unwrap();
        let bytes: Vec<u8> = slices
            .iter()
            .flat_map(|slice| &source[slice.remote_offset as usize..][..slice.len as usize])
            .copied()
            .collect();
        let unit_bytes = NonZeroU64::new(bytes.len() as u64).unwrap_or(NonZeroU64::MIN);
        let batch = pair.batch(&exposed, slices);
        let (done, checksums) = pair.near.read_hashed(batch, unit_bytes, soon()).await.unwrap();
        // Requests share no unit.
        let shown = kind.shows_bytes() && done.requests == 1;
        assert_eq!(checksums, shown.then(|| Checksum::of(&bytes)).as_slice());
        assert!(all(&*pair.near_memory) == expected);
        assert!(all(&*pair.far_memory) == source);
    });
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_batches_do_not_mix(#[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind) {
    const WRITERS: u64 = 16;
    if !has(kind) {
        return;
    }
    let pair = Arc::new(Pair::new(kind).await);
    let grant = pair
        .far
        .grant_write(pair.far_region, vec![0..BYTES as u64])
        .unwrap();
    let tasks: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (pair, grant) = (pair.clone(), grant.clone());
            tokio::spawn(async move {
                for i in 0..16 {
                    let offset = (i * WRITERS + writer) * 256;
                    pair.write(&grant, vec![slice(offset, offset, 256)])
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(all(&*pair.far_memory) == all(&*pair.near_memory));
    assert_eq!(pair.near.stats().batches, WRITERS * 16);
    assert_eq!(pair.near.stats().written_bytes, BYTES as u64);
    assert_eq!(pair.far.stats().received_bytes, BYTES as u64);
    assert_eq!(pair.near.stats().batches_in_flight, 0);
}

#[rstest]
#[tokio::test]
async fn what_is_not_granted_is_refused_as_a_whole(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let pair = Pair::new(kind).await;
    let grant = pair
        .far
        .grant_write(pair.far_region, vec![100..200, 200..300, 400..500])
        .unwrap();
    let endpoint = pair.far.endpoint();
    for (offset, len) in [
        (99, 2),
        (299, 2),
        (350, 1),
        (0, BYTES as u64),
        (499, 2),
        (1 << 40, 1),
    ] {
        let len_local = len.min(BYTES as u64);
        let slices = vec![slice(0, 100, 10), slice(0, offset, len_local)];
        let expected = TransferError::OutOfRange {
            endpoint: endpoint.clone(),
            offset,
            len,
        };
        let error = pair.write(&grant, slices).await.unwrap_err();
        match kind {
            // A batch that is split is refused part by part.
            Kind::Tcp | Kind::Ucx | Kind::UcxGets => {
                assert!(matches!(error, TransferError::OutOfRange { .. }), "{error}")
            }
            Kind::Mem => assert_eq!(error, expected),
        }
    }
    assert!(all(&*pair.far_memory)[300..].iter().all(|byte| *byte == CANARY));
    pair.write(&grant, vec![slice(0, 100, 200), slice(0, 400, 100)])
        .await
        .unwrap();
    assert!(pair.far.stats().serve_errors_of(ErrorCode::Invalid) >= 6);
}

#[rstest]
#[tokio::test]
async fn a_right_ends_when_it_is_revoked(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let pair = Pair::new(kind).await;
    let grant = pair.far.grant_write(pair.far_region, vec![0..100]).unwrap();
    let exposed = pair.far.expose_read(pair.far_region).unwrap();
    let one = || vec![slice(0, 0, 10)];
    pair.write(&grant, one()).await.unwrap();
    pair.read(&exposed, one()).await.unwrap();
    pair.far.revoke(&grant).await;
    pair.far.revoke(&exposed).await;
    let before = all(&*pair.far_memory);
    for refused in [pair.write(&grant, one()).await, pair.read(&exposed, one()).await] {
        let error = refused.unwrap_err();
        assert!(matches!(error, TransferError::UnknownKey { .. }), "{error}");
    }
    assert!(all(&*pair.far_memory) == before);
    pair.far.revoke(&grant).await;
}

#[rstest]
#[tokio::test]
async fn a_right_is_for_one_direction_and_one_epoch(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let pair = Pair::new(kind).await;
    let grant = pair.far.grant_write(pair.far_region, vec![0..100]).unwrap();
    let exposed = pair.far.expose_read(pair.far_region).unwrap();
    let one = || vec![slice(0, 0, 10)];
    for denied in [pair.read(&grant, one()).await, pair.write(&exposed, one()).await] {
        assert_eq!(denied.unwrap_err().code(), ErrorCode::Denied);
    }
    for epoch in [4, 6] {
        let other = RemoteRegion {
            epoch: Epoch(epoch),
            ..grant.clone()
        };
        let fenced = TransferError::Fenced {
            endpoint: pair.far.endpoint(),
            epoch: Epoch(epoch),
            current: Epoch(5),
        };
        assert_eq!(pair.write(&other, one()).await, Err(fenced));
        pair.far.revoke(&other).await;
    }
    pair.write(&grant, one()).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn local_mistakes_are_refused_before_anything_is_sent(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let pair = Pair::new(kind).await;
    let grant = pair.far.grant_write(pair.far_region, vec![0..100]).unwrap();
    for (offset, len) in [(BYTES as u64, 1), (u64::MAX, 2), (0, u64::MAX)] {
        let error = pair.write(&grant, vec![slice(offset, 0, len)]).await.unwrap_err();
        assert!(matches!(error, TransferError::OutOfBounds { .. }), "{error}");
    }
    let overflow = pair.write(&grant, vec![slice(0, u64::MAX, 2)]).await.unwrap_err();
    assert_eq!(overflow.code(), ErrorCode::Invalid);
    for endpoint in ["", "tcp://", "ucx://127.0.0.1:1", "nonsense"] {
        let elsewhere = RemoteRegion {
            endpoint: endpoint.into(),
            ..grant.clone()
        };
        let error = pair.write(&elsewhere, vec![slice(0, 0, 1)]).await.unwrap_err();
        assert!(
            matches!(error, TransferError::UnsupportedEndpoint { .. }),
            "{error}"
        );
    }
    pair.near.unregister(pair.near_region).await;
    let unknown = pair.write(&grant, vec![slice(0, 0, 1)]).await.unwrap_err();
    assert_eq!(unknown.code(), ErrorCode::NotFound);
    assert_eq!(pair.far.stats().connections_accepted, 0);
    assert!(all(&*pair.far_memory).iter().all(|byte| *byte == CANARY));
}

#[rstest]
#[tokio::test]
async fn unregistering_revokes(#[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind) {
    if !has(kind) {
        return;
    }
    let pair = Pair::new(kind).await;
    let grant = pair.far.grant_write(pair.far_region, vec![0..100]).unwrap();
    pair.far.unregister(pair.far_region).await;
    let error = pair.write(&grant, vec![slice(0, 0, 10)]).await.unwrap_err();
    assert!(matches!(error, TransferError::UnknownKey { .. }), "{error}");
}

#[rstest]
#[tokio::test]
async fn a_flush_waits_for_the_writes_before_it(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let pair = Pair::new(kind).await;
    let grant = pair
        .far
        .grant_write(pair.far_region, vec![0..BYTES as u64])
        .unwrap();
    let writes: Vec<_> = (0..8_u64)
        .map(|i| {
            let slices = vec![slice(i * 8192, i * 8192, 8192)];
            tokio::spawn(pair.near.write(pair.batch(&grant, slices), soon()))
        })
        .collect();
    pair.near.flush(&pair.far.endpoint(), soon()).await.unwrap();
    assert!(all(&*pair.far_memory) == all(&*pair.near_memory));
    for write in writes {
        write.await.unwrap().unwrap();
    }
    let never_polled = pair.near.write(pair.batch(&grant, vec![slice(0, 0, 1)]), soon());
    let flush = pair
        .near
        .flush(&pair.far.endpoint(), Instant::now() + Duration::from_millis(20));
    assert_eq!(flush.await.unwrap_err().code(), ErrorCode::Timeout);
    drop(never_polled);
    pair.near.flush(&pair.far.endpoint(), soon()).await.unwrap();
    pair.near.flush("tcp://nobody:1", soon()).await.unwrap();
}
