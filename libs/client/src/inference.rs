//! The front door.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::inference_client::InferenceClient;
use tokio::time::Instant;
use tonic::Streaming;
use types::{Error, FinishReason, LoadReport, NodeRecord, RequestId};

use crate::call::{self, UNARY_DEADLINE};
use crate::decode::finish_reason;

const GENERATE: &str = "Inference/Generate";

/// Client of `perigee.v1.Inference`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Inference {
    client: InferenceClient<Channel>,
    deadline: Duration,
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerateEvent {
    /// It was placed. The first event.
    Accepted {
        /// Its id, made by the router if the client gave none.
        request_id: RequestId,
        /// The model that serves it.
        model: String,
        /// Tokens of the prompt as the model counts them.
        prompt_tokens: u64,
    },
    /// Tokens, with the text they complete.
    Tokens(v1::TokenChunk),
    /// The last event.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// Tokens of prompt and output.
        usage: v1::Usage,
        /// Where and how it was served.
        report: v1::RequestReport,
    },
}

/// The cluster as one router sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterStatus {
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
    /// Requests that run.
    pub requests_running: u64,
    /// Requests that wait.
    pub requests_waiting: u64,
}

/// A node as one router sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeStatus {
    /// Its entry in the registry.
    pub record: NodeRecord,
    /// Its last report; `None` until the first one.
    pub load: Option<LoadReport>,
    /// Whether the router's streams from it are alive.
    pub connected: bool,
    /// Blocks of it that the router's index knows.
    pub indexed_blocks: u64,
}

impl Inference {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        let client = InferenceClient::new(channel);
        Self {
            client: client
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives unary calls another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Generates text. `deadline` bounds the whole of it, to the last event, on both sides. Dropping the stream cancels
    /// the request.
    ///
    /// # Errors
    ///
    /// The router cannot be reached, or refuses the request.
    pub async fn generate(
        &self,
        request: v1::GenerateRequest,
        deadline: Duration,
    ) -> Result<GenerateStream, Error> {
        let mut client = self.client.clone();
        let until = Instant::now().checked_add(deadline);
        let request = call::request(request, deadline);
        let stream = call::unary(GENERATE, deadline, client.generate(request)).await?;
        Ok(GenerateStream {
            stream: Some(stream),
            until,
        })
    }

    /// The models that can be named now.
    ///
    /// # Errors
    ///
    /// The router cannot be reached in time.
    pub async fn list_models(&self) -> Result<Vec<v1::ModelInfo>, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::ListModelsRequest {}, self.deadline);
        let response =
            call::unary("Inference/ListModels", self.deadline, client.list_models(request)).await?;
        Ok(response.models)
    }

    /// The nodes and their load.
    ///
    /// # Errors
    ///
    /// The router cannot be reached in time, or what it says cannot be read.
    pub async fn cluster_status(&self) -> Result<ClusterStatus, Error> {
        const METHOD: &str = "Inference/ClusterStatus";
        let mut client = self.client.clone();
        let request = call::request(v1::ClusterStatusRequest {}, self.deadline);
        let response = call::unary(METHOD, self.deadline, client.cluster_status(request)).await?;
        let nodes = response.nodes.iter().map(node_status);
        Ok(ClusterStatus {
            nodes: nodes.collect::<Result<_, _>>()?,
            requests_running: response.requests_running,
            requests_waiting: response.requests_waiting,
        })
    }
}

fn node_status(wire: &v1::NodeStatus) -> Result<NodeStatus, Error> {
    let load = match wire.load_json.as_str() {
        "" => None,
        json => {
            let load = serde_json::from_str(json);
            Some(load.map_err(|error| Error::internal(format!("load report cannot be read: {error}")))?)
        }
    };
    Ok(NodeStatus {
        record: proto::convert::record(&wire.record_json)?,
        load,
        connected: wire.connected,
        indexed_blocks: wire.indexed_blocks,
    })
}

/// The events of one request.
#[derive(Debug)]
pub struct GenerateStream {
    /// `None` after the last event.
    stream: Option<Streaming<v1::GenerateResponse>>,
    until: Option<Instant>,
}

impl GenerateStream {
    /// The next event; `None` only after [`GenerateEvent::Finished`]. Cancel safe.
    ///
    /// # Errors
    ///
    /// What the request ended with, a broken connection (`unavailable`), or the deadline. Nothing follows.
    pub async fn next(&mut self) -> Result<Option<GenerateEvent>, Error> {
        let Some(stream) = &mut self.stream else {
            return Ok(None);
        };
        let event = match call::next(GENERATE, stream, self.until).await {
            Ok(Some(event)) => read(event),
            Ok(None) => Err(call::cut_off(GENERATE)),
            Err(error) => Err(error),
        };
        let goes_on = matches!(
            event,
            Ok(GenerateEvent::Accepted { .. } | GenerateEvent::Tokens(_))
        );
        if !goes_on {
            self.stream = None;
        }
        event.map(Some)
    }
}

fn read(response: v1::GenerateResponse) -> Result<GenerateEvent, Error> {
    match response.event.ok_or_else(|| call::empty(GENERATE))? {
        Event::Accepted(accepted) => Ok(GenerateEvent::Accepted {
            request_id: proto::convert::request_id(&accepted.request_id)?,
            model: accepted.model,
            prompt_tokens: accepted.prompt_tokens,
        }),
        Event::Tokens(tokens) => Ok(GenerateEvent::Tokens(tokens)),
        Event::Finished(finished) => Ok(GenerateEvent::Finished {
            reason: finish_reason(GENERATE, &finished.reason)?,
            usage: finished.usage.unwrap_or_default(),
            report: finished.report.unwrap_or_default(),
        }),
    }
}
