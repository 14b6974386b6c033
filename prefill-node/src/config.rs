//! What can be set of a prefill node, with the defaults and their reasons.

use std::num::NonZeroUsize;
use std::time::Duration;

use types::Error;

/// Bounds and times of a prefill node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Threads of the engine; `None` takes one per core.
    pub threads: Option<NonZeroUsize>,
    /// Prompt tokens of one engine step.
    pub step_tokens: usize,
    /// Prompts of one engine step.
    pub step_sequences_max: usize,
    /// Prompts that wait or are being computed.
    pub queue_requests_max: usize,
    /// Tokens of those prompts that are still to be computed.
    pub queue_tokens_max: usize,
    /// Conversations open at a time, in every state.
    pub sessions_max: usize,
    /// How long a new stream may take to say what it wants.
    pub start_timeout: Duration,
    /// How long a decode node may take to offer memory after it was told that the prefill started.
    pub offer_timeout: Duration,
    /// How often a request that has nothing else to say tells its decode node that it lives.
    pub heartbeat_interval: Duration,
    /// Longest time of one request, whatever it asks for.
    pub request_timeout_max: Duration,
    /// Longest time for fetching a prefix from peers.
    pub fetch_timeout: Duration,
    /// How often a request looks again for memory that leases of remote readers hold.
    pub memory_retry_interval: Duration,
    /// Longest time of one write to a decode node.
    pub write_timeout: Duration,
    /// How long the writes of a request that ends early may take to end by themselves.
    pub quiesce_timeout: Duration,
    /// Writes of one request in flight.
    pub writes_in_flight_max: usize,
    /// Bytes of one write. One slice may exceed it.
    pub write_bytes_max: usize,
    /// Slices of one write.
    pub write_slices_max: usize,
    /// How long requests may go on after the node was told to end.
    pub drain_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            threads: None,
            // Where the engine's throughput has levelled off; more would only make a new prompt wait longer for
            // its first step, and its decode node for the first layer.
            step_tokens: 512,
            // Short prompts that fill one step between them.
            step_sequences_max: 32,
            // The router rejects what would wait too long; this only bounds memory when it is wrong.
            queue_requests_max: 256,
            // Minutes of work on a slow machine.
            queue_tokens_max: 256 * 1024,
            // As many as queue, and again as many that land.
            sessions_max: 512,
            // A stream's first message travels with its headers.
            start_timeout: Duration::from_secs(5),
            // The decode node waits for blocks of its own meanwhile.
            offer_timeout: Duration::from_secs(10),
            // Often against the seconds after which a decode node gives up, and nothing against a step's traffic.
            heartbeat_interval: Duration::from_secs(1),
            // A prompt of a full context on a slow machine.
            request_timeout_max: Duration::from_secs(600),
            // What takes longer is computed faster.
            fetch_timeout: Duration::from_secs(10),
            // Nothing tells when a lease ends.
            memory_retry_interval: Duration::from_millis(20),
            // Thousands of times what a write takes, and a stalled peer holds only its own request up.
            write_timeout: Duration::from_secs(10),
            // Writes that are under way to a peer that answers end in milliseconds.
            quiesce_timeout: Duration::from_secs(2),
            // One that is acknowledged, one on the wire, and two for the connections of the transport.
            writes_in_flight_max: 4,
            // Some milliseconds at 10 Gbit/s: large against a round trip, small against what is left to do.
            write_bytes_max: 4 << 20,
            // Far below what a message of the transport holds.
            write_slices_max: 256,
            // Kubernetes kills a pod 30 s after it told it to end.
            drain_timeout: Duration::from_secs(20),
        }
    }
}

impl Config {
    /// Refuses what could not work.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`], naming the setting.
    pub fn validate(&self) -> Result<(), Error> {
        let counts = [
            ("step_tokens", self.step_tokens),
            ("step_sequences_max", self.step_sequences_max),
            ("queue_requests_max", self.queue_requests_max),
            ("queue_tokens_max", self.queue_tokens_max),
            ("sessions_max", self.sessions_max),
            ("writes_in_flight_max", self.writes_in_flight_max),
            ("write_bytes_max", self.write_bytes_max),
            ("write_slices_max", self.write_slices_max),
        ];
        for (name, value) in counts {
            if value == 0 {
                return Err(Error::invalid(
                    name,
                    format!("{name} is 0, but must be at least 1"),
                ));
            }
        }
        if self.step_tokens > engine::step::STEP_ROWS_MAX {
            return Err(Error::invalid(
                "step_tokens",
                format!(
                    "step_tokens is {}, but the engine takes at most {}",
                    self.step_tokens,
                    engine::step::STEP_ROWS_MAX
                ),
            ));
        }
        let times = [
            ("start_timeout", self.start_timeout),
            ("offer_timeout", self.offer_timeout),
            ("heartbeat_interval", self.heartbeat_interval),
            ("request_timeout_max", self.request_timeout_max),
            ("memory_retry_interval", self.memory_retry_interval),
            ("write_timeout", self.write_timeout),
        ];
        for (name, value) in times {
            if value.is_zero() {
                return Err(Error::invalid(name, format!("{name} is 0s, but must be longer")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_nonsense_is_named() {
        Config::default().validate().expect("valid");
        let zero = Config {
            sessions_max: 0,
            ..Config::default()
        };
        let huge = Config {
            step_tokens: usize::MAX,
            ..Config::default()
        };
        let hasty = Config {
            write_timeout: Duration::ZERO,
            ..Config::default()
        };
        for (config, name) in [
            (zero, "sessions_max"),
            (huge, "step_tokens"),
            (hasty, "write_timeout"),
        ] {
            let error = config.validate().expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(name));
        }
    }
}
