//! The cluster's nodes, asked one by one: what they say of themselves and of their transfers.

use client::{Node, NodeInfo, Transfer, TransferDescription};
use futures::{StreamExt, stream};
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
        let (info, serving) = match node {
            Ok(node) => tokio::join!(node.info(), node.serving()),
            Err(error) => (Err(error.clone()), Err(error)),
        };
        Answered {
            record,
            info,
            serving,
        }
    });
    answers.buffered(ASKED_MAX).collect().await
}

/// A client of the node's transfers.
pub(crate) fn transfer(router: &Router, record: &NodeRecord) -> Result<Transfer, Error> {
    Ok(Transfer::new(router.channel_to(record)?))
}
