//! The tester's side of a test: one measurement after the other, as the caller takes them.
//!
//! Invariant: a measurement that is reported is of bytes that were verified: those that were read by this side after each
//! transfer, those that were written by the peer after the fence.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::transfer_client::TransferClient;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};
use transfer::{Keep, RemoteRegion, Slice, TransferBatch};
use types::{Epoch, Error, ErrorCode};

use super::area::Area;
use crate::probe::{self, Direction, Figures, Step};
use crate::store::Store;

/// The peer only borrows, fills or hashes 16 MiB; the rest is for a machine whose cores are all busy.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);
/// 16 MiB in 10 s is slower than any network worth a transfer.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);
/// How much longer than its measurement a probe lives: for its last transfer, and clocks that do not run alike.
const LEASE_MARGIN: Duration = Duration::from_secs(20);
/// Transfers of one measurement, and so the samples that are kept.
const TRANSFERS_MAX: usize = 10_000;
/// Fewer are no measurement, however long they take.
const TRANSFERS_MIN: usize = 3;

/// What is to be measured, between this node and whom.
pub(super) struct Test {
    pub(super) store: Store,
    pub(super) channel: Channel,
    pub(super) steps: Vec<Step>,
    /// For all steps together.
    pub(super) duration: Duration,
}

/// A test in progress.
pub(super) struct Measuring {
    test: Test,
    next: usize,
    ended: bool,
    seeds: RandomState,
    shutdown: CancellationToken,
    /// Others wait, or are turned away, while it is held.
    _permit: OwnedSemaphorePermit,
}

impl Measuring {
    pub(super) fn new(test: Test, permit: OwnedSemaphorePermit, shutdown: CancellationToken) -> Self {
        Self {
            test,
            next: 0,
            ended: false,
            seeds: RandomState::new(),
            shutdown,
            _permit: permit,
        }
    }

    /// Seeds of this measurement: of what the peer holds at first, and of what it gets.
    fn seeds(&self) -> (u64, u64) {
        let seed = |which: &str| self.seeds.hash_one((self.next, which));
        (seed("theirs"), seed("ours"))
    }
}

/// The next measurement. For [`futures::stream::unfold`], so that one is made when it is asked for, and a caller that
/// goes away ends it.
pub(super) async fn next(
    mut measuring: Measuring,
) -> Option<(Result<v1::TestTransferResponse, Status>, Measuring)> {
    let step = *measuring.test.steps.get(measuring.next)?;
    if measuring.ended {
        return None;
    }
    let measured = tokio::select! {
        // A node that ends says so rather than measuring once more.
        biased;
        () = measuring.shutdown.cancelled() => Err(Error::unavailable("the node ends")),
        measured = measure(&measuring.test, step, measuring.seeds()) => measured,
    };
    let response = match measured {
        Ok(None) => return None,
        Ok(Some((figures, mover))) => Ok(to_wire(&measuring, step, figures, mover)),
        Err(error) => {
            measuring.ended = true;
            Err(proto::status::to_status(&error))
        }
    };
    measuring.next += 1;
    Some((response, measuring))
}

fn to_wire(measuring: &Measuring, step: Step, figures: Figures, mover: &str) -> v1::TestTransferResponse {
    let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let direction = match step.direction {
        Direction::Write => v1::TransferDirection::Write,
        Direction::Read => v1::TransferDirection::Read,
    };
    v1::TestTransferResponse {
        step: count(measuring.next + 1),
        steps: count(measuring.test.steps.len()),
        direction: direction.into(),
        bytes: step.bytes,
        mover: mover.to_owned(),
        transfers: figures.transfers,
        bytes_per_second: figures.bytes_per_second,
        latency_p50_us: figures.p50.as_secs_f64() * 1e6,
        latency_p99_us: figures.p99.as_secs_f64() * 1e6,
    }
}

/// Measures one step. `None` where one of the pools lends too little for it.
async fn measure(
    test: &Test,
    step: Step,
    (theirs, ours): (u64, u64),
) -> Result<Option<(Figures, &'static str)>, Error> {
    let area = Arc::new(Area::borrow(&test.store, step.bytes)?);
    if area.bytes() < step.bytes {
        return Ok(None);
    }
    let budget = test.duration / u32::try_from(test.steps.len().max(1)).unwrap_or(u32::MAX);
    let mut peer = TransferClient::new(test.channel.clone());
    let request = v1::OpenProbeRequest {
        bytes: step.bytes,
        seed: theirs,
        lease_ttl_ms: u64::try_from((budget + LEASE_MARGIN).as_millis()).unwrap_or(u64::MAX),
    };
    let probe = call("OpenProbe", |deadline| {
        let mut request = tonic::Request::new(request);
        request.set_timeout(deadline);
        peer.open_probe(request)
    })
    .await?;
    let fits = probe.bytes == step.bytes;
    let moved = match fits {
        true => exchange(test, step, &area, &probe, ours, budget).await.map(Some),
        false => Ok(None),
    };
    // Also after a failure: the peer has its blocks back at once, and not when the lease ends.
    let closed = call("CloseProbe", |deadline| {
        let mut request = tonic::Request::new(v1::CloseProbeRequest {
            probe_id: probe.probe_id,
        });
        request.set_timeout(deadline);
        peer.close_probe(request)
    })
    .await;
    let Some(moved) = moved? else {
        return Ok(None);
    };
    let closed = closed?;
    if let Some(written) = moved.written
        && written != closed.checksum
    {
        return Err(corrupt("written", step.bytes, written, closed.checksum));
    }
    let figures = probe::figures(step.bytes, moved.took);
    let figures = figures.ok_or_else(|| Error::internal("a measurement has no transfer"))?;
    Ok(Some((figures, moved.mover)))
}

/// What the transfers of one measurement were.
struct Moved {
    took: Vec<Duration>,
    mover: &'static str,
    /// Checksum of what the peer must hold now, where it was written.
    written: Option<u64>,
}

/// Moves the run again and again until the time is over.
async fn exchange(
    test: &Test,
    step: Step,
    area: &Arc<Area>,
    probe: &v1::OpenProbeResponse,
    seed: u64,
    budget: Duration,
) -> Result<Moved, Error> {
    let offsets = area.offsets();
    let remote = probe::Blocks {
        offsets: &probe.block_offsets,
        block_bytes: probe.block_bytes,
    };
    let slices = probe::slices(step.bytes, area.blocks(&offsets), remote);
    let slices =
        slices.ok_or_else(|| Error::internal("the peer lends blocks that cannot hold what it says"))?;
    let written = area.fill(seed).await?;
    let mut moved = Moved {
        took: Vec::new(),
        mover: "",
        written: (step.direction == Direction::Write).then_some(written),
    };
    // The first one connects, and finds what pages are not there yet.
    transfer(test, step, area, probe, &slices).await?;
    let end = Instant::now() + budget;
    while moved.took.len() < TRANSFERS_MIN || (Instant::now() < end && moved.took.len() < TRANSFERS_MAX) {
        let stats = transfer(test, step, area, probe, &slices).await?;
        moved.took.push(stats.elapsed);
        moved.mover = stats.mover;
    }
    Ok(moved)
}

/// One transfer. What was read is verified.
async fn transfer(
    test: &Test,
    step: Step,
    area: &Arc<Area>,
    probe: &v1::OpenProbeResponse,
    slices: &[Slice],
) -> Result<transfer::TransferStats, Error> {
    let transport = test.store.transport();
    let batch = |remote: &Option<v1::RemoteRegion>| {
        Ok::<_, Error>(TransferBatch {
            region: test.store.region(),
            remote: region(remote)?,
            slices: slices.to_vec(),
            // Where the caller goes away in the middle, the blocks stay borrowed for as long as bytes move.
            keep: Keep::new(area.clone()),
        })
    };
    let deadline = Instant::now() + TRANSFER_TIMEOUT;
    match step.direction {
        Direction::Write => Ok(transport.write(batch(&probe.writable)?, deadline).await?),
        Direction::Read => {
            // A read that does nothing must not find what the one before it brought.
            area.spoil();
            let stats = transport.read(batch(&probe.readable)?, deadline).await?;
            let found = area.checksum().await?;
            if found != probe.checksum {
                return Err(corrupt("read", step.bytes, probe.checksum, found));
            }
            Ok(stats)
        }
    }
}

fn region(wire: &Option<v1::RemoteRegion>) -> Result<RemoteRegion, Error> {
    let wire = wire.as_ref();
    let wire = wire.ok_or_else(|| Error::internal("the peer opened a probe without its region"))?;
    Ok(RemoteRegion {
        endpoint: wire.endpoint.clone(),
        epoch: Epoch(wire.epoch),
        key: wire.key,
    })
}

fn corrupt(how: &str, bytes: u64, expected: u64, found: u64) -> Error {
    Error::new(
        ErrorCode::Corrupt,
        format!("{bytes} bytes that were {how} have checksum {found:016x}, but {expected:016x} was sent"),
    )
}

/// Asks the peer, within [`PEER_TIMEOUT`].
async fn call<T, F: Future<Output = Result<Response<T>, Status>>>(
    method: &str,
    ask: impl FnOnce(Duration) -> F,
) -> Result<T, Error> {
    match timeout(PEER_TIMEOUT, ask(PEER_TIMEOUT)).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => {
            let error = proto::status::from_status(&status);
            Err(Error {
                message: format!("the peer's {method}: {}", error.message),
                ..error
            })
        }
        Err(_) => Err(Error::new(
            ErrorCode::Timeout,
            format!("the peer's {method}: no answer within {PEER_TIMEOUT:?}"),
        )),
    }
}
