//! Counters of a transport, for the node's metrics.
//!
//! Plain relaxed atomics: each counter is exact, and a snapshot is not one moment of all of them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use types::ErrorCode;

const CODES: usize = ErrorCode::ALL.len();

/// Counts as they were read, all since the transport started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatsSnapshot {
    /// Bytes written to peers and acknowledged.
    pub written_bytes: u64,
    /// Bytes read from peers.
    pub read_bytes: u64,
    /// Bytes that peers wrote here and that were acknowledged.
    pub received_bytes: u64,
    /// Bytes that peers read here.
    pub served_bytes: u64,
    /// Batches that succeeded.
    pub batches: u64,
    /// Of `written_bytes`: those that UCX moved.
    pub ucx_written_bytes: u64,
    /// Of `read_bytes`: those that UCX moved.
    pub ucx_read_bytes: u64,
    /// Of `received_bytes`: those that UCX moved.
    pub ucx_received_bytes: u64,
    /// Of `served_bytes`: those that UCX moved.
    pub ucx_served_bytes: u64,
    /// Of `batches`: those whose bytes UCX moved.
    pub ucx_batches: u64,
    /// Batches in progress now.
    pub batches_in_flight: u64,
    /// Connections opened to peers.
    pub connections_opened: u64,
    /// Connections accepted from peers.
    pub connections_accepted: u64,
    /// Connections from peers that are open now.
    pub connections_served: u64,
    /// Connections closed at once because the bound was reached.
    pub connections_rejected: u64,
    /// Connections closed because what came over them was not the protocol.
    pub protocol_violations: u64,
    /// Local batches that failed, by the position of their code in [`ErrorCode::ALL`].
    pub batch_errors: [u64; CODES],
    /// Peers' requests that were refused or broke off, by the position of their code in [`ErrorCode::ALL`].
    pub serve_errors: [u64; CODES],
}

impl StatsSnapshot {
    /// Local batches that failed with `code`.
    pub fn batch_errors_of(&self, code: ErrorCode) -> u64 {
        self.batch_errors[position(code)]
    }

    /// Peers' requests that were refused or broke off with `code`.
    pub fn serve_errors_of(&self, code: ErrorCode) -> u64 {
        self.serve_errors[position(code)]
    }
}

#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) written_bytes: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) received_bytes: Counter,
    pub(crate) served_bytes: Counter,
    pub(crate) batches: Counter,
    pub(crate) ucx_written_bytes: Counter,
    pub(crate) ucx_read_bytes: Counter,
    pub(crate) ucx_received_bytes: Counter,
    pub(crate) ucx_served_bytes: Counter,
    pub(crate) ucx_batches: Counter,
    pub(crate) batches_in_flight: Gauge,
    pub(crate) connections_opened: Counter,
    pub(crate) connections_accepted: Counter,
    pub(crate) connections_served: Gauge,
    pub(crate) connections_rejected: Counter,
    pub(crate) protocol_violations: Counter,
    batch_errors: [Counter; CODES],
    serve_errors: [Counter; CODES],
}

impl Stats {
    pub(crate) fn batch_failed(&self, code: ErrorCode) {
        self.batch_errors[position(code)].add(1);
    }

    pub(crate) fn serve_failed(&self, code: ErrorCode) {
        self.serve_errors[position(code)].add(1);
    }

    pub(crate) fn snapshot(&self) -> StatsSnapshot {
        StatsSnapshot {
            written_bytes: self.written_bytes.get(),
            read_bytes: self.read_bytes.get(),
            received_bytes: self.received_bytes.get(),
            served_bytes: self.served_bytes.get(),
            batches: self.batches.get(),
            ucx_written_bytes: self.ucx_written_bytes.get(),
            ucx_read_bytes: self.ucx_read_bytes.get(),
            ucx_received_bytes: self.ucx_received_bytes.get(),
            ucx_served_bytes: self.ucx_served_bytes.get(),
            ucx_batches: self.ucx_batches.get(),
            batches_in_flight: self.batches_in_flight.0.get(),
            connections_opened: self.connections_opened.get(),
            connections_accepted: self.connections_accepted.get(),
            connections_served: self.connections_served.0.get(),
            connections_rejected: self.connections_rejected.get(),
            protocol_violations: self.protocol_violations.get(),
            batch_errors: std::array::from_fn(|i| self.batch_errors[i].get()),
            serve_errors: std::array::from_fn(|i| self.serve_errors[i].get()),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counts what exists now: one more while a guard of [`Gauge::enter`] lives.
#[derive(Debug, Default)]
pub(crate) struct Gauge(Counter);

impl Gauge {
    pub(crate) fn enter(&self) -> GaugeGuard<'_> {
        self.0.add(1);
        GaugeGuard(self)
    }
}

pub(crate) struct GaugeGuard<'a>(&'a Gauge);

impl Drop for GaugeGuard<'_> {
    fn drop(&mut self) {
        self.0.0.0.fetch_sub(1, Relaxed);
    }
}

fn position(code: ErrorCode) -> usize {
    ErrorCode::ALL
        .iter()
        .position(|known| *known == code)
        .expect("ALL holds every code")
}
