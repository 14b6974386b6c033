//! Times that requests are promised and measured in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A duration or prediction in milliseconds. Finite; the cost model works in these.
#[derive(Debug, Default, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub f64);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} ms", self.0)
    }
}

impl std::ops::Add for Millis {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl std::iter::Sum for Millis {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        Self(iter.map(|millis| millis.0).sum())
    }
}

/// The limits a request asks for. `None` means best effort.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slo {
    /// Arrival at the router to the first token out.
    pub ttft: Option<Millis>,
    /// Any gap between consecutive tokens.
    pub tbt: Option<Millis>,
}
