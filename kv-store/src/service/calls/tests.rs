use std::time::Duration;

use rstest::rstest;
use tokio::time::Instant;
use transfer::mem::Faults;
use transfer::{Answered, Call, MemNetwork, Payload, RegionId, TcpTransport, Transport};
use types::Epoch;

use super::*;
use crate::Config;
use crate::testing::*;

/// A store, and somebody who calls it, with memory of its own.
struct Called {
    peer: Peer,
    caller: Arc<dyn Transport>,
    memory: Arc<dyn types::Memory>,
    region: RegionId,
}

const BLOCK: usize = 512;

impl Called {
    async fn new(blocks: usize) -> Self {
        let peer = Peer::start(blocks, Config::default()).await;
        let address = "127.0.0.1:0".parse().unwrap();
        let caller = TcpTransport::bind(address, Epoch(1), transfer::tcp::Config::default());
        Self::with(peer, caller.await.unwrap()).await
    }

    async fn with(peer: Peer, caller: Arc<dyn Transport>) -> Self {
        let memory = caller.allocate(64 * BLOCK).unwrap();
        let region = caller.register(memory.clone()).unwrap();
        let called = Self {
            peer,
            caller,
            memory,
            region,
        };
        // The service answers from the moment on at which its task runs.
        while let Err(error) = called.ask(exists(&[]), Payload::None).await {
            assert_eq!(error.code, ErrorCode::Unavailable);
            tokio::task::yield_now().await;
        }
        called
    }

    async fn ask(&self, call: store_call::Call, payload: Payload) -> Result<store_reply::Reply, Error> {
        let root = self.peer.store.common_root();
        let message = v1::StoreCall {
            kv_root: root.0.to_vec(),
            call: Some(call),
        };
        self.send(message.encode_to_vec(), payload).await
    }

    async fn send(&self, message: Vec<u8>, payload: Payload) -> Result<store_reply::Reply, Error> {
        let call = Call {
            endpoint: self.peer.transport.endpoint(),
            epoch: self.peer.store.epoch(),
            message,
            payload,
        };
        let Answered { message, .. } = self.caller.call(call, Instant::now() + PATIENCE).await?;
        match v1::StoreReply::decode(message.as_slice()).unwrap().reply.unwrap() {
            store_reply::Reply::Failed(failure) => Err(status::from_failure(&failure)),
            reply => Ok(reply),
        }
    }

    /// Puts blocks with the bytes that they have in all tests.
    async fn put(&self, parent: BlockHash, hashes: &[BlockHash]) -> Result<usize, Error> {
        let contents: Vec<_> = hashes.iter().map(|hash| content(*hash)).collect();
        let checksums = contents.iter().map(|bytes| Checksum::of(bytes)).collect();
        self.put_bytes(put(parent, hashes, checksums), &contents.concat())
            .await
    }

    async fn put_bytes(&self, put: v1::PutCall, bytes: &[u8]) -> Result<usize, Error> {
        transfer::memory::copy_in(self.memory.as_ref(), 0, bytes).unwrap();
        let payload = Payload::Send {
            region: self.region,
            runs: vec![(0, bytes.len() as u64)],
        };
        match self.ask(store_call::Call::Put(put), payload).await? {
            store_reply::Reply::Put(reply) => Ok(reply.held_blocks as usize),
            other => panic!("{other:?}"),
        }
    }

    async fn get(&self, hashes: &[BlockHash]) -> Vec<(Checksum, Vec<u8>)> {
        let call = store_call::Call::Get(v1::GetCall {
            hashes: convert::hashes_to_wire(hashes),
        });
        let payload = Payload::Receive {
            region: self.region,
            runs: vec![(0, (hashes.len() * BLOCK) as u64)],
            keep: Keep::default(),
            unit_bytes: None,
        };
        let store_reply::Reply::Get(reply) = self.ask(call, payload).await.unwrap() else {
            panic!("not the answer to a get");
        };
        let bytes = |at: usize| transfer::memory::copy_out(self.memory.as_ref(), at * BLOCK, BLOCK).unwrap();
        let blocks = reply.blocks.iter().enumerate();
        blocks
            .map(|(at, block)| (Checksum(block.checksum), bytes(at)))
            .collect()
    }
}

fn exists(hashes: &[BlockHash]) -> store_call::Call {
    store_call::Call::Exists(v1::ExistsCall {
        hashes: convert::hashes_to_wire(hashes),
    })
}

fn put(parent: BlockHash, hashes: &[BlockHash], checksums: Vec<Checksum>) -> v1::PutCall {
    v1::PutCall {
        parent: parent.0.to_vec(),
        hashes: convert::hashes_to_wire(hashes),
        checksums: checksums.into_iter().map(|checksum| checksum.0).collect(),
        tenant: String::new(),
        parent_wait_ms: 0,
    }
}

fn chain(called: &Called, seed: u32, blocks: usize) -> (BlockHash, Vec<BlockHash>) {
    called.peer.store.chain("", &tokens(seed, blocks * BLOCK_TOKENS))
}

#[tokio::test]
async fn what_was_put_exists_and_comes_back() {
    let called = Called::new(16).await;
    let (root, hashes) = chain(&called, 1, 5);
    assert_eq!(called.put(root, &hashes[..3]).await, Ok(3));
    let reply = called.ask(exists(&hashes[1..4]), Payload::None).await.unwrap();
    let held = vec![true, true, false];
    assert_eq!(reply, store_reply::Reply::Exists(v1::ExistsReply { held }));
    for _ in 0..3 {
        let got = called.get(&hashes).await;
        assert_eq!(got.len(), 3);
        for ((checksum, bytes), hash) in got.iter().zip(&hashes) {
            assert!(*bytes == content(*hash) && *checksum == Checksum::of(bytes));
        }
    }
    assert_eq!(called.put(root, &hashes).await, Ok(5), "the rest is added");
    assert_eq!(
        called.put(hashes[3], &hashes[4..]).await,
        Ok(1),
        "it is held already"
    );
    assert_eq!(called.get(&hashes[2..]).await.len(), 3);
    let stats = called.peer.store.stats();
    assert_eq!(
        (stats.blocks.cached, stats.blocks.owned, stats.blocks.pinned),
        (5, 0, 0)
    );
    called.peer.stop().await;
}

#[tokio::test]
async fn bytes_that_are_not_what_was_promised_are_not_published() {
    let called = Called::new(16).await;
    let (root, hashes) = chain(&called, 1, 2);
    let mut bytes: Vec<u8> = hashes.iter().flat_map(|hash| content(*hash)).collect();
    let checksums = bytes.chunks(BLOCK).map(Checksum::of).collect();
    bytes[700] ^= 1;
    let error = called.put_bytes(put(root, &hashes, checksums), &bytes).await;
    assert_eq!(error.unwrap_err().code, ErrorCode::Corrupt);
    let stats = called.peer.store.stats();
    assert_eq!(
        (stats.blocks.free, stats.corruptions),
        (16, 1),
        "nor the one before it"
    );
    called.peer.stop().await;
}

#[tokio::test]
async fn a_full_pool_takes_as_much_as_it_can() {
    let called = Called::new(4).await;
    let (root, hashes) = chain(&called, 1, 6);
    let kept = called.peer.store.allocate(1).unwrap();
    assert_eq!(called.put(root, &hashes).await, Ok(3));
    assert_eq!(called.get(&hashes).await.len(), 3);
    drop(kept);
    let (root, others) = chain(&called, 2, 4);
    assert_eq!(
        called.put(root, &others).await,
        Ok(4),
        "what nobody uses gives way"
    );
    assert_eq!(called.get(&hashes).await.len(), 0);
    called.peer.stop().await;
}

#[tokio::test]
async fn a_parent_that_is_on_its_way_is_waited_for() {
    let called = Called::new(16).await;
    let (root, hashes) = chain(&called, 1, 4);
    let error = called.put(hashes[1], &hashes[2..]).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    let bytes: Vec<u8> = hashes[2..].iter().flat_map(|hash| content(*hash)).collect();
    let second = v1::PutCall {
        parent_wait_ms: 60_000,
        ..put(
            hashes[1],
            &hashes[2..],
            bytes.chunks(BLOCK).map(Checksum::of).collect(),
        )
    };
    let before = Instant::now();
    let alone = called.put_bytes(second.clone(), &bytes).await;
    assert_eq!(alone.unwrap_err().code, ErrorCode::NotFound, "but not for ever");
    assert!(before.elapsed() >= PARENT_WAIT_MAX);
    let store = called.peer.store.clone();
    let first = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(compute(&store, "", &tokens(1, 2 * BLOCK_TOKENS)));
    };
    let (held, ()) = tokio::join!(called.put_bytes(second, &bytes), first);
    assert_eq!(held, Ok(2));
    assert_eq!(called.get(&hashes).await.len(), 4);
    assert_eq!(store.chain("", &tokens(1, 1)).0, root);
    called.peer.stop().await;
}

#[tokio::test]
async fn a_tenants_first_block_has_a_parent_where_the_tenant_was_never_seen() {
    let called = Called::new(8).await;
    let space = called.peer.store.space().with_tenant("acme");
    let root = space.root();
    let hashes = root.chain(&tokens(1, 2 * BLOCK_TOKENS), BLOCK_TOKENS);
    assert_eq!(
        called.put(root, &hashes).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    let bytes: Vec<u8> = hashes.iter().flat_map(|hash| content(*hash)).collect();
    let of_tenant = v1::PutCall {
        tenant: "acme".into(),
        ..put(root, &hashes, bytes.chunks(BLOCK).map(Checksum::of).collect())
    };
    assert_eq!(called.put_bytes(of_tenant, &bytes).await, Ok(2));
    assert_eq!(called.get(&hashes).await.len(), 2);
    called.peer.stop().await;
}

#[rstest]
#[case::of_another_space(v1::StoreCall { kv_root: vec![7; 16], call: None }, ErrorCode::Conflict)]
#[case::of_nothing(v1::StoreCall { kv_root: space().root().0.to_vec(), call: None }, ErrorCode::Invalid)]
#[case::without_checksums(
    v1::StoreCall {
        kv_root: space().root().0.to_vec(),
        call: Some(store_call::Call::Put(put(space().root(), &[BlockHash([1; 16])], vec![]))),
    },
    ErrorCode::Invalid
)]
#[case::without_bytes(
    v1::StoreCall {
        kv_root: space().root().0.to_vec(),
        call: Some(store_call::Call::Put(put(space().root(), &[BlockHash([1; 16])], vec![Checksum(1)]))),
    },
    ErrorCode::Invalid
)]
#[case::for_a_broken_hash(
    v1::StoreCall {
        kv_root: space().root().0.to_vec(),
        call: Some(store_call::Call::Get(v1::GetCall { hashes: vec![vec![1; 15]] })),
    },
    ErrorCode::Invalid
)]
#[tokio::test]
async fn a_call_that_makes_no_sense_is_refused(#[case] call: v1::StoreCall, #[case] code: ErrorCode) {
    let called = Called::new(4).await;
    let error = called
        .send(call.encode_to_vec(), Payload::None)
        .await
        .unwrap_err();
    assert_eq!(error.code, code, "{error}");
    let error = called.send(vec![0xff; 9], Payload::None).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Invalid, "bytes that are no message");
    assert_eq!(called.peer.store.stats().blocks.free, 4);
    called.peer.stop().await;
}

#[tokio::test]
async fn a_put_that_breaks_off_leaves_no_slot_behind() {
    let network = MemNetwork::new(
        3,
        Faults {
            break_probability: 0.3,
            flip_probability: 0.1,
            ..Faults::default()
        },
    );
    let store = store_on(16, Config::default(), Epoch(7), network.join("store", Epoch(7)));
    let peer = Peer::serve(store).await;
    let called = Called::with(peer, network.join("caller", Epoch(1))).await;
    let (mut done, mut failed) = (0, 0);
    for seed in 0..60 {
        let (root, hashes) = chain(&called, seed, 3);
        match called.put(root, &hashes).await {
            Ok(3) => done += 1,
            Ok(fewer) => panic!("{fewer} of 3"),
            Err(error) => {
                assert!(
                    matches!(error.code, ErrorCode::Unavailable | ErrorCode::Corrupt),
                    "{error}"
                );
                failed += 1;
            }
        }
        let blocks = called.peer.store.stats().blocks;
        assert_eq!((blocks.owned, blocks.pinned), (0, 0), "round {seed}");
        let pins = called.peer.store.match_prefix(&hashes);
        assert_content(&called.peer.store, &pins, &hashes[..pins.len()]);
    }
    assert!(done > 5 && failed > 5, "{done} done, {failed} failed");
    called.peer.stop().await;
}
