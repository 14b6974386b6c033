//! What a router decided, and why.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::routing_client::RoutingClient;
use tonic::Streaming;
use types::{Error, RequestId};

use crate::call::{self, UNARY_DEADLINE};

/// Client of `perigee.v1.Routing`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Routing {
    client: RoutingClient<Channel>,
    deadline: Duration,
}

/// A placement with its reasons, as `perigee.v1.Decision` documents it. It has at least one candidate: its choice.
pub type Decision = v1::Decision;

/// One way to serve a request, as `perigee.v1.PlacementCandidate` documents it.
pub type PlacementCandidate = v1::PlacementCandidate;

/// A peer that holds a prefix, as `perigee.v1.PlacementSource` documents it.
pub type PlacementSource = v1::PlacementSource;

impl Routing {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        let client = RoutingClient::new(channel);
        Self {
            client: client
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives unary calls, and the opening of streams, another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Where a prompt would be placed now, with every candidate. The placement is not counted.
    ///
    /// # Errors
    ///
    /// The router cannot be reached in time, no node can take the prompt, or the request is none that could be placed.
    pub async fn explain(&self, request: v1::ExplainRequest) -> Result<Decision, Error> {
        const METHOD: &str = "Routing/Explain";
        let mut client = self.client.clone();
        let request = call::request(request, self.deadline);
        let response = call::unary(METHOD, self.deadline, client.explain(request)).await?;
        checked(METHOD, response.decision)
    }

    /// The last decisions, newest first: at most `count`, or 256, which an answer never exceeds. Of `request` only, if it is named.
    ///
    /// # Errors
    ///
    /// `not_found` if no decision of `request` is kept; the router cannot be reached in time.
    pub async fn decisions(
        &self,
        request: Option<RequestId>,
        count: Option<u32>,
    ) -> Result<Vec<Decision>, Error> {
        const METHOD: &str = "Routing/ListDecisions";
        let mut client = self.client.clone();
        let wire = v1::ListDecisionsRequest {
            request_id: request.map_or_else(String::new, |id| id.to_string()),
            count: count.unwrap_or(0),
        };
        let request = call::request(wire, self.deadline);
        let response = call::unary(METHOD, self.deadline, client.list_decisions(request)).await?;
        let decisions = response.decisions.into_iter();
        decisions
            .map(|decision| checked(METHOD, Some(decision)))
            .collect()
    }

    /// Decisions from now on, for as long as the router runs.
    ///
    /// # Errors
    ///
    /// The router cannot be reached in time.
    pub async fn watch(&self) -> Result<DecisionStream, Error> {
        let mut client = self.client.clone();
        // Without the deadline as the call's own, which would end the stream.
        let watching = client.watch_decisions(v1::WatchDecisionsRequest {});
        let stream = call::unary(DecisionStream::METHOD, self.deadline, watching).await?;
        Ok(DecisionStream { stream })
    }
}

/// Decisions as they are made.
#[derive(Debug)]
pub struct DecisionStream {
    stream: Streaming<v1::WatchDecisionsResponse>,
}

impl DecisionStream {
    const METHOD: &str = "Routing/WatchDecisions";

    /// The next decision, and how many were missed before it; `None` once the router ends. Cancel safe.
    ///
    /// # Errors
    ///
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<(Decision, u64)>, Error> {
        match call::next(Self::METHOD, &mut self.stream, None).await? {
            None => Ok(None),
            Some(response) => {
                let decision = checked(Self::METHOD, response.decision)?;
                Ok(Some((decision, response.missed)))
            }
        }
    }
}

fn checked(method: &str, decision: Option<Decision>) -> Result<Decision, Error> {
    let chose = |decision: &Decision| !decision.candidates.is_empty();
    decision.filter(chose).ok_or_else(|| call::empty(method))
}
