//! The cluster's nodes, asked one by one: what they say of themselves and of their transfers.

use std::time::SystemTime;

use client::{Node, NodeInfo, Transfer, TransferDescription};
use futures::{StreamExt, stream};
use node::clock::unix_ms;
use types::{Error, NodeRecord};

use crate::reach::Router;

/// Nodes that are asked at a time.
pub(crate) const ASKED_MAX: usize = 32;

/// What a node that has a pool says of its transfers.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) record: NodeRecord,
    pub(crate) said: Result<TransferDescription, Error>,
}

/// What a node says of itself.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) record: NodeRecord,
    pub(crate) info: Result<NodeInfo, Error>,
    pub(crate) serving: Result<bool, Error>,
    /// `None` where the node does not tell its time.
    pub(crate) clock: Option<Clock>,
}

/// A node's clock beside this machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Clock {
    /// How far it is ahead, in milliseconds.
    pub(crate) ahead_ms: i64,
    /// How far that may be wrong: nobody knows when within a call the node looked at its clock.
    pub(crate) error_ms: i64,
}

impl Clock {
    /// What a node's time says that was asked for between `asked` and `answered` of this machine's clock.
    pub(crate) fn of(node_unix_ms: u64, asked: SystemTime, answered: SystemTime) -> Self {
        let signed = |unix_ms: u64| i64::try_from(unix_ms).unwrap_or(i64::MAX);
        let (asked, answered) = (signed(unix_ms(asked)), signed(unix_ms(answered)));
        let half = answered.saturating_sub(asked).max(0) / 2;
        let node = signed(node_unix_ms);
        Self {
            ahead_ms: node.saturating_sub(asked + half),
            // A millisecond is cut off at each end.
            error_ms: half + 1,
        }
    }
}

/// Whether the node holds blocks, and so takes part in transfers.
pub(crate) fn has_pool(record: &NodeRecord) -> bool {
    !record.transfer_endpoint.is_empty()
}

/// Asks every node that has a pool how it moves KV. In the order of `records`.
pub(crate) async fn describe(router: &Router, records: &[NodeRecord]) -> Vec<Described> {
    let asked = records.iter().filter(|record| has_pool(record)).cloned();
    let answers = stream::iter(asked).map(|record| async move {
        let said = async { transfer(router, &record)?.describe().await }.await;
        Described { record, said }
    });
    answers.buffered(ASKED_MAX).collect().await
}

/// Asks every node who it is, and whether it takes requests. In the order of `records`.
pub(crate) async fn ask(router: &Router, records: &[NodeRecord]) -> Vec<Answered> {
    let answers = stream::iter(records.to_vec()).map(|record| async move {
        let node = router.channel_to(&record).map(Node::new);
        let asked = SystemTime::now();
        let (info, serving) = match node {
            Ok(node) => tokio::join!(node.info(), node.serving()),
            Err(error) => (Err(error.clone()), Err(error)),
        };
        let answered = SystemTime::now();
        let time = info.as_ref().ok().and_then(|info| info.unix_time_ms);
        Answered {
            record,
            info,
            serving,
            clock: time.map(|time| Clock::of(time, asked, answered)),
        }
    });
    answers.buffered(ASKED_MAX).collect().await
}

/// A client of the node's transfers.
pub(crate) fn transfer(router: &Router, record: &NodeRecord) -> Result<Transfer, Error> {
    Ok(Transfer::new(router.channel_to(record)?))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn clocks_are_compared_with_the_middle_of_a_call() {
        let at = |ms| UNIX_EPOCH + Duration::from_millis(ms);
        let clock = Clock::of(5_000, at(1_000), at(1_200));
        assert_eq!((clock.ahead_ms, clock.error_ms), (3_900, 101));
        assert_eq!(Clock::of(1_000, at(5_000), at(5_000)).ahead_ms, -4_000);
        // A clock that is set back between the two is no reason to count backwards.
        assert_eq!(Clock::of(5_000, at(5_000), at(4_000)).error_ms, 1);
    }
}
