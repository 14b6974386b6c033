//! What can be set of a decode node, with the defaults and their reasons.

use std::num::NonZeroUsize;
use std::time::Duration;

use engine::step::STEP_ROWS_MAX;
use types::Error;

/// Bounds and times of a decode node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Threads of the engine; `None` takes one per core.
    pub threads: Option<NonZeroUsize>,
    /// Sequences in the batch.
    pub sequences_max: usize,
    /// Rows of one step of the engine: the tokens of the batch, and what is left of it for prompts that are
    /// prefilled here. It bounds the gap between two tokens of every sequence; limits that requests name bound it further.
    pub step_tokens: usize,
    /// Requests that are accepted at a time: those that run, those that wait, and those whose KV is on its way.
    pub requests_max: usize,
    /// Longest time a request may take, whatever its deadline says.
    pub request_timeout_max: Duration,
    /// How long a handoff waits for blocks before the request queues for them with the others.
    pub allocate_timeout: Duration,
    /// How long a prefill node may say nothing before its handoff is given up, where it promised to say that it lives.
    pub stall_timeout: Duration,
    /// How long a request waits for the fence of its handoff. The fence of a handoff that is given up goes on, and its
    /// blocks are free after it.
    pub fence_timeout: Duration,
    /// How often somebody who waits for blocks looks again.
    pub blocks_poll: Duration,
    /// How long requests may go on after the node was told to end.
    pub drain_timeout: Duration,
    /// Messages to a client that are made before it takes them.
    pub messages_ahead_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            threads: None,
            // On a CPU the weights are read once per step for some ten sequences; beyond that it is compute that
            // counts, and every further sequence slows all others.
            sequences_max: 32,
            // About half a second of a small model on two cores, which is the longest gap a reader may notice.
            step_tokens: 256,
            // Some minutes of work. Whoever comes later is served sooner elsewhere.
            requests_max: 256,
            // A million tokens take longer, but by then nobody waits for an answer.
            request_timeout_max: Duration::from_secs(600),
            // Some hundred decode steps: enough for a sequence to end. Meanwhile the prefill node computes already.
            allocate_timeout: Duration::from_secs(5),
            // Several heartbeats, so that a machine whose cores are all busy is not taken for one that hangs.
            stall_timeout: Duration::from_secs(5),
            // Fences close in microseconds, those that wait for hardware in milliseconds.
            fence_timeout: Duration::from_secs(1),
            // Short against a step, long against the lookup it costs.
            blocks_poll: Duration::from_millis(2),
            // Below the 25 s after which the server gives up.
            drain_timeout: Duration::from_secs(20),
            // A message holds all tokens that are ready, so that few suffice for a client that keeps up.
            messages_ahead_max: 4,
        }
    }
}

impl Config {
    /// Checks what the types do not say.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`], naming the key.
    pub fn validate(&self) -> Result<(), Error> {
        for (name, value) in [
            ("sequences_max", self.sequences_max),
            ("requests_max", self.requests_max),
            ("messages_ahead_max", self.messages_ahead_max),
        ] {
            if value == 0 {
                return Err(Error::invalid(name, format!("{name} must not be 0")));
            }
        }
        if self.step_tokens <= self.sequences_max {
            return Err(Error::invalid(
                "step_tokens",
                format!(
                    "step_tokens is {}, but must exceed sequences_max, which is {}: otherwise no prompt advances \
                     beside a full batch",
                    self.step_tokens, self.sequences_max
                ),
            ));
        }
        if self.step_tokens > STEP_ROWS_MAX {
            return Err(Error::invalid(
                "step_tokens",
                format!(
                    "step_tokens is {}, but the engine takes at most {STEP_ROWS_MAX}",
                    self.step_tokens
                ),
            ));
        }
        for (name, value) in [
            ("request_timeout_max", self.request_timeout_max),
            ("stall_timeout", self.stall_timeout),
            ("fence_timeout", self.fence_timeout),
            ("blocks_poll", self.blocks_poll),
        ] {
            if value.is_zero() {
                return Err(Error::invalid(name, format!("{name} is 0s, but must be longer")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("step_tokens", Config { step_tokens: 32, sequences_max: 32, ..Default::default() })]
    #[case("sequences_max", Config { sequences_max: 0, ..Default::default() })]
    #[case("requests_max", Config { requests_max: 0, ..Default::default() })]
    #[case("step_tokens", Config { step_tokens: usize::MAX, ..Default::default() })]
    #[case("stall_timeout", Config { stall_timeout: Duration::ZERO, ..Default::default() })]
    #[case("fence_timeout", Config { fence_timeout: Duration::ZERO, ..Default::default() })]
    #[case("blocks_poll", Config { blocks_poll: Duration::ZERO, ..Default::default() })]
    #[case("messages_ahead_max", Config { messages_ahead_max: 0, ..Default::default() })]
    fn a_setting_without_progress_is_named(#[case] key: &str, #[case] config: Config) {
        let error = config.validate().expect_err("must be refused");
        assert_eq!(error.param.as_deref(), Some(key));
    }

    #[test]
    fn defaults_are_valid() {
        Config::default().validate().expect("valid");
    }
}
