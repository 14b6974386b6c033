//! Why a request is turned away, and when a new try has a chance.

use types::{Constraint, Millis, Overload};

/// Shortest and longest retry times that are given out: sooner is a storm, later is a guess.
const RETRY_AFTER_MS: std::ops::RangeInclusive<f64> = 100.0..=30_000.0;

/// A request is turned away.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Rejection {
    /// As many requests wait as may wait, and none of them behind this one.
    #[error("{waiting} requests wait already")]
    QueueFull {
        /// How many.
        waiting: usize,
        /// Until this one's turn would have come.
        wait: Millis,
    },
    /// It waited, and its place went to a request that is served before it.
    #[error("its place among {waiting} waiting requests went to a request that is served before it")]
    Displaced {
        /// How many.
        waiting: usize,
        /// Until this one's turn would have come.
        wait: Millis,
    },
    /// More requests are being read than may be.
    #[error("{arriving} requests are being read already")]
    Arriving {
        /// How many.
        arriving: usize,
    },
    /// The first token would come too late.
    #[error("the first token is predicted after {predicted}, but the request allows {allowed}")]
    FirstTokenTooLate {
        /// From arrival.
        predicted: Millis,
        /// That the request allows.
        allowed: Millis,
    },
    /// Its tokens would come too slowly.
    #[error("{gap} are predicted between tokens, but the request allows {allowed}")]
    TokensTooSlow {
        /// Between tokens.
        gap: Millis,
        /// That the request allows.
        allowed: Millis,
        /// When the first token was predicted, from arrival.
        first_token: Millis,
    },
}

impl Rejection {
    /// When a new try has a chance, in milliseconds.
    pub fn retry_after_ms(&self) -> u64 {
        let after = match self {
            Self::QueueFull { wait, .. } | Self::Displaced { wait, .. } => wait.0,
            // Reading takes milliseconds.
            Self::Arriving { .. } => 1_000.0,
            Self::FirstTokenTooLate { predicted, allowed } => predicted.0 - allowed.0,
            // Batches become smaller as answers end, which the time to the first token is as good a measure of as any.
            Self::TokensTooSlow { first_token, .. } => first_token.0,
        };
        after.clamp(*RETRY_AFTER_MS.start(), *RETRY_AFTER_MS.end()).ceil() as u64
    }

    /// What there was too little of.
    pub fn overload(&self) -> Overload {
        let (constraint, ttft_predicted) = match self {
            Self::QueueFull { wait, .. } | Self::Displaced { wait, .. } => (Constraint::Queue, *wait),
            Self::Arriving { .. } => (Constraint::Queue, Millis(0.0)),
            Self::FirstTokenTooLate { predicted, .. } => (Constraint::Ttft, *predicted),
            Self::TokensTooSlow { first_token, .. } => (Constraint::Tbt, *first_token),
        };
        Overload {
            constraint,
            ttft_predicted,
        }
    }
}
