//! One placement of a request: the call to its decode node, and what it says about who is at fault when it fails.

use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::decode_client::DecodeClient;
use proto::v1::decode_event::Event;
use tonic::{Status, Streaming};
use types::{Error, ErrorCode, NodeRecord, TraceParent};

use super::{left, silent};
use crate::cluster::Assignment;
use crate::cost::learning::{Foretold, Measured};
use crate::cost::{PlacementId, Prediction};
use crate::members::SharedCluster;

/// A request on its decode node. Dropping it cancels the request there and everything below it.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) nodes: Nodes,
    pub(super) placed: Placed,
    pub(super) placed_at: Instant,
    /// Tokens that came by this placement.
    pub(super) tokens: u64,
    stream: Streaming<v1::DecodeEvent>,
}

/// Who serves a placement.
#[derive(Debug, Clone)]
pub(super) struct Nodes {
    pub(super) decode: NodeRecord,
    pub(super) prefill: Option<NodeRecord>,
}

/// A place in the cost model's ledger, for as long as it lives.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) id: PlacementId,
    foretold: Foretold,
    cluster: SharedCluster,
    /// Tokens of the answer, once it is complete.
    answered: Option<u64>,
}

/// How a placement failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    sign: Sign,
}

/// What a failure looked like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// The decode node said so itself.
    Answered,
    /// Its stream is open, and nothing comes.
    Silent,
    /// The connection broke, or was never made.
    Broken,
}

impl Failure {
    fn broken(error: Error) -> Self {
        let sign = Sign::Broken;
        Self { error, sign }
    }

    fn of(node: &NodeRecord, status: &Status) -> Self {
        let error = proto::status::from_status(status);
        if !status.details().is_empty() {
            let sign = Sign::Answered;
            return Self { error, sign };
        }
        // Only our own nodes' errors carry details. Whatever else this is, it says nothing about the request.
        let message = format!("the stream from {} broke: {}", node.id, error.message);
        Self::broken(Error::unavailable(message))
    }

    /// Whether another placement may succeed. A node that is full is one that another node may stand in for, as long as nothing
    /// was streamed.
    pub(super) fn retryable(&self, streamed: bool) -> bool {
        self.sign != Sign::Answered
            || self.error.code.retry_elsewhere()
            || (self.error.code == ErrorCode::Overloaded && !streamed)
    }

    /// Who is kept out of the request's next placement. A decode node that has no token yet and answers with an error, or
    /// nothing at all, was waiting for its prefill node, if it has one (a decode node that hangs itself stops reporting its
    /// load, and is out for that). In every other case it is the decode node that failed.
    pub(super) fn blamed<'a>(&self, nodes: &'a Nodes, tokens: u64) -> &'a NodeRecord {
        match &nodes.prefill {
            Some(prefill) if self.sign != Sign::Broken && tokens == 0 => prefill,
            Some(_) | None => &nodes.decode,
        }
    }
}

impl Placed {
    pub(super) fn new(id: PlacementId, foretold: Foretold, cluster: SharedCluster) -> Self {
        let answered = None;
        Self {
            id,
            foretold,
            cluster,
            answered,
        }
    }

    pub(super) fn prefilled(&self, now: Instant) {
        self.cluster.lock().prefilled(self.id, now);
    }

    /// What was predicted of it.
    pub(super) fn prediction(&self) -> &Prediction {
        &self.foretold.prediction
    }

    /// Its nodes have told what it took.
    pub(super) fn completed(&self, measured: &Measured) {
        self.cluster.lock().completed(&self.foretold, measured);
    }

    pub(super) fn answered(&mut self, tokens: u64) {
        self.answered = Some(tokens);
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.cluster.lock().ended(self.id, self.answered);
    }
}

impl Attempt {
    /// Calls the decode node. `silence_max` bounds its answer, `deadline` is the request's.
    pub(super) async fn open(
        channels: &node::Channels,
        nodes: Nodes,
        placed: Placed,
        mut request: v1::DecodeRequest,
        trace: TraceParent,
        silence_max: Duration,
        deadline: Instant,
    ) -> Result<Self, (Nodes, Failure)> {
        let decode = &nodes.decode;
        let channel = match channels.get(&decode.grpc_endpoint) {
            Ok(channel) => channel,
            Err(error) => return Err((nodes, Failure::broken(error))),
        };
        request.deadline_ms = left(deadline).as_millis() as u64;
        let mut client = DecodeClient::new(channel).max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
        let placed_at = Instant::now();
        let mut call = tonic::Request::new(request);
        proto::trace::write(call.metadata_mut(), trace);
        let failure = match tokio::time::timeout(silence_max, client.decode(call)).await {
            Ok(Ok(response)) => {
                return Ok(Self {
                    nodes,
                    placed,
                    placed_at,
                    tokens: 0,
                    stream: response.into_inner(),
                });
            }
            Ok(Err(status)) => Failure::of(decode, &status),
            Err(_) => Failure::broken(silent(&decode.id, silence_max)),
        };
        Err((nodes, failure))
    }

    /// The next event. A stream that ends without `finished` is a broken one.
    pub(super) async fn receive(&mut self, silence_max: Duration) -> Result<Event, Failure> {
        let decode = &self.nodes.decode;
        match tokio::time::timeout(silence_max, self.stream.message()).await {
            Ok(Ok(Some(v1::DecodeEvent { event: Some(event) }))) => Ok(event),
            Ok(Ok(Some(v1::DecodeEvent { event: None }))) => {
                let message = format!("{} sent an event of an unknown kind", decode.id);
                Err(Failure::broken(Error::unavailable(message)))
            }
            Ok(Ok(None)) => {
                let message = format!("{} ended the stream before the request", decode.id);
                Err(Failure::broken(Error::unavailable(message)))
            }
            Ok(Err(status)) => Err(Failure::of(decode, &status)),
            Err(_) => Err(Failure {
                error: silent(&decode.id, silence_max),
                sign: Sign::Silent,
            }),
        }
    }
}

/// The call's message but for the time that is left.
pub(super) fn decode_request(
    assignment: &Assignment,
    kv_root: types::BlockHash,
    request: &crate::request::Prepared,
    generated: &[types::Token],
) -> v1::DecodeRequest {
    let prefill = assignment.prefill.as_ref().map(|node| v1::PrefillPlacement {
        node_id: node.id.to_string(),
        grpc_endpoint: node.grpc_endpoint.clone(),
        epoch: node.epoch.0,
    });
    let sources = assignment.sources.iter().map(|(node, blocks)| v1::PrefixSource {
        node_id: node.id.to_string(),
        grpc_endpoint: node.grpc_endpoint.clone(),
        blocks: *blocks as u64,
    });
    v1::DecodeRequest {
        request_id: request.id.to_string(),
        kv_root: kv_root.0.to_vec(),
        prompt: request.prompt.clone(),
        resumed: generated.to_vec(),
        sampling: Some(proto::convert::sampling_to_wire(&request.sampling)),
        prefill,
        sources: sources.collect(),
        deadline_ms: 0,
        tenant: request.tenant.clone(),
        tbt_slo_ms: request.terms.slo.tbt.map_or(0.0, |limit| limit.0),
    }
}
