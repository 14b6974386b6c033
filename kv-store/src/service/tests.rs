use proptest::prelude::*;
use rstest::rstest;
use transfer::{Slice, TransferBatch};
use types::BlockEvent;

use super::*;
use crate::Config;
use crate::follower::Follower;
use crate::log::{Batch, BatchKind};
use crate::testing::{BLOCK_TOKENS, PATIENCE, Peer, compute, eventually, lonely_store, tokens};

fn root(store: &Store) -> Vec<u8> {
    store.common_root().0.to_vec()
}

fn code(status: Status) -> ErrorCode {
    status::from_status(&status).code
}

fn acquire(store: &Store, hashes: &[BlockHash], lease_ttl_ms: u64) -> v1::AcquireRequest {
    v1::AcquireRequest {
        kv_root: root(store),
        hashes: convert::hashes_to_wire(hashes),
        moved: false,
        lease_ttl_ms,
    }
}

fn reserve(store: &Store, parent: BlockHash, hashes: &[BlockHash], lease_ttl_ms: u64) -> v1::ReserveRequest {
    v1::ReserveRequest {
        kv_root: root(store),
        parent: parent.0.to_vec(),
        hashes: convert::hashes_to_wire(hashes),
        lease_ttl_ms,
    }
}

#[tokio::test]
async fn a_lease_keeps_its_blocks_until_it_is_released() {
    let peer = Peer::start(3, Config::default()).await;
    let sequence = compute(&peer.store, "", &tokens(1, 2 * BLOCK_TOKENS));
    let chain = sequence.chain().to_vec();
    drop(sequence);
    let mut client = peer.client();
    let asked = [chain[0], chain[1], BlockHash([9; 16])];
    let answer = client
        .acquire(acquire(&peer.store, &asked, 60_000))
        .await
        .unwrap()
        .into_inner();
    let hashes: Vec<_> = answer.blocks.iter().map(|block| block.hash.clone()).collect();
    assert_eq!(
        hashes,
        convert::hashes_to_wire(&chain),
        "a leading run, and no more"
    );
    assert_eq!(answer.region.unwrap().endpoint, peer.transport.endpoint());
    assert_eq!(peer.store.allocate(2).unwrap_err().available, 1);

    let release = v1::ReleaseRequest {
        lease_id: answer.lease_id,
    };
    assert!(client.release(release).await.unwrap().into_inner().held);
    assert!(!client.release(release).await.unwrap().into_inner().held);
    assert_eq!(peer.store.allocate(3).unwrap().len(), 3);
    let stats = client.stats(v1::StatsRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (stats.capacity_blocks, stats.block_bytes, stats.evictions),
        (3, 512, 2)
    );
    assert_eq!(
        (stats.hits, stats.misses),
        (2, 3),
        "two of Acquire, and the first look of the sequence"
    );
    peer.stop().await;
}

#[tokio::test]
async fn a_lease_that_nobody_releases_ends_by_itself() {
    let config = Config {
        lease_ttl_max: Duration::from_millis(20),
        expiry_interval: Duration::from_millis(5),
        ..Config::default()
    };
    let peer = Peer::start(2, config).await;
    let chain = compute(&peer.store, "", &tokens(1, BLOCK_TOKENS))
        .chain()
        .to_vec();
    let mut client = peer.client();
    // Asks for ages; the node's own bound holds.
    let lease_id = client
        .acquire(acquire(&peer.store, &chain, u64::MAX))
        .await
        .unwrap()
        .into_inner()
        .lease_id;
    assert_eq!(peer.store.stats().blocks.leases, 1);
    eventually("the lease has expired", || peer.store.stats().blocks.pinned == 0).await;
    assert!(
        !client
            .release(v1::ReleaseRequest { lease_id })
            .await
            .unwrap()
            .into_inner()
            .held
    );
    peer.stop().await;
}

#[tokio::test]
async fn what_cannot_be_answered_is_refused_with_its_reason() {
    let config = Config {
        hashes_max: 2,
        leases_max: 1,
        watchers_max: 0,
        ..Config::default()
    };
    let peer = Peer::start(2, config).await;
    let store = &peer.store;
    let chain = compute(store, "", &tokens(1, BLOCK_TOKENS)).chain().to_vec();
    let mut client = peer.client();
    let good = acquire(store, &chain, 1000);
    let acquires = [
        (
            ErrorCode::Invalid,
            v1::AcquireRequest {
                kv_root: vec![1; 15],
                ..good.clone()
            },
        ),
        (
            ErrorCode::Conflict,
            v1::AcquireRequest {
                kv_root: vec![1; 16],
                ..good.clone()
            },
        ),
        (
            ErrorCode::Invalid,
            v1::AcquireRequest {
                hashes: vec![vec![1; 17]],
                ..good.clone()
            },
        ),
        (ErrorCode::Invalid, acquire(store, &[chain[0]; 3], 1000)),
        (ErrorCode::Invalid, acquire(store, &chain, 0)),
    ];
    for (expected, request) in acquires {
        assert_eq!(code(client.acquire(request).await.unwrap_err()), expected);
    }
    client.acquire(good.clone()).await.unwrap();
    let full = status::from_status(&client.acquire(good).await.unwrap_err());
    assert_eq!(
        (full.code, full.retry_after_ms),
        (ErrorCode::Overloaded, Some(100))
    );

    let unknown = BlockHash([3; 16]);
    let orphan = reserve(store, unknown, &[BlockHash([4; 16])], 1000);
    assert_eq!(
        code(client.reserve(orphan).await.unwrap_err()),
        ErrorCode::NotFound
    );
    let nothing = v1::CommitRequest {
        reservation_id: 1,
        checksums: Vec::new(),
    };
    assert_eq!(
        code(client.commit(nothing).await.unwrap_err()),
        ErrorCode::NotFound
    );
    let nothing = v1::AbortRequest { reservation_id: 0 };
    assert_eq!(
        code(client.abort(nothing).await.unwrap_err()),
        ErrorCode::NotFound
    );
    let watch = v1::WatchRequest::default();
    assert_eq!(
        code(client.watch(watch).await.unwrap_err()),
        ErrorCode::Overloaded
    );
    peer.stop().await;
}

/// A peer that holds the first block of a chain of four, and another node that writes the rest into it.
struct Put {
    peer: Peer,
    writer: Peer,
    root: BlockHash,
    chain: Vec<BlockHash>,
    reserved: v1::ReserveResponse,
}

impl Put {
    async fn reserved(config: Config, ttl_ms: u64) -> Self {
        let peer = Peer::start(8, config).await;
        let writer = Peer::start(8, Config::default()).await;
        let prompt = tokens(1, 4 * BLOCK_TOKENS);
        drop(compute(&peer.store, "", &prompt[..BLOCK_TOKENS]));
        let sequence = compute(&writer.store, "", &prompt);
        let (root, chain) = (sequence.root(), sequence.chain().to_vec());
        let request = reserve(&peer.store, root, &chain, ttl_ms);
        let reserved = peer.client().reserve(request).await.unwrap().into_inner();
        assert_eq!((reserved.held_blocks, reserved.block_offsets.len()), (1, 3));
        Self {
            peer,
            writer,
            root,
            chain,
            reserved,
        }
    }

    /// Writes the three blocks that the peer lacks.
    async fn write(&self) -> Result<(), transfer::TransferError> {
        let pins = self.writer.store.match_prefix(&self.chain);
        let slice = |(pin, offset): (&BlockPin, &u64)| Slice {
            local_offset: self.writer.store.byte_range(pin.block()).start,
            remote_offset: *offset,
            len: 512,
        };
        let region = self.reserved.region.clone().unwrap();
        let batch = TransferBatch {
            region: self.writer.store.region(),
            remote: RemoteRegion {
                endpoint: region.endpoint,
                epoch: types::Epoch(region.epoch),
                key: region.key,
            },
            slices: pins[1..]
                .iter()
                .zip(&self.reserved.block_offsets)
                .map(slice)
                .collect(),
            keep: transfer::Keep::default(),
        };
        self.writer
            .transport
            .write(batch, Instant::now() + PATIENCE)
            .await
            .map(drop)
    }

    fn checksums(&self) -> Vec<u64> {
        let pins = self.writer.store.match_prefix(&self.chain[1..]);
        pins.iter().map(|pin| pin.checksum().0).collect()
    }

    async fn commit(&self, checksums: Vec<u64>) -> Result<(), Error> {
        let request = v1::CommitRequest {
            reservation_id: self.reserved.reservation_id,
            checksums,
        };
        let committed = self.peer.client().commit(request).await;
        committed.map(drop).map_err(|status| status::from_status(&status))
    }

    /// Nothing is left of the put: no slot, no pin, no way to write.
    async fn assert_ended(self) {
        eventually("the slots are free", || {
            let blocks = self.peer.store.stats().blocks;
            (blocks.owned, blocks.pinned, blocks.free) == (0, 0, 7)
        })
        .await;
        assert_eq!(self.peer.store.lookup_len(&self.chain), 1);
        let written = self.write().await.unwrap_err();
        assert_eq!(written.code(), ErrorCode::NotFound);
        assert_eq!(
            self.commit(self.checksums()).await.unwrap_err().code,
            ErrorCode::NotFound
        );
        self.peer.store.table().check_integrity();
        self.peer.stop().await;
        self.writer.stop().await;
    }
}

#[tokio::test]
async fn a_put_is_published_when_it_is_committed() {
    let put = Put::reserved(Config::default(), 10_000).await;
    assert_eq!(put.root, put.peer.store.common_root());
    put.write().await.unwrap();
    assert_eq!(put.peer.store.lookup_len(&put.chain), 1);
    put.commit(put.checksums()).await.unwrap();
    let held = put.peer.store.match_prefix(&put.chain);
    crate::testing::assert_content(&put.peer.store, &held, &put.chain);
    assert_eq!(
        put.write().await.unwrap_err().code(),
        ErrorCode::NotFound,
        "the writer is fenced"
    );
    drop(held);
    let blocks = put.peer.store.stats().blocks;
    assert_eq!((blocks.owned, blocks.pinned, blocks.cached), (0, 0, 4));
}

#[tokio::test]
async fn of_a_put_with_one_wrong_block_nothing_is_published() {
    let put = Put::reserved(Config::default(), 10_000).await;
    put.write().await.unwrap();
    let mut checksums = put.checksums();
    checksums[2] ^= 1;
    assert_eq!(put.commit(checksums).await.unwrap_err().code, ErrorCode::Corrupt);
    assert_eq!(put.peer.store.stats().corruptions, 1);
    put.assert_ended().await;
}

#[tokio::test]
async fn a_put_with_too_few_checksums_is_aborted() {
    let put = Put::reserved(Config::default(), 10_000).await;
    let error = put.commit(vec![0; 2]).await.unwrap_err();
    assert_eq!(
        (error.code, error.param.as_deref()),
        (ErrorCode::Invalid, Some("checksums"))
    );
    put.assert_ended().await;
}

#[tokio::test]
async fn an_aborted_put_leaves_nothing() {
    let put = Put::reserved(Config::default(), 10_000).await;
    put.write().await.unwrap();
    let reservation_id = put.reserved.reservation_id;
    put.peer
        .client()
        .abort(v1::AbortRequest { reservation_id })
        .await
        .unwrap();
    put.assert_ended().await;
}

#[tokio::test]
async fn a_put_whose_writer_vanished_leaves_nothing() {
    let config = Config {
        expiry_interval: Duration::from_millis(5),
        ..Config::default()
    };
    let put = Put::reserved(config, 20).await;
    put.assert_ended().await;
}

#[tokio::test]
async fn a_full_pool_grants_what_it_has() {
    let config = Config {
        reservations_max: 1,
        ..Config::default()
    };
    let peer = Peer::start(2, config).await;
    let (root, chain) = peer.store.chain("", &tokens(1, 4 * BLOCK_TOKENS));
    let mut client = peer.client();
    let request = reserve(&peer.store, root, &chain, 10_000);
    let held = peer.store.allocate(1).unwrap();
    let reserved = client.reserve(request.clone()).await.unwrap().into_inner();
    assert_eq!((reserved.held_blocks, reserved.block_offsets.len()), (0, 1));
    assert_eq!(
        code(client.reserve(request.clone()).await.unwrap_err()),
        ErrorCode::Overloaded
    );
    drop(held);
    let reservation_id = reserved.reservation_id;
    client.abort(v1::AbortRequest { reservation_id }).await.unwrap();
    let all = peer.store.allocate(2).unwrap();
    let reserved = client.reserve(request).await.unwrap().into_inner();
    assert_eq!((reserved.reservation_id, reserved.block_offsets.len()), (0, 0));
    drop(all);
    peer.stop().await;
}

#[tokio::test]
async fn a_watcher_follows_over_grpc_and_its_stream_ends_with_the_node() {
    let peer = Peer::start(4, Config::default()).await;
    let _first = compute(&peer.store, "", &tokens(1, 2 * BLOCK_TOKENS));
    let mut follower = Follower::new();
    let (epoch, from_sequence) = follower.resume();
    let request = v1::WatchRequest {
        epoch: epoch.0,
        from_sequence,
    };
    let mut stream = peer.client().watch(request).await.unwrap().into_inner();
    let mut known = 0;
    while follower.sequence() != Some(3) {
        let batch = Batch::from_wire(&stream.message().await.unwrap().unwrap()).unwrap();
        known += follower.apply(batch).unwrap().events.len();
        if known == 2 {
            drop(compute(&peer.store, "", &tokens(2, BLOCK_TOKENS)));
        }
    }
    assert_eq!((known, follower.epoch()), (3, Some(peer.store.epoch())));
    peer.stop().await;
    assert!(matches!(stream.message().await, Ok(None) | Err(_)));
}

/// What a reader knows of a node, and its stream if it has one.
struct Reader {
    follower: Follower,
    known: std::collections::BTreeSet<BlockHash>,
    stream: Option<Watcher>,
}

impl Reader {
    fn new() -> Self {
        Self {
            follower: Follower::new(),
            known: Default::default(),
            stream: None,
        }
    }

    /// Takes one message; a `lost` one never arrives. `false` if there was none.
    fn take(&mut self, store: &Store, lost: bool) -> bool {
        let stream = self.stream.get_or_insert_with(|| {
            let (epoch, from_sequence) = self.follower.resume();
            let request = v1::WatchRequest {
                epoch: epoch.0,
                from_sequence,
            };
            let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
            Watcher::new(store, CancellationToken::new(), permit, &request)
        });
        let Some(batch) = stream.ready() else {
            return false;
        };
        if lost {
            // A stream loses nothing in its middle. Entries are numbered all the same; parts of a snapshot are
            // not, so there the stream breaks.
            if batch.kind != BatchKind::Entries {
                self.stream = None;
            }
            return true;
        }
        match self.follower.apply(Batch::from_wire(&batch.to_wire()).unwrap()) {
            Ok(applied) => {
                if applied.reset {
                    self.known.clear();
                }
                for event in applied.events {
                    self.learn(event);
                }
            }
            Err(_) => {
                self.follower.reset();
                self.stream = None;
            }
        }
        true
    }

    fn learn(&mut self, event: BlockEvent) {
        match event {
            BlockEvent::Stored { hash, .. } => assert!(self.known.insert(hash), "stored twice"),
            BlockEvent::Removed { hash } => assert!(self.known.remove(&hash), "removed, but not stored"),
            BlockEvent::Moved { .. } => panic!("nothing moves"),
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Compute(u8, usize),
    Evict(usize),
    Take(bool),
    Disconnect,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_follower_always_catches_up_whatever_is_lost(
        log_entries_max in 1..30usize,
        watch_buffer_events in 1..6usize,
        ops in prop::collection::vec(
            prop_oneof![
                4 => (0..4u8, 1..5usize).prop_map(|(seed, blocks)| Op::Compute(seed, blocks)),
                2 => (1..8usize).prop_map(Op::Evict),
                6 => prop::bool::weighted(0.1).prop_map(Op::Take),
                1 => Just(Op::Disconnect),
            ],
            1..100,
        ),
    ) {
        let config = Config { log_entries_max, watch_buffer_events, ..Config::default() };
        let store = lonely_store(10, config);
        let mut reader = Reader::new();
        for op in ops {
            match op {
                Op::Compute(seed, blocks) => drop(compute(&store, "", &tokens(u32::from(seed), blocks * BLOCK_TOKENS))),
                Op::Evict(blocks) => drop(store.allocate(blocks)),
                Op::Take(lost) => drop(reader.take(&store, lost)),
                Op::Disconnect => reader.stream = None,
            }
        }
        // A lost message shows at the next one, so there has to be one.
        drop(compute(&store, "", &tokens(9, BLOCK_TOKENS)));
        while reader.take(&store, false) {}
        let held: std::collections::BTreeSet<_> =
            store.table().snapshot().finish().blocks.iter().map(|block| block.hash).collect();
        prop_assert_eq!(reader.follower.sequence(), Some(store.stats().log_sequence));
        prop_assert_eq!(reader.known, held);
    }
}

#[rstest]
#[case(1, 1)]
#[case(60_000, 60_000)]
#[case(u64::MAX, 60_000)]
#[tokio::test(start_paused = true)]
async fn promises_are_as_long_as_asked_for_up_to_the_bound(#[case] asked_ms: u64, #[case] given_ms: u64) {
    let now = Instant::now().into_std();
    let expires = expiry(asked_ms, Duration::from_secs(60)).unwrap();
    assert_eq!(expires - now, Duration::from_millis(given_ms));
}
