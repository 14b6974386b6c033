//! How nodes move KV, and tests of it.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::transfer_client::TransferClient;
use tokio::time::Instant;
use tonic::Streaming;
use types::{Error, HostFacts};

use crate::call::{self, UNARY_DEADLINE};

/// How much longer than its measurements a test may take: opening and closing probes, and one transfer per measurement
/// that began just before its time was over.
const TEST_MARGIN: Duration = Duration::from_secs(60);

/// Client of `perigee.v1.Transfer`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Transfer {
    client: TransferClient<Channel>,
    deadline: Duration,
}

/// A way of moving bytes, as `perigee.v1.TransferMover` documents it.
pub type TransferMover = v1::TransferMover;

/// How a peer is reached, as `perigee.v1.TransferLink` documents it.
pub type TransferLink = v1::TransferLink;

/// One measurement of a test, as `perigee.v1.TestTransferResponse` documents it.
pub type TransferMeasurement = v1::TestTransferResponse;

/// Which way a test moves bytes.
pub type TransferDirection = v1::TransferDirection;

/// How a node moves KV.
#[derive(Debug, Clone, PartialEq)]
pub struct TransferDescription {
    /// Where peers reach its transport.
    pub endpoint: String,
    /// The ways of moving bytes that were looked for at its start.
    pub movers: Vec<TransferMover>,
    /// The peers that transfers went to.
    pub links: Vec<TransferLink>,
    /// What its host offers.
    pub host: HostFacts,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferTest {
    /// `host:port` of the peer's gRPC services.
    pub peer_grpc_endpoint: String,
    /// Largest transfer; 0 takes the node's own bound.
    pub bytes_max: u64,
    /// Time for all measurements together.
    pub duration: Duration,
    /// To the peer, from it, or both.
    pub direction: TransferDirection,
}

impl Transfer {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self {
            client: TransferClient::new(channel).max_decoding_message_size(proto::MESSAGE_BYTES_MAX),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives unary calls, and the opening of streams, another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Asks how the node moves KV.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time, or what it says cannot be read.
    pub async fn describe(&self) -> Result<TransferDescription, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::DescribeTransfersRequest {}, self.deadline);
        let response = call::unary("Transfer/Describe", self.deadline, client.describe(request)).await?;
        Ok(TransferDescription {
            endpoint: response.endpoint,
            movers: response.movers,
            links: response.links,
            host: proto::convert::host(&response.host_json)?,
        })
    }

    /// Measures transfers between the node and a peer.
    ///
    /// # Errors
    ///
    /// `overloaded` if the node runs another test; the node cannot be reached in time.
    pub async fn test(&self, test: &TransferTest) -> Result<TransferTestStream, Error> {
        let mut client = self.client.clone();
        let request = v1::TestTransferRequest {
            peer_grpc_endpoint: test.peer_grpc_endpoint.clone(),
            bytes_max: test.bytes_max,
            duration_ms: u64::try_from(test.duration.as_millis()).unwrap_or(u64::MAX),
            direction: test.direction.into(),
        };
        let stream = call::unary(TransferTestStream::METHOD, self.deadline, client.test(request)).await?;
        Ok(TransferTestStream {
            stream,
            until: Instant::now() + test.duration + TEST_MARGIN,
        })
    }
}

/// The measurements of a test.
#[derive(Debug)]
pub struct TransferTestStream {
    stream: Streaming<v1::TestTransferResponse>,
    until: Instant,
}

impl TransferTestStream {
    const METHOD: &str = "Transfer/Test";

    /// The next measurement; `None` at the end. Cancel safe.
    ///
    /// # Errors
    ///
    /// `corrupt` if bytes did not arrive as they were sent; `unavailable` or `timeout` if the peer cannot be reached.
    pub async fn next(&mut self) -> Result<Option<TransferMeasurement>, Error> {
        call::next(Self::METHOD, &mut self.stream, Some(self.until)).await
    }
}
