//! What is said of a request where there is too little for everybody: how much it matters, and what there is too little of.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Millis;

/// How much a request matters beside others. More important ones are served first.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Work that may wait: batches, evaluations.
    Low,
    /// What nobody said otherwise of.
    #[default]
    Normal,
    /// Somebody sits before it.
    High,
}

impl Priority {
    /// All of them, least first.
    pub const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];

    /// The name in settings and on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }

    /// Reads what [`Priority::as_str`] gives.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|priority| priority.as_str() == name)
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The limit that a request which was turned away would have broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// Time to first token.
    Ttft,
    /// Time between tokens.
    Tbt,
    /// Places in a queue.
    Queue,
}

impl Constraint {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ttft, Self::Tbt, Self::Queue];

    /// The name on the wire and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tbt => "tbt",
            Self::Queue => "queue",
        }
    }

    /// Reads what [`Constraint::as_str`] gives.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|constraint| constraint.as_str() == name)
    }
}

/// Why there was no place for a request: what an [`Error`](crate::Error) with the code `overloaded` says beside its message.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Overload {
    /// What binds.
    pub constraint: Constraint,
    /// When the first token was predicted to come, counted from the request's arrival.
    pub ttft_predicted: Millis,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for priority in Priority::ALL {
            assert_eq!(Priority::parse(priority.as_str()), Some(priority));
        }
        for constraint in Constraint::ALL {
            assert_eq!(Constraint::parse(constraint.as_str()), Some(constraint));
        }
        assert_eq!(Priority::parse("urgent"), None);
    }
}
