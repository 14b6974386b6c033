//! The process that transfers, and measures.
//!
//! A case keeps `in_flight` lanes busy. Each lane has its own places in both memories and does one batch after the
//! other, at one place after the other. With `verify`, the receiving side compares the checksum of every landed slice: those that
//! the transport made while it moved them, which for a write the end of its grant gives; where it made none, landed slices are
//! hashed while the lane goes on at its next place. A place is used again only after its bytes were found right.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use transfer::{Keep, RegionId, RemoteRegion, Slice, TcpTransport, TransferBatch, Transport};
use types::{Checksum, Epoch, Memory};

use crate::serve::{self, Landed, Landing, Ready, STREAM_CALL_BYTES};
use crate::{Result, TransportArguments, usage};

/// A batch that takes longer is a failure, not a figure.
const BATCH_TIMEOUT: Duration = Duration::from_secs(20);

/// What is measured.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Case {
    op: Operation,
    /// For a stream: bytes per system call. It walks over as much memory as transfers of the same shape would.
    #[serde(default = "Case::default_slice_bytes")]
    slice_bytes: u64,
    /// Per batch.
    #[serde(default = "Case::one")]
    slices: u64,
    /// Batches at the same time, or streams.
    #[serde(default = "Case::one")]
    in_flight: u64,
    /// Places that a lane goes through, one after the other. With few of them, bytes are in the processor's caches.
    #[serde(default = "Case::one")]
    places: u64,
    /// All slices of a batch at the same place, as ucx_perftest repeats one buffer.
    #[serde(default)]
    one_place: bool,
    /// Whether the receiving side hashes what landed.
    #[serde(default)]
    verify: bool,
    #[serde(default = "Case::default_seconds")]
    seconds: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Operation {
    Write,
    Read,
    /// No transport: bytes written to a TCP stream that the other process reads and forgets.
    Stream,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Outcome {
    bytes: u64,
    batches: u64,
    seconds: f64,
    gigabytes_per_second: f64,
    /// Of both processes.
    processor_seconds_per_gigabyte: f64,
    p50_us: f64,
    p99_us: f64,
    mover: &'static str,
}

impl Case {
    fn default_slice_bytes() -> u64 {
        STREAM_CALL_BYTES as u64
    }

    fn one() -> u64 {
        1
    }

    fn default_seconds() -> f64 {
        0.5
    }

    fn batch_bytes(&self) -> u64 {
        self.slice_bytes * self.slices
    }

    /// The slices of a place, in reverse order at the far end, so that no two of them can be made one.
    fn slices(&self, lane: u64, place: u64) -> Vec<Slice> {
        let start = (lane * self.places + place) * self.batch_bytes();
        if self.one_place {
            let same = Slice {
                local_offset: start,
                remote_offset: start,
                len: self.slice_bytes,
            };
            return vec![same; self.slices as usize];
        }
        let slice = |index: u64| Slice {
            local_offset: start + index * self.slice_bytes,
            remote_offset: start + (self.slices - 1 - index) * self.slice_bytes,
            len: self.slice_bytes,
        };
        (0..self.slices).map(slice).collect()
    }
}

/// Both ends, as all lanes see them.
struct Ends {
    transport: Arc<TcpTransport>,
    pool: Arc<dyn Memory>,
    region: RegionId,
    ready: Ready,
}

pub(crate) async fn run(peer: &str, arguments: &TransportArguments) -> Result<()> {
    let ready: Ready = serde_json::from_str(peer)?;
    let (transport, pool) = serve::open(arguments, 1).await?;
    let region = transport.register(pool.clone())?;
    let ends = Arc::new(Ends {
        transport,
        pool,
        region,
        ready,
    });
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let case: Case = serde_json::from_str(&line)?;
        let outcome = measure(&ends, case).await?;
        println!("{}", serde_json::to_string(&outcome)?);
    }
    ends.transport.close().await;
    Ok(())
}

async fn measure(ends: &Arc<Ends>, case: Case) -> Result<Outcome> {
    let needed = case.batch_bytes() * case.places * case.in_flight;
    let pool_bytes = ends.ready.pool_bytes.min(ends.pool.len() as u64);
    if needed > pool_bytes {
        return Err(format!("the case needs {needed} bytes of pools that have {pool_bytes}").into());
    }
    let streams: Vec<Stream> = match case.op {
        Operation::Stream => (0..case.in_flight)
            .map(|_| Stream::open(ends.ready.control, case.batch_bytes() * case.places))
            .collect::<Result<_>>()?,
        Operation::Write | Operation::Read => Vec::new(),
    };
    // What is expected is found out before the time begins.
    let mut verifiers = Vec::new();
    for lane in (0..case.in_flight).filter(|_| streams.is_empty()) {
        verifiers.push(match case.verify {
            true => Some(Verifier::connect(ends, &case, lane).await?),
            false => None,
        });
    }
    let near = usage::processor_time();
    let far = far_processor_time(ends.ready.control).await?;
    let begun = Instant::now();
    let until = begun + Duration::from_secs_f64(case.seconds);
    // Tasks of their own: the main task of a runtime is woken by another thread for every event.
    let lanes = (0..).zip(verifiers).map(|(lane, verifier)| {
        let (ends, case) = (ends.clone(), case.clone());
        tokio::spawn(async move { run_lane(&ends, &case, lane, verifier, until).await })
    });
    let lanes: Vec<_> = lanes.collect();
    let streams = streams.into_iter().map(|mut stream| {
        let call_bytes = case.slice_bytes;
        tokio::task::spawn_blocking(move || stream.run(call_bytes, until).map(|lane| (lane, stream)))
    });
    let streamed = try_join_all(streams)
        .await?
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut lanes: Vec<Lane> = try_join_all(lanes).await?.into_iter().collect::<Result<_>>()?;
    let seconds = begun.elapsed().as_secs_f64();
    let processor = usage::processor_time() - near + (far_processor_time(ends.ready.control).await? - far);
    // The streams' memory goes only now, when the processor time was taken.
    lanes.extend(streamed.into_iter().map(|(lane, _memory)| lane));
    let mover = lanes.iter().map(|lane| lane.mover).next().unwrap_or_default();
    let mut latencies: Vec<Duration> = lanes.into_iter().flat_map(|lane| lane.latencies).collect();
    latencies.sort_unstable();
    let rank = |share: f64| match latencies.len() {
        0 => 0.0,
        len => latencies[((len - 1) as f64 * share).round() as usize].as_secs_f64() * 1e6,
    };
    let bytes = latencies.len() as u64
        * match case.op {
            Operation::Stream => case.slice_bytes,
            Operation::Write | Operation::Read => case.batch_bytes(),
        };
    let gigabytes = bytes as f64 / 1e9;
    Ok(Outcome {
        bytes,
        batches: latencies.len() as u64,
        seconds,
        gigabytes_per_second: gigabytes / seconds,
        processor_seconds_per_gigabyte: processor.as_secs_f64() / gigabytes,
        p50_us: rank(0.5),
        p99_us: rank(0.99),
        mover,
    })
}

/// What a lane did.
#[derive(Default)]
struct Lane {
    latencies: Vec<Duration>,
    mover: &'static str,
}

async fn run_lane(
    ends: &Arc<Ends>,
    case: &Case,
    lane: u64,
    mut verifier: Option<Verifier>,
    until: Instant,
) -> Result<Lane> {
    let mut done = Lane::default();
    for place in (0..case.places).cycle() {
        let begun = Instant::now();
        if begun >= until {
            break;
        }
        let slices = case.slices(lane, place);
        let key = match (case.op, &verifier) {
            (Operation::Write, Some(verifier)) => verifier.expected[place as usize].key,
            (Operation::Write, None) => ends.ready.write_key,
            (Operation::Read | Operation::Stream, _) => ends.ready.read_key,
        };
        let batch = TransferBatch {
            region: ends.region,
            remote: RemoteRegion {
                endpoint: ends.ready.endpoint.clone(),
                epoch: Epoch(ends.ready.epoch),
                key,
            },
            slices,
            keep: Keep::default(),
        };
        let deadline = (begun + BATCH_TIMEOUT).into();
        let unit_bytes = NonZeroU64::new(case.slice_bytes).filter(|_| case.verify);
        let (transferred, seen) = match (case.op, unit_bytes) {
            (Operation::Write, _) => (ends.transport.write(batch, deadline).await?, Vec::new()),
            (_, None) => (ends.transport.read(batch, deadline).await?, Vec::new()),
            (_, Some(unit_bytes)) => ends.transport.read_hashed(batch, unit_bytes, deadline).await?,
        };
        done.latencies.push(begun.elapsed());
        done.mover = transferred.mover;
        if let Some(verifier) = &mut verifier {
            verifier.landed(ends, case, place, &seen).await?;
        }
    }
    if let Some(verifier) = verifier {
        verifier.finish().await?;
    }
    Ok(done)
}

/// Where the slices of a place land, given by offset and length, and the hash that each must have.
struct Expected {
    ranges: Vec<(u64, u64)>,
    hashes: Vec<u64>,
    /// For writes: the right to do them.
    key: u64,
}

/// Has landed slices hashed where they landed.
struct Verifier {
    /// By place.
    expected: Vec<Expected>,
    far: Far,
    /// Places that are being hashed here, the oldest first.
    here: VecDeque<(u64, JoinHandle<Result<Vec<u64>>>)>,
    /// Places that are being hashed by the peer, the oldest first.
    there: VecDeque<u64>,
}

impl Verifier {
    async fn connect(ends: &Ends, case: &Case, lane: u64) -> Result<Self> {
        let request = match case.op {
            Operation::Write => "land",
            Operation::Read | Operation::Stream => "hash",
        };
        let mut far = Far::connect(ends.ready.control, request).await?;
        let mut expected = Vec::new();
        for place in 0..case.places {
            let slices = case.slices(lane, place);
            let local: Vec<_> = slices
                .iter()
                .map(|slice| (slice.local_offset, slice.len))
                .collect();
            let remote: Vec<_> = slices
                .iter()
                .map(|slice| (slice.remote_offset, slice.len))
                .collect();
            expected.push(match case.op {
                Operation::Write => {
                    let hashes = serve::hashes(&*ends.pool, &local)?;
                    let ranges = remote;
                    far.land(None, &ranges).await?;
                    let Landed { key, .. } = serde_json::from_str(&far.answer().await?)?;
                    Expected { ranges, hashes, key }
                }
                Operation::Read | Operation::Stream => {
                    far.ask(&serde_json::to_string(&remote)?).await?;
                    let hashes = serde_json::from_str(&far.answer().await?)?;
                    let ranges = local;
                    let key = ends.ready.read_key;
                    Expected { ranges, hashes, key }
                }
            });
        }
        let (here, there) = (VecDeque::new(), VecDeque::new());
        Ok(Self {
            expected,
            far,
            here,
            there,
        })
    }

    /// Begins to verify a place, and waits until so many are verified that the next place is free. `seen` are the checksums
    /// of its slices, if the transport made them.
    async fn landed(&mut self, ends: &Arc<Ends>, case: &Case, place: u64, seen: &[Checksum]) -> Result<()> {
        let Expected { ranges, hashes, key } = &self.expected[place as usize];
        if !seen.is_empty() {
            return match seen.iter().map(|checksum| checksum.0).eq(hashes.iter().copied()) {
                true => Ok(()),
                false => Err(format!("place {place} holds other bytes than were sent").into()),
            };
        }
        match case.op {
            Operation::Write => {
                self.far.land(Some(*key), ranges).await?;
                self.there.push_back(place);
            }
            Operation::Read | Operation::Stream => {
                let (pool, ranges) = (ends.pool.clone(), ranges.clone());
                let hashing = tokio::task::spawn_blocking(move || serve::hashes(&*pool, &ranges));
                self.here.push_back((place, hashing));
            }
        }
        while (self.here.len() + self.there.len()) as u64 >= case.places {
            self.check_oldest().await?;
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<()> {
        while !self.here.is_empty() || !self.there.is_empty() {
            self.check_oldest().await?;
        }
        Ok(())
    }

    async fn check_oldest(&mut self) -> Result<()> {
        let (place, found) = if let Some((place, hashing)) = self.here.pop_front() {
            (place, hashing.await??)
        } else if let Some(place) = self.there.pop_front() {
            let Landed { key, hashes } = serde_json::from_str(&self.far.answer().await?)?;
            self.expected[place as usize].key = key;
            (place, hashes)
        } else {
            return Ok(());
        };
        if found != self.expected[place as usize].hashes {
            return Err(format!("place {place} holds other bytes than were sent").into());
        }
        Ok(())
    }
}

/// A control connection to the serving process.
struct Far {
    stream: BufReader<TcpStream>,
}

impl Far {
    async fn connect(control: SocketAddr, request: &str) -> Result<Self> {
        let stream = TcpStream::connect(control).await?;
        stream.set_nodelay(true)?;
        let mut far = Self {
            stream: BufReader::new(stream),
        };
        far.ask(request).await?;
        Ok(far)
    }

    async fn ask(&mut self, line: &str) -> Result<()> {
        self.stream.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(())
    }

    /// Ends a right to write and asks for another one.
    async fn land(&mut self, key: Option<u64>, ranges: &[(u64, u64)]) -> Result<()> {
        let ranges = ranges.to_vec();
        self.ask(&serde_json::to_string(&Landing { key, ranges })?).await
    }

    async fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line).await? {
            0 => Err("the serving process hung up".into()),
            _ => Ok(line),
        }
    }
}

async fn far_processor_time(control: SocketAddr) -> Result<Duration> {
    let answer = Far::connect(control, "usage").await?.answer().await?;
    Ok(Duration::from_nanos(answer.trim_end().parse()?))
}

/// A blocking stream to the serving process, and memory to send from.
struct Stream {
    stream: std::net::TcpStream,
    memory: Vec<u8>,
}

impl Stream {
    /// Returns when both ends have their memory.
    fn open(control: SocketAddr, walked_bytes: u64) -> Result<Self> {
        let mut stream = std::net::TcpStream::connect(control)?;
        stream.set_nodelay(true)?;
        stream.write_all(format!("sink {walked_bytes}\n").as_bytes())?;
        stream.read_exact(&mut [0])?;
        let memory = vec![1; walked_bytes as usize];
        Ok(Self { stream, memory })
    }

    /// Writes until the time is over, and waits until the peer has read all of it.
    fn run(&mut self, call_bytes: u64, until: Instant) -> Result<Lane> {
        let mut latencies = Vec::new();
        for call in self.memory.chunks_exact(call_bytes as usize).cycle() {
            let begun = Instant::now();
            if begun >= until {
                break;
            }
            self.stream.write_all(call)?;
            latencies.push(begun.elapsed());
        }
        self.stream.shutdown(std::net::Shutdown::Write)?;
        self.stream.read_exact(&mut [0])?;
        Ok(Lane {
            latencies,
            mover: "stream",
        })
    }
}
