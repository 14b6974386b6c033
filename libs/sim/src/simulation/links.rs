//! The network: every node sends and receives one thing after the other at its full bandwidth.

/// When each node's two directions are free again.
#[derive(Debug)]
pub(super) struct Links {
    sends_ns: Vec<u64>,
    receives_ns: Vec<u64>,
    bytes_per_ms: f64,
}

impl Links {
    pub(super) fn new(nodes: usize, bytes_per_ms: f64) -> Self {
        Self {
            sends_ns: vec![0; nodes],
            receives_ns: vec![0; nodes],
            bytes_per_ms,
        }
    }

    /// Nanoseconds that `bytes` take alone.
    pub(super) fn duration_ns(&self, bytes: u64) -> u64 {
        super::ns(bytes as f64 / self.bytes_per_ms)
    }

    /// Sends `bytes` once both ends are free, not before `ready_ns`. When they have arrived.
    pub(super) fn send(&mut self, from: usize, to: usize, bytes: u64, ready_ns: u64) -> u64 {
        let starts = ready_ns.max(self.sends_ns[from]).max(self.receives_ns[to]);
        let ends = starts + self.duration_ns(bytes);
        self.sends_ns[from] = ends;
        self.receives_ns[to] = ends;
        ends
    }
}
