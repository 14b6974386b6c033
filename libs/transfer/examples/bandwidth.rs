//! Prints how many gigabytes per second the TCP transport moves between two transports on this machine:
//! `cargo run --release -p transfer --example bandwidth`.
#![allow(clippy::single_range_in_vec_init)] // A grant of one range is what is meant.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::time::Instant;
use transfer::memory::copy_in;
use transfer::{HostMemory, Keep, Slice, TcpTransport, TransferBatch, Transport, tcp};
use types::Epoch;

/// Larger than the caches, so that memory takes part.
const REGION_BYTES: usize = 64 << 20;
/// How long each row is measured.
const ROW: Duration = Duration::from_secs(1);

/// What a row writes again and again.
struct Row {
    slice_bytes: u64,
    slices_per_batch: u64,
    batches_in_flight: usize,
}

#[derive(Clone, Copy)]
enum Direction {
    Write,
    Read,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let bind = || TcpTransport::bind(([127, 0, 0, 1], 0).into(), Epoch(1), tcp::Config::default());
    let (near, far) = (bind().await?, bind().await?);
    let (source, target) = (
        HostMemory::allocate(REGION_BYTES)?,
        HostMemory::allocate(REGION_BYTES)?,
    );
    // Pages that were never written are all the same page, which would flatter the reads of them.
    copy_in(&*source, 0, &vec![1; REGION_BYTES])?;
    copy_in(&*target, 0, &vec![2; REGION_BYTES])?;
    let region = near.register(source)?;
    let exposed = far.register(target)?;
    let grant = far.grant_write(exposed, vec![0..REGION_BYTES as u64])?;
    let readable = far.expose_read(exposed)?;

    println!("operation  slice KiB  slices/batch  in flight   GB/s  batches/s");
    let rows = [
        (24, 1, 1),
        (24, 1, 4),
        (24, 16, 1),
        (24, 16, 4),
        (24, 64, 4),
        (1024, 1, 1),
        (1024, 1, 4),
        (1024, 16, 2),
    ];
    for (slice_kib, slices_per_batch, batches_in_flight) in rows {
        let row = Row {
            slice_bytes: slice_kib << 10,
            slices_per_batch,
            batches_in_flight,
        };
        for (direction, remote) in [(Direction::Write, &grant), (Direction::Read, &readable)] {
            let operation = match direction {
                Direction::Write => "write",
                Direction::Read => "read",
            };
            let (bytes, batches, elapsed) = measure(&near, &row, direction, |start| TransferBatch {
                region,
                remote: remote.clone(),
                slices: scattered(&row, start),
                keep: Keep::default(),
            })
            .await?;
            println!(
                "{operation:<9}  {slice_kib:>9}  {slices_per_batch:>12}  {batches_in_flight:>9}  {:>5.2}  {:>9.0}",
                bytes as f64 / elapsed.as_secs_f64() / 1e9,
                batches as f64 / elapsed.as_secs_f64(),
            );
        }
    }
    Ok(())
}

/// The slices of batch number `start`, each at another place than its neighbour in the remote memory.
fn scattered(row: &Row, start: u64) -> Vec<Slice> {
    let places = REGION_BYTES as u64 / row.slice_bytes;
    let slice = |i: u64| Slice {
        local_offset: (start * row.slices_per_batch + i) % places * row.slice_bytes,
        remote_offset: (start * row.slices_per_batch + i) * 7 % places * row.slice_bytes,
        len: row.slice_bytes,
    };
    (0..row.slices_per_batch).map(slice).collect()
}

/// Bytes and batches moved, and in which time.
async fn measure(
    near: &Arc<TcpTransport>,
    row: &Row,
    direction: Direction,
    batch: impl Fn(u64) -> TransferBatch,
) -> Result<(u64, u64, Duration), Box<dyn Error>> {
    let begun = Instant::now();
    let (mut bytes, mut batches) = (0, 0);
    let running = futures::stream::iter(0..)
        .take_while(|_| std::future::ready(begun.elapsed() < ROW))
        .map(|i| match direction {
            Direction::Write => near.write(batch(i), begun + 10 * ROW),
            Direction::Read => near.read(batch(i), begun + 10 * ROW),
        })
        .buffer_unordered(row.batches_in_flight);
    let mut running = std::pin::pin!(running);
    while let Some(done) = running.next().await {
        bytes += done?.bytes;
        batches += 1;
    }
    Ok((bytes, batches, begun.elapsed()))
}
