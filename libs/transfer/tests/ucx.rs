//! What UCX adds to the promises of every transport (`conformance.rs`): how a pair comes to it and falls back from it,
//! and that the fence holds against processes that are stopped or killed while they write.
#![allow(clippy::single_range_in_vec_init)] // A grant of one range is what is meant.
#![allow(clippy::unwrap_used)] // A test.

use std::io::{BufRead, BufReader};
use std::num::NonZeroU64;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;
use tokio::time::Instant;
use transfer::memory::{copy_in, copy_out, with_bytes};
use transfer::{
    Keep, RegionId, RemoteRegion, Slice, TcpTransport, TransferBatch, TransferError, TransferStats,
    Transport, tcp, ucx,
};
use types::{Checksum, Epoch, ErrorCode, Memory};

const BYTES: usize = 8 << 20;
/// Longer than anything here takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn is_missing() -> bool {
    let missing = ucx_sys::Library::load(None).err();
    if let Some(missing) = &missing {
        eprintln!("skipped: {missing}");
    }
    missing.is_some()
}

/// `TLS` of UCX that leaves it no shared memory, so that bytes go by its gets.
const GETS: &str = "tcp,self";

fn config(choice: ucx::Choice, lanes: Option<&str>) -> tcp::Config {
    tcp::Config {
        ucx: ucx::Config {
            choice,
            settings: lanes
                .map(|lanes| ("TLS".to_owned(), lanes.to_owned()))
                .into_iter()
                .collect(),
            ..ucx::Config::default()
        },
        ..tcp::Config::default()
    }
}

/// A transport with one region of zeroes.
struct Node {
    transport: Arc<TcpTransport>,
    memory: Arc<dyn Memory>,
    region: RegionId,
}

impl Node {
    async fn new(choice: ucx::Choice) -> Self {
        Self::at("127.0.0.1:0", Epoch(1), config(choice, None)).await
    }

    async fn at(address: &str, epoch: Epoch, config: tcp::Config) -> Self {
        let address = address.parse().unwrap();
        let transport = TcpTransport::bind(address, epoch, config).await.unwrap();
        let memory = transport.allocate(BYTES).unwrap();
        let region = transport.register(memory.clone()).unwrap();
        Self {
            transport,
            memory,
            region,
        }
    }

    fn grant(&self) -> RemoteRegion {
        self.transport
            .grant_write(self.region, vec![0..BYTES as u64])
            .unwrap()
    }

    async fn write(&self, grant: &RemoteRegion, bytes: u64) -> Result<TransferStats, TransferError> {
        let batch = TransferBatch {
            region: self.region,
            remote: grant.clone(),
            slices: vec![Slice {
                local_offset: 0,
                remote_offset: 0,
                len: bytes,
            }],
            keep: Keep::default(),
        };
        self.transport.write(batch, Instant::now() + PATIENCE).await
    }

    /// Writes until the bytes go the expected way.
    async fn write_until(&self, grant: &RemoteRegion, mover: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.write(grant, 100).await.unwrap().mover != mover {
            assert!(
                Instant::now() < deadline,
                "never by {mover}: {:?}",
                self.transport.links()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn checksums_come_with_a_read_that_takes_several_requests() {
    if is_missing() {
        return;
    }
    let (near, far) = (
        Node::new(ucx::Choice::Ucx).await,
        Node::new(ucx::Choice::Ucx).await,
    );
    let bytes: Vec<u8> = (0..BYTES).map(|at| (at * 7 + at / 253) as u8).collect();
    copy_in(&*far.memory, 0, &bytes).unwrap();
    // Thrice the memory, into the same places, is more than one request may have; 3 MiB do not divide what it may have.
    let slice = |_| Slice {
        local_offset: 0,
        remote_offset: 0,
        len: 6 << 20,
    };
    let batch = TransferBatch {
        region: near.region,
        remote: far.transport.expose_read(far.region).unwrap(),
        slices: (0..3).map(slice).collect(),
        keep: Keep::default(),
    };
    let unit_bytes = NonZeroU64::new(3 << 20).unwrap();
    let read = near
        .transport
        .read_hashed(batch, unit_bytes, Instant::now() + PATIENCE);
    let (stats, checksums) = read.await.unwrap();
    assert!(stats.requests > 1, "{stats:?}");
    let units = bytes[..6 << 20].chunks_exact(3 << 20).map(Checksum::of);
    assert_eq!(checksums, units.cycle().take(6).collect::<Vec<_>>());
}

#[tokio::test]
async fn without_the_library_tcp_moves_all_bytes_and_says_why() {
    let missing = tcp::Config {
        ucx: ucx::Config {
            library: Some("/nowhere/libucp.so.0".into()),
            ..ucx::Config::default()
        },
        ..tcp::Config::default()
    };
    let near = TcpTransport::bind("127.0.0.1:0".parse().unwrap(), Epoch(1), missing.clone());
    let near = near.await.unwrap();
    let movers = near.movers();
    let ucx = movers.iter().find(|mover| mover.name == "ucx").unwrap();
    assert!(!ucx.usable);
    assert!(ucx.detail.contains("/nowhere/libucp.so.0"), "{}", ucx.detail);

    let far = Node::new(ucx::Choice::Tcp).await;
    let memory = near.allocate(4096).unwrap();
    let batch = TransferBatch {
        region: near.register(memory).unwrap(),
        remote: far.grant(),
        slices: vec![Slice {
            local_offset: 0,
            remote_offset: 0,
            len: 10,
        }],
        keep: Keep::default(),
    };
    let done = near.write(batch, Instant::now() + PATIENCE).await.unwrap();
    assert_eq!(done.mover, "tcp");
    assert!(near.links()[0].obstacle.contains("/nowhere/libucp.so.0"));

    let forced = tcp::Config {
        ucx: ucx::Config {
            choice: ucx::Choice::Ucx,
            ..missing.ucx
        },
        ..missing
    };
    let refused = TcpTransport::bind("127.0.0.1:0".parse().unwrap(), Epoch(1), forced).await;
    let error = refused.err().unwrap();
    assert!(matches!(error, TransferError::NoUcx { .. }), "{error}");
}

#[tokio::test]
async fn a_pair_on_one_host_comes_to_shared_memory_by_itself() {
    if is_missing() {
        return;
    }
    let (near, far) = (
        Node::new(ucx::Choice::Auto).await,
        Node::new(ucx::Choice::Auto).await,
    );
    copy_in(&*near.memory, 0, b"keys and values").unwrap();
    let grant = far.grant();
    near.write_until(&grant, "ucx").await;
    assert_eq!(copy_out(&*far.memory, 0, 15).unwrap(), b"keys and values");
    let links = near.transport.links();
    assert_eq!((links[0].mover.as_str(), links[0].obstacle.as_str()), ("ucx", ""));
    assert_eq!(links[0].lanes, ["shared memory"]);
    let (sent, received) = (near.transport.stats(), far.transport.stats());
    assert!(sent.ucx_written_bytes >= 100 && sent.ucx_written_bytes <= sent.written_bytes);
    assert_eq!(sent.ucx_written_bytes, received.ucx_received_bytes);
    far.transport.revoke(&grant).await;
    let error = near.write(&grant, 1).await.unwrap_err();
    assert!(matches!(error, TransferError::UnknownKey { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_without_ucx_is_reached_over_tcp() {
    if is_missing() {
        return;
    }
    let (near, far) = (
        Node::new(ucx::Choice::Auto).await,
        Node::new(ucx::Choice::Tcp).await,
    );
    let grant = far.grant();
    let deadline = Instant::now() + PATIENCE;
    while !near
        .transport
        .links()
        .iter()
        .any(|link| link.obstacle.contains("the peer has no UCX"))
    {
        assert_eq!(near.write(&grant, 1000).await.unwrap().mover, "tcp");
        assert!(Instant::now() < deadline, "{:?}", near.transport.links());
    }
    assert_eq!(far.transport.stats().ucx_received_bytes, 0);
}

#[tokio::test]
async fn a_restarted_peer_refuses_its_former_grants_and_is_found_again() {
    if is_missing() {
        return;
    }
    let near = Node::new(ucx::Choice::Auto).await;
    let former = Node::new(ucx::Choice::Auto).await;
    let stale = former.grant();
    near.write_until(&stale, "ucx").await;
    let address = former.transport.endpoint().replace("tcp://", "");
    former.transport.close().await;
    drop(former);

    let latter = Node::at(&address, Epoch(2), config(ucx::Choice::Auto, None)).await;
    let error = near.write(&stale, 100).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Fenced, "{error}");
    copy_in(&*near.memory, 0, b"after").unwrap();
    let grant = latter.grant();
    near.write_until(&grant, "ucx").await;
    assert_eq!(copy_out(&*latter.memory, 0, 5).unwrap(), b"after");
}

/// Runs `writer_process` in a process of its own, which writes to `grant` until it is refused.
struct Writer(Child);

impl Writer {
    /// Returns when its bytes go by UCX.
    fn start(grant: &RemoteRegion, lanes: Option<&str>) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--nocapture"])
            .env(
                "PERIGEE_TEST_GRANT",
                format!("{} {} {}", grant.endpoint, grant.epoch.0, grant.key),
            )
            .env("PERIGEE_TEST_LANES", lanes.unwrap_or_default())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let ready = output
            .lines()
            .any(|line| line.unwrap().contains("writing by ucx"));
        assert!(ready, "the writer ended early");
        Self(child)
    }

    fn signal(&self, signal: i32) {
        #[allow(unsafe_code)] // There is no safe way to send a signal in the standard library.
        // SAFETY: takes no pointers; the child is not reaped before this value is dropped.
        let sent = unsafe { libc::kill(self.0.id() as i32, signal) };
        assert_eq!(sent, 0);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        self.0.wait().unwrap();
    }
}

#[tokio::test]
async fn writer_process() {
    let Ok(grant) = std::env::var("PERIGEE_TEST_GRANT") else {
        return;
    };
    let words: Vec<&str> = grant.split(' ').collect();
    let grant = RemoteRegion {
        endpoint: words[0].to_owned(),
        epoch: Epoch(words[1].parse().unwrap()),
        key: words[2].parse().unwrap(),
    };
    let lanes = std::env::var("PERIGEE_TEST_LANES").unwrap();
    let lanes = (!lanes.is_empty()).then_some(lanes.as_str());
    let near = Node::at("127.0.0.1:0", Epoch(1), config(ucx::Choice::Ucx, lanes)).await;
    copy_in(&*near.memory, 0, &vec![0xee; BYTES]).unwrap();
    near.write_until(&grant, "ucx").await;
    println!("writing by ucx");
    while near.write(&grant, BYTES as u64).await.is_ok() {}
    // Whoever started it ends it.
    std::future::pending::<()>().await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_reused_at_once_whether_its_writer_goes_on_is_stopped_or_is_killed(
    #[values(None, Some(GETS))] lanes: Option<&str>,
) {
    if is_missing() {
        return;
    }
    let far = Node::at("127.0.0.1:0", Epoch(1), config(ucx::Choice::Ucx, lanes)).await;
    for round in 0..12_u64 {
        let grant = far.grant();
        let writer = Writer::start(&grant, lanes);
        // Different places within a write.
        tokio::time::sleep(Duration::from_micros(300 * round)).await;
        let signal = [None, Some(libc::SIGSTOP), Some(libc::SIGKILL)][round as usize % 3];
        if let Some(signal) = signal {
            writer.signal(signal);
        }
        let begun = Instant::now();
        far.transport.revoke(&grant).await;
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "the fence waits for nobody"
        );
        let pattern = vec![round as u8; BYTES];
        copy_in(&*far.memory, 0, &pattern).unwrap();
        if signal == Some(libc::SIGSTOP) {
            writer.signal(libc::SIGCONT);
        }
        // What the writer does afterwards must not show. There is no event for what does not happen.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let untouched = with_bytes(&*far.memory, 0, BYTES, |bytes| bytes == pattern).unwrap();
        assert!(untouched, "round {round}: foreign bytes after the fence");
    }
    let stats = far.transport.stats();
    assert!(stats.ucx_received_bytes > 0, "{stats:?}");
}
