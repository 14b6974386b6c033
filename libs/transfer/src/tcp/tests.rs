#![allow(clippy::single_range_in_vec_init)] // A grant of one range is what is meant.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use types::ErrorCode;

use super::wire::{ANSWER_HEAD_BYTES, AnswerHead, Operation, RequestHead, Status};
use super::*;
use crate::HostMemory;
use crate::memory::{copy_in, copy_out, with_bytes};
use crate::transport::Slice;

const MIB: usize = 1 << 20;

/// These tests are about bytes in the connection.
fn inline() -> Config {
    Config {
        part_bytes: (4 * MIB).try_into().unwrap(),
        ucx: ucx::Config {
            choice: Choice::Tcp,
            ..ucx::Config::default()
        },
        ..Config::default()
    }
}

async fn bind(config: Config) -> Arc<TcpTransport> {
    bind_at("127.0.0.1:0", Epoch(1), config).await
}

async fn bind_at(address: &str, epoch: Epoch, config: Config) -> Arc<TcpTransport> {
    TcpTransport::bind(address.parse().unwrap(), epoch, config)
        .await
        .unwrap()
}

fn register(transport: &TcpTransport, bytes: usize) -> (RegionId, Arc<HostMemory>) {
    let memory = HostMemory::allocate(bytes).unwrap();
    (transport.register(memory.clone()).unwrap(), memory)
}

fn batch(region: RegionId, remote: &RemoteRegion, offset: u64, len: usize) -> TransferBatch {
    TransferBatch {
        region,
        remote: remote.clone(),
        slices: vec![Slice {
            local_offset: offset,
            remote_offset: offset,
            len: len as u64,
        }],
        keep: crate::Keep::default(),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn shortly() -> Instant {
    Instant::now() + Duration::from_millis(50)
}

/// Waits for other tasks and threads to make `claim` true.
async fn eventually(claim: impl Fn() -> bool) {
    let waiting = async {
        while !claim() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), waiting)
        .await
        .expect("it never came true");
}

fn address_of(endpoint: &str) -> &str {
    endpoint.strip_prefix("tcp://").unwrap()
}

/// A connection on which the test says every byte itself.
async fn connect(transport: &TcpTransport) -> TcpStream {
    TcpStream::connect(address_of(&transport.endpoint()))
        .await
        .unwrap()
}

fn request(operation: Operation, remote: &RemoteRegion, offset: u64, len: usize) -> Vec<u8> {
    let head = RequestHead {
        operation,
        id: 77,
        epoch: remote.epoch.0,
        key: remote.key,
        payload_bytes: len as u64,
        slices: 1,
        extra_bytes: 0,
    };
    head.encode([(offset, len as u64)], &[])
}

async fn answer(stream: &mut TcpStream) -> AnswerHead {
    let mut bytes = [0; ANSWER_HEAD_BYTES];
    stream.read_exact(&mut bytes).await.unwrap();
    AnswerHead::decode(&bytes).unwrap()
}

/// Whether the peer ended the connection, after whatever it sent before.
async fn is_cut(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    timeout(Duration::from_secs(20), stream.read_to_end(&mut rest))
        .await
        .is_ok()
}

/// A peer that the test plays, and a grant of it.
async fn fake_peer() -> (TcpListener, RemoteRegion) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("tcp://{}", listener.local_addr().unwrap());
    let remote = RemoteRegion {
        endpoint,
        epoch: Epoch(1),
        key: 5,
    };
    (listener, remote)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_never_changes_after_a_revocation_whatever_hammers_it() {
    const WRITERS: usize = 4;
    const ROUNDS: u64 = 24;
    let (far, near) = (bind(inline()).await, bind(inline()).await);
    let (far_region, far_memory) = register(&far, WRITERS * MIB);
    let nothing = far.grant_write(far_region, vec![]).unwrap();
    let grants = Arc::new(tokio::sync::watch::Sender::new(nothing));
    let stop = Arc::new(AtomicBool::new(false));
    let refusals = Arc::new([const { AtomicU64::new(0) }; WRITERS]);
    let hammer = |writer: usize| {
        let (near, grants, stop, refusals) = (near.clone(), grants.clone(), stop.clone(), refusals.clone());
        async move {
            let (region, memory) = register(&near, WRITERS * MIB);
            let offset = writer * MIB;
            for count in 0_u64.. {
                if stop.load(SeqCst) {
                    return;
                }
                // Each write brings other bytes than the one before, so that a late one is seen.
                copy_in(&*memory, offset, &vec![(count % 255) as u8 + 1; MIB]).unwrap();
                let grant = grants.borrow().clone();
                match near
                    .write(batch(region, &grant, offset as u64, MIB), soon())
                    .await
                {
                    Ok(_) => {}
                    Err(TransferError::UnknownKey { .. } | TransferError::OutOfRange { .. }) => {
                        refusals[writer].fetch_add(1, SeqCst);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    let writers: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(hammer(writer))).collect();
    for round in 0..ROUNDS {
        let grant = far
            .grant_write(far_region, vec![0..(WRITERS * MIB) as u64])
            .unwrap();
        grants.send_replace(grant.clone());
        // While payloads come in, at another moment each time.
        let target = far.stats().received_bytes + (1 + round % 3) * MIB as u64;
        eventually(|| far.stats().received_bytes >= target).await;
        far.revoke(&grant).await;
        let frozen = copy_out(&*far_memory, 0, WRITERS * MIB).unwrap();
        // Two refusals each: the request that was under way, and one that began afterwards.
        let before: Vec<_> = refusals.iter().map(|refused| refused.load(SeqCst)).collect();
        let all_refused = || (0..WRITERS).all(|writer| refusals[writer].load(SeqCst) >= before[writer] + 2);
        eventually(all_refused).await;
        let same = with_bytes(&*far_memory, 0, WRITERS * MIB, |now| now == frozen).unwrap();
        assert!(same, "memory changed after the revocation of round {round}");
    }
    stop.store(true, SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
}

#[tokio::test]
async fn the_rest_of_a_payload_is_dropped_when_its_grant_is_revoked() {
    let far = bind(inline()).await;
    let (region, memory) = register(&far, MIB);
    let grant = far.grant_write(region, vec![0..MIB as u64]).unwrap();
    let mut writer = connect(&far).await;
    writer
        .write_all(&request(Operation::Write, &grant, 0, MIB))
        .await
        .unwrap();
    writer.write_all(&vec![1; MIB / 2]).await.unwrap();
    eventually(|| copy_out(&*memory, MIB / 2 - 1, 1).unwrap() == [1]).await;
    far.revoke(&grant).await;
    writer.write_all(&vec![1; MIB / 2]).await.unwrap();
    let answered = answer(&mut writer).await;
    assert_eq!((answered.id, answered.status), (77, Status::UnknownKey));
    let untouched = with_bytes(&*memory, MIB / 2, MIB / 2, |bytes| {
        bytes.iter().all(|byte| *byte == 0)
    });
    assert_eq!(untouched, Ok(true));
    // The connection is still in step.
    let next = far.grant_write(region, vec![0..1]).unwrap();
    writer
        .write_all(&request(Operation::Write, &next, 0, 1))
        .await
        .unwrap();
    writer.write_all(&[9]).await.unwrap();
    assert_eq!(answer(&mut writer).await.status, Status::Done);
    assert_eq!(copy_out(&*memory, 0, 2).unwrap(), [9, 1]);
}

#[tokio::test]
async fn a_read_whose_right_is_revoked_is_cut() {
    const BYTES: usize = 32 * MIB;
    let far = bind(inline()).await;
    let (region, _memory) = register(&far, BYTES);
    let exposed = far.expose_read(region).unwrap();
    let mut reader = connect(&far).await;
    reader
        .write_all(&request(Operation::Read, &exposed, 0, BYTES))
        .await
        .unwrap();
    assert_eq!(answer(&mut reader).await.payload_bytes, BYTES as u64);
    far.revoke(&exposed).await;
    let mut rest = Vec::new();
    let reading = timeout(Duration::from_secs(20), reader.read_to_end(&mut rest));
    let _ = reading.await.expect("the connection stays open");
    assert!(rest.len() < BYTES, "all {} bytes came", rest.len());
    eventually(|| far.stats().serve_errors_of(ErrorCode::NotFound) == 1).await;
}

#[tokio::test]
async fn a_peer_that_dies_in_the_middle_is_a_lost_connection() {
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 32 * MIB);
    let (listener, remote) = fake_peer().await;
    let peer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_exact(&mut vec![0; MIB]).await.unwrap();
        drop(stream);
        drop(listener);
    };
    let (result, ()) = tokio::join!(near.write(batch(region, &remote, 0, 4 * MIB), soon()), peer);
    let error = result.unwrap_err();
    assert!(matches!(error, TransferError::ConnectionLost { .. }), "{error}");
    assert_eq!(near.stats().batch_errors_of(ErrorCode::Unavailable), 1);
    let gone = near
        .write(batch(region, &remote, 0, 1), soon())
        .await
        .unwrap_err();
    assert!(matches!(gone, TransferError::Unreachable { .. }), "{gone}");
}

#[tokio::test]
async fn a_peer_that_stalls_is_a_timeout_and_its_connection_is_cut() {
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 32 * MIB);
    let (listener, remote) = fake_peer().await;
    let begun = Instant::now();
    // The first stalls while the payload is sent, the second before the answer, the third in a read.
    for (operation, len) in [
        (Operation::Write, 32 * MIB),
        (Operation::Write, 1),
        (Operation::Read, 1),
    ] {
        let batch = batch(region, &remote, 0, len);
        let transfer = match operation {
            Operation::Write => near.write(batch, shortly()),
            _ => near.read(batch, shortly()),
        };
        let (result, accepted) = tokio::join!(transfer, listener.accept());
        assert_eq!(result.unwrap_err().code(), ErrorCode::Timeout);
        assert!(is_cut(&mut accepted.unwrap().0).await);
        // The connections that a batch of many parts opened besides.
        while timeout(Duration::from_millis(1), listener.accept()).await.is_ok() {}
    }
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(near.stats().batch_errors_of(ErrorCode::Timeout), 3);
    assert_eq!(near.stats().batches_in_flight, 0);
}

#[tokio::test]
async fn a_writer_that_dies_or_stalls_in_the_middle_is_an_error_of_the_server() {
    let config = Config {
        request_timeout: Duration::from_millis(50),
        ..inline()
    };
    let far = bind(config).await;
    let (region, memory) = register(&far, MIB);
    let grant = far.grant_write(region, vec![0..MIB as u64]).unwrap();
    let begin = async |bytes: usize| {
        let mut writer = connect(&far).await;
        let mut sent = request(Operation::Write, &grant, 0, MIB);
        sent.extend(vec![3; bytes]);
        writer.write_all(&sent).await.unwrap();
        writer
    };
    drop(begin(1000).await);
    eventually(|| far.stats().serve_errors_of(ErrorCode::Unavailable) == 1).await;
    assert!(is_cut(&mut begin(2000).await).await);
    eventually(|| far.stats().serve_errors_of(ErrorCode::Timeout) == 1).await;
    // A head that stays incomplete is no idle connection.
    let mut writer = connect(&far).await;
    writer.write_all(b"PGXF").await.unwrap();
    assert!(is_cut(&mut writer).await);
    eventually(|| far.stats().connections_served == 0).await;
    assert_eq!(far.stats().received_bytes, 0);
    assert_eq!(copy_out(&*memory, 2000, 1).unwrap(), [0]);
}

#[tokio::test]
async fn a_restarted_peer_fences_the_grants_of_its_former_life() {
    let near = bind(inline()).await;
    let (near_region, _near_memory) = register(&near, 64);
    let former = bind(inline()).await;
    let (region, former_memory) = register(&former, 64);
    let old = former.grant_write(region, vec![0..64]).unwrap();
    near.write(batch(near_region, &old, 0, 64), soon()).await.unwrap();
    former.close().await;
    let address = address_of(&former.endpoint()).to_owned();
    copy_in(&*former_memory, 0, &[7; 64]).unwrap();

    let latter = bind_at(&address, Epoch(2), inline()).await;
    let (region, memory) = register(&latter, 64);
    let new = latter.grant_write(region, vec![0..64]).unwrap();
    copy_in(&*memory, 0, &[8; 64]).unwrap();
    let fenced = TransferError::Fenced {
        endpoint: old.endpoint.clone(),
        epoch: Epoch(1),
        current: Epoch(2),
    };
    assert_eq!(
        near.write(batch(near_region, &old, 0, 64), soon()).await,
        Err(fenced)
    );
    assert_eq!(copy_out(&*memory, 0, 64).unwrap(), [8; 64]);
    assert_eq!(copy_out(&*former_memory, 0, 64).unwrap(), [7; 64]);
    near.write(batch(near_region, &new, 0, 64), soon()).await.unwrap();
    assert_eq!(copy_out(&*memory, 0, 64).unwrap(), [0; 64]);
}

#[tokio::test]
async fn connections_are_reused_and_bounded() {
    let (far, near) = (bind(inline()).await, bind(inline()).await);
    let (far_region, far_memory) = register(&far, 20 * MIB);
    let (region, memory) = register(&near, 20 * MIB);
    let pattern: Vec<u8> = (0..20 * MIB).map(|i| (i / 4096 + i) as u8).collect();
    copy_in(&*memory, 0, &pattern).unwrap();
    let grant = far.grant_write(far_region, vec![0..20 * MIB as u64]).unwrap();
    for _ in 0..50 {
        near.write(batch(region, &grant, 0, 64), soon()).await.unwrap();
    }
    assert_eq!(near.stats().connections_opened, 1);
    let done = near
        .write(batch(region, &grant, 0, 20 * MIB), soon())
        .await
        .unwrap();
    assert_eq!(done.requests, 5);
    let many = (0..64).map(|i| near.write(batch(region, &grant, i * 64, 64), soon()));
    assert!(futures::future::join_all(many).await.iter().all(Result::is_ok));
    assert_eq!(near.stats().connections_opened, 4);
    assert_eq!(far.stats().connections_accepted, 4);
    assert!(copy_out(&*far_memory, 0, 20 * MIB).unwrap() == pattern);
}

#[tokio::test]
async fn an_idle_connection_that_the_peer_closed_is_replaced() {
    let config = Config {
        idle_timeout: Duration::from_millis(5),
        ..inline()
    };
    let (far, near) = (bind(config).await, bind(inline()).await);
    let (far_region, _far_memory) = register(&far, 64);
    let (region, _memory) = register(&near, 64);
    let grant = far.grant_write(far_region, vec![0..64]).unwrap();
    for opened in 1..=5 {
        near.write(batch(region, &grant, 0, 64), soon()).await.unwrap();
        assert_eq!(near.stats().connections_opened, opened);
        eventually(|| far.stats().connections_served == 0).await;
    }
    assert_eq!(far.stats().serve_errors, [0; 11]);
}

#[tokio::test]
async fn a_request_is_repeated_once_when_a_used_connection_breaks_under_it() {
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 64);
    let (listener, remote) = fake_peer().await;
    let serve_one = async |stream: &mut TcpStream| {
        let mut request = [0; 48 + 16 + 64];
        stream.read_exact(&mut request).await.unwrap();
        let id = u64::from_le_bytes(request[8..16].try_into().unwrap());
        let (status, payload_bytes) = (Status::Done, 0);
        let answer = AnswerHead {
            status,
            id,
            payload_bytes,
            message_bytes: 0,
        };
        stream.write_all(&answer.encode()).await.unwrap();
    };
    let peer = async {
        let (mut first, _) = listener.accept().await.unwrap();
        serve_one(&mut first).await;
        first.read_exact(&mut [0; 100]).await.unwrap();
        drop(first);
        let (mut second, _) = listener.accept().await.unwrap();
        serve_one(&mut second).await;
    };
    let writes = async {
        for _ in 0..2 {
            near.write(batch(region, &remote, 0, 64), soon()).await.unwrap();
        }
    };
    tokio::join!(peer, writes);
    assert_eq!(near.stats().connections_opened, 2);
}

#[tokio::test]
async fn tearing_down_cuts_what_is_in_flight_and_lets_the_next_connect() {
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 64);
    let (listener, remote) = fake_peer().await;
    for opened in 1..=2 {
        let stalled = near.write(batch(region, &remote, 0, 64), soon());
        let cut = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            near.tear_down(&remote.endpoint);
            assert!(is_cut(&mut stream).await);
        };
        let (result, ()) = tokio::join!(stalled, cut);
        assert!(matches!(result, Err(TransferError::ConnectionLost { .. })));
        assert_eq!(near.stats().connections_opened, opened);
    }
    near.tear_down("tcp://127.0.0.1:1");
}

#[tokio::test]
async fn closing_ends_everything_on_both_sides() {
    let near = bind(inline()).await;
    let (region, memory) = register(&near, 64);
    let own = near.grant_write(region, vec![0..64]).unwrap();
    let mut writer = connect(&near).await;
    writer
        .write_all(&request(Operation::Write, &own, 0, 64))
        .await
        .unwrap();
    writer.write_all(&[1; 32]).await.unwrap();
    eventually(|| copy_out(&*memory, 31, 1).unwrap() == [1]).await;
    let (listener, remote) = fake_peer().await;
    let stalled = near.write(batch(region, &remote, 0, 64), soon());
    let closing = async {
        let _accepted = listener.accept().await.unwrap();
        near.close().await;
    };
    let (result, ()) = tokio::join!(stalled, closing);
    assert_eq!(result, Err(TransferError::Closed));
    assert!(is_cut(&mut writer).await);
    assert_eq!(near.register(memory.clone()), Err(TransferError::Closed));
    let late = near.write(batch(region, &remote, 0, 64), soon()).await;
    assert_eq!(late, Err(TransferError::Closed));
    assert!(TcpStream::connect(address_of(&near.endpoint())).await.is_err());
}

#[tokio::test]
async fn dropping_the_transport_revokes_its_grants() {
    let (far, near) = (bind(inline()).await, bind(inline()).await);
    let (far_region, far_memory) = register(&far, 64);
    let (region, _memory) = register(&near, 64);
    let grant = far.grant_write(far_region, vec![0..64]).unwrap();
    near.write(batch(region, &grant, 0, 64), soon()).await.unwrap();
    drop(far);
    copy_in(&*far_memory, 0, &[5; 64]).unwrap();
    let error = near
        .write(batch(region, &grant, 0, 64), soon())
        .await
        .unwrap_err();
    // Its connection may be answered once more before it is cut.
    let refused = [ErrorCode::Unavailable, ErrorCode::NotFound];
    assert!(refused.contains(&error.code()), "{error}");
    assert_eq!(copy_out(&*far_memory, 0, 64).unwrap(), [5; 64]);
}

#[tokio::test]
async fn a_write_that_is_dropped_half_way_is_cut() {
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 32 * MIB);
    let (listener, remote) = fake_peer().await;
    let mut write = near.write(batch(region, &remote, 0, 4 * MIB), soon());
    let mut accepted = tokio::select! {
        _ = &mut write => panic!("nobody answered"),
        accepted = listener.accept() => accepted.unwrap().0,
    };
    let begun = async {
        let mut byte = [0];
        accepted.read_exact(&mut byte).await.unwrap();
    };
    tokio::select! {
        _ = &mut write => panic!("nobody answered"),
        () = begun => {}
    }
    drop(write);
    assert!(is_cut(&mut accepted).await);
    assert_eq!(near.stats().batches_in_flight, 0);
}

#[tokio::test]
async fn answers_that_are_not_the_protocol_are_typed_errors() {
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 64);
    let head = |status, id, payload_bytes| {
        AnswerHead {
            status,
            id,
            payload_bytes,
            message_bytes: 0,
        }
        .encode()
    };
    let answers = [
        *b"HTTP/1.1 400 Bad Request\r\n\r\nnope",
        head(Status::Done, 999, 0),
        head(Status::Done, 1, 1 << 60),
        head(Status::OutOfRange { slice: 9 }, 1, 0),
    ];
    for bytes in answers {
        let (listener, remote) = fake_peer().await;
        let peer = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            stream
        };
        let (result, _stream) = tokio::join!(near.write(batch(region, &remote, 0, 64), soon()), peer);
        let error = result.unwrap_err();
        assert!(matches!(error, TransferError::Protocol { .. }), "{error}");
    }
}

#[tokio::test]
async fn hostile_bytes_close_the_connection_and_nothing_else() {
    const BLOBS: u64 = 200;
    let far = bind(inline()).await;
    let (region, memory) = register(&far, 64);
    let grant = far.grant_write(region, vec![0..64]).unwrap();
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    for blob in 0..BLOBS {
        let mut bytes = [0; 300];
        random.fill_bytes(&mut bytes);
        if blob % 2 == 1 {
            // A valid beginning, and then a length beyond all bounds or a table that does not add up.
            bytes[..64].copy_from_slice(&request(Operation::Write, &grant, 0, 64));
            match blob % 4 {
                1 => bytes[32..40].copy_from_slice(&(1_u64 << 60).to_le_bytes()),
                _ => bytes[56..64].copy_from_slice(&(1_u64 << 60).to_le_bytes()),
            }
        }
        let mut stream = connect(&far).await;
        let _ = stream.write_all(&bytes).await;
        assert!(is_cut(&mut stream).await);
    }
    eventually(|| far.stats().protocol_violations == BLOBS).await;
    assert_eq!(copy_out(&*memory, 0, 64).unwrap(), [0; 64]);
    let near = bind(inline()).await;
    let (region, memory) = register(&near, 64);
    copy_in(&*memory, 0, &[6; 64]).unwrap();
    near.write(batch(region, &grant, 0, 64), soon()).await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_bound_are_closed_at_once() {
    let config = Config {
        served_connections_max: 2.try_into().unwrap(),
        ..inline()
    };
    let far = bind(config).await;
    let held = [connect(&far).await, connect(&far).await];
    eventually(|| far.stats().connections_served == 2).await;
    assert!(is_cut(&mut connect(&far).await).await);
    assert_eq!(far.stats().connections_rejected, 1);
    drop(held);
    eventually(|| far.stats().connections_served == 0).await;
    let (far_region, _far_memory) = register(&far, 64);
    let near = bind(inline()).await;
    let (region, _memory) = register(&near, 64);
    let grant = far.grant_write(far_region, vec![0..64]).unwrap();
    near.write(batch(region, &grant, 0, 64), soon()).await.unwrap();
}

#[tokio::test]
async fn peers_without_transfers_give_way_when_the_table_is_full() {
    let config = Config {
        peers_max: 1.try_into().unwrap(),
        ..inline()
    };
    let near = bind(config).await;
    let (region, _memory) = register(&near, 64);
    let fars = [bind(inline()).await, bind(inline()).await];
    for far in &fars {
        let (far_region, _far_memory) = register(far, 64);
        let grant = far.grant_write(far_region, vec![0..64]).unwrap();
        near.write(batch(region, &grant, 0, 64), soon()).await.unwrap();
    }
    let (_listener, remote) = fake_peer().await;
    let in_flight = near.write(batch(region, &remote, 0, 64), soon());
    let (_other, crowded_out) = fake_peer().await;
    let error = near
        .write(batch(region, &crowded_out, 0, 64), soon())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::Overloaded);
    drop(in_flight);
}

#[tokio::test]
async fn an_address_in_use_is_a_typed_error_and_the_host_can_be_announced() {
    let config = Config {
        advertise_host: Some("node-3.example".into()),
        ..inline()
    };
    let first = bind(config).await;
    let endpoint = first.endpoint();
    let port = endpoint.strip_prefix("tcp://node-3.example:").unwrap();
    let again = TcpTransport::bind(
        format!("127.0.0.1:{port}").parse().unwrap(),
        Epoch(1),
        Config::default(),
    )
    .await;
    let error = again.err().unwrap();
    assert!(matches!(error, TransferError::Bind { .. }), "{error}");
}
