//! What every transport promises of calls.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use futures::FutureExt;
use futures::future::BoxFuture;
use transfer::calls::MESSAGE_BYTES_MAX;
use transfer::{Answered, Call, Calls, Payload, Place, Reply};

use super::*;

/// A node that keeps bytes: the message is a verb, and runs of its memory as pairs of decimal numbers.
struct Shelf {
    memory: Arc<dyn Memory>,
    landed: Arc<AtomicUsize>,
    /// Of the bytes that landed last, as far as they were seen.
    seen: Arc<Mutex<Vec<Checksum>>>,
}

/// Of how many bytes there are checksums.
const UNIT_BYTES: u64 = 1500;

/// The checksums of the whole units that `kind` has seen.
fn seen(kind: Kind, bytes: &[u8]) -> Vec<Checksum> {
    let units = bytes.chunks_exact(UNIT_BYTES as usize).map(Checksum::of);
    units.filter(|_| kind.shows_bytes()).collect()
}

impl Calls for Shelf {
    fn call(&self, message: &[u8], payload_bytes: u64) -> BoxFuture<'static, Reply> {
        let message = String::from_utf8(message.to_vec()).unwrap();
        let mut words = message.split(' ');
        let verb = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let place = Place {
            memory: self.memory.clone(),
            runs: numbers.chunks(2).map(|run| (run[0], run[1])).collect(),
            keep: Keep::default(),
            unit_bytes: NonZeroU64::new(UNIT_BYTES),
        };
        let reply = match verb {
            "echo" => Reply::Answer(format!("{message} with {payload_bytes}").into_bytes()),
            "put" => {
                let (landed, seen) = (self.landed.clone(), self.seen.clone());
                Reply::Take {
                    into: place,
                    landed: Box::new(move |checksums| {
                        landed.fetch_add(1, Relaxed);
                        *seen.lock().unwrap() = checksums;
                        std::future::ready(b"landed".to_vec()).boxed()
                    }),
                }
            }
            "get" => Reply::Give {
                message: b"given".to_vec(),
                from: place,
            },
            other => panic!("{other}"),
        };
        std::future::ready(reply).boxed()
    }
}

struct Calling {
    pair: Pair,
    shelf: Arc<Shelf>,
}

impl Calling {
    async fn new(kind: Kind) -> Self {
        let pair = Pair::new(kind).await;
        let shelf = Arc::new(Shelf {
            memory: pair.far_memory.clone(),
            landed: Arc::default(),
            seen: Arc::default(),
        });
        let calls: Arc<dyn Calls> = shelf.clone();
        pair.far.serve_calls(Arc::downgrade(&calls));
        Self { pair, shelf }
    }

    async fn call(&self, message: &str, payload: Payload) -> Result<Answered, TransferError> {
        let call = Call {
            endpoint: self.pair.far.endpoint(),
            epoch: Epoch(5),
            message: message.as_bytes().to_vec(),
            payload,
        };
        self.pair.near.call(call, soon()).await
    }

    fn send(&self, runs: &[(u64, u64)]) -> Payload {
        Payload::Send {
            region: self.pair.near_region,
            runs: runs.to_vec(),
        }
    }

    fn receive(&self, runs: &[(u64, u64)]) -> Payload {
        Payload::Receive {
            region: self.pair.near_region,
            runs: runs.to_vec(),
            keep: Keep::default(),
            unit_bytes: NonZeroU64::new(UNIT_BYTES),
        }
    }
}

#[rstest]
#[tokio::test]
async fn a_call_is_answered(#[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind) {
    if !has(kind) {
        return;
    }
    let calling = Calling::new(kind).await;
    let answered = calling.call("echo", Payload::None).await.unwrap();
    assert_eq!(
        (answered.message.as_slice(), answered.received_bytes),
        (b"echo with 0".as_slice(), 0)
    );
    let answered = calling.call("echo", calling.send(&[(0, 70_00)])).await.unwrap();
    assert_eq!(
        answered.message, b"echo with 7000",
        "what nobody takes is no harm"
    );
    let answered = calling.call("echo", calling.receive(&[(0, 7)])).await.unwrap();
    assert_eq!(answered.received_bytes, 0);
}

#[rstest]
#[tokio::test]
async fn what_comes_with_a_call_lands_where_the_called_node_says(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let calling = Calling::new(kind).await;
    let source = all(&*calling.pair.near_memory);
    let sent = calling.send(&[(100, 3000), (9000, 5000)]);
    let answered = calling.call("put 20000 1000 40000 7000", sent).await.unwrap();
    assert_eq!(answered.message, b"landed");
    let mut expected = vec![CANARY; BYTES];
    expected[20_000..21_000].copy_from_slice(&source[100..1100]);
    expected[40_000..42_000].copy_from_slice(&source[1100..3100]);
    expected[42_000..47_000].copy_from_slice(&source[9000..14_000]);
    assert!(all(&*calling.pair.far_memory) == expected);
    let sent = [&source[100..3100], &source[9000..14_000]].concat();
    assert_eq!(*calling.shelf.seen.lock().unwrap(), seen(kind, &sent));
    let answered = calling
        .call("put 0 10", calling.send(&[(0, 30_000)]))
        .await
        .unwrap();
    assert_eq!(answered.message, b"landed", "the rest is thrown away");
    expected[..10].copy_from_slice(&source[..10]);
    assert!(all(&*calling.pair.far_memory) == expected);
    assert_eq!(calling.shelf.landed.load(Relaxed), 2);
    let answered = calling.call("echo", Payload::None).await.unwrap();
    assert_eq!(
        answered.message, b"echo with 0",
        "the connection is where it should be"
    );
}

#[rstest]
#[tokio::test]
async fn what_comes_with_an_answer_fills_the_callers_runs_from_the_first_on(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let calling = Calling::new(kind).await;
    let there: Vec<u8> = (0..BYTES).map(|i| (i * 7 + i / 253) as u8).collect();
    copy_in(&*calling.pair.far_memory, 0, &there).unwrap();
    let mut expected = all(&*calling.pair.near_memory);
    let room = calling.receive(&[(50, 2000), (10_000, 20_000)]);
    let answered = calling.call("get 1000 500 3000 4000", room).await.unwrap();
    assert_eq!(
        (answered.message.as_slice(), answered.received_bytes),
        (b"given".as_slice(), 4500)
    );
    let given = [&there[1000..1500], &there[3000..7000]].concat();
    assert_eq!(answered.checksums, seen(kind, &given));
    expected[50..550].copy_from_slice(&there[1000..1500]);
    expected[550..2050].copy_from_slice(&there[3000..4500]);
    expected[10_000..12_500].copy_from_slice(&there[4500..7000]);
    assert!(all(&*calling.pair.near_memory) == expected);
    let error = calling.call("get 0 5000", calling.receive(&[(0, 4999)])).await;
    assert_eq!(
        error.unwrap_err().code(),
        ErrorCode::Internal,
        "no room for what was given"
    );
    assert!(all(&*calling.pair.near_memory) == expected);
}

#[rstest]
#[tokio::test]
async fn a_call_that_cannot_be_answered_says_why(
    #[values(Kind::Tcp, Kind::Mem, Kind::Ucx, Kind::UcxGets)] kind: Kind,
) {
    if !has(kind) {
        return;
    }
    let calling = Calling::new(kind).await;
    let code = async |call: Call| calling.pair.near.call(call, soon()).await.unwrap_err().code();
    let call = |endpoint: String, epoch: u64, message: usize| Call {
        endpoint,
        epoch: Epoch(epoch),
        message: vec![b'e'; message],
        payload: calling.send(&[(0, 3000)]),
    };
    let far = calling.pair.far.endpoint();
    assert_eq!(code(call(far.clone(), 4, 4)).await, ErrorCode::Fenced);
    let near = calling.pair.near.endpoint();
    assert_eq!(
        code(call(near, 5, 4)).await,
        ErrorCode::Unavailable,
        "it answers no calls"
    );
    let outside = calling.send(&[(BYTES as u64 - 1, 2)]);
    assert_eq!(
        calling.call("echo", outside).await.unwrap_err().code(),
        ErrorCode::Invalid
    );
    assert_eq!(
        code(call(far, 5, MESSAGE_BYTES_MAX + 1)).await,
        ErrorCode::Invalid
    );
    drop(calling.shelf);
    let call = Call {
        endpoint: calling.pair.far.endpoint(),
        epoch: Epoch(5),
        message: b"echo".to_vec(),
        payload: Payload::None,
    };
    let gone = calling.pair.near.call(call, soon()).await.unwrap_err();
    assert_eq!(
        gone.code(),
        ErrorCode::Unavailable,
        "who answered calls is gone: {gone}"
    );
}
