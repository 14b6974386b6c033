//! What the router decided, and why, over gRPC: `perigee.v1.Routing`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, stream};
use proto::convert;
use proto::status::{to_failure, to_status};
use proto::v1;
use proto::v1::explain_request::Input as WireInput;
use proto::v1::routing_server::{Routing, RoutingServer};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use types::{Error, ErrorCode, Priority, RequestId, SamplingParams};

use crate::decisions::{Decision, Ending, Foreseen, Kept, Outcome, reason};
use crate::dispatch::Dispatcher;
use crate::error::RequestError;
use crate::grpc::{messages, no_input, slo};
use crate::placement::{Candidate, Exclusion, Objection};
use crate::request::{self, Input, MaxTokens};

/// Most decisions in one answer: with 64 candidates each some 5 MiB, well within a message.
const LISTED_MAX: usize = 256;

/// Answers that are being put together at a time, each on a thread of its own.
const ANSWERING_MAX: usize = 2;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    dispatcher: Dispatcher,
    /// Ends what is watched, which would end by nothing else.
    shutdown: CancellationToken,
    answering: Arc<Semaphore>,
}

impl Service {
    pub(crate) fn server(dispatcher: Dispatcher, shutdown: CancellationToken) -> RoutingServer<Self> {
        let service = Self {
            dispatcher,
            shutdown,
            answering: Arc::new(Semaphore::new(ANSWERING_MAX)),
        };
        RoutingServer::new(service)
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// Does `work` beside the runtime, which thousands of candidates would hold up for milliseconds.
    async fn answer<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        let _answering = self.answering.acquire().await;
        let answer = node::task::blocking("perigee-explain", work).await;
        answer.map_err(|error| to_status(&error))
    }
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchDecisionsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Routing for Service {
    type WatchDecisionsStream = WatchStream;

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let request = read(&self.dispatcher, request.into_inner(), Instant::now());
        let decision = self
            .dispatcher
            .explain(request.map_err(|error| to_status(&error))?);
        let decision = decision.await?;
        let decision = self.answer(move || to_wire(0, &decision, None)).await?;
        Ok(Response::new(v1::ExplainResponse {
            decision: Some(decision),
        }))
    }

    async fn list_decisions(
        &self,
        request: Request<v1::ListDecisionsRequest>,
    ) -> Result<Response<v1::ListDecisionsResponse>, Status> {
        let v1::ListDecisionsRequest { request_id, count } = request.into_inner();
        let id = match request_id.as_str() {
            "" => None,
            text => Some(convert::request_id(text).map_err(|error| to_status(&error))?),
        };
        let count = match count {
            0 => LISTED_MAX,
            count => LISTED_MAX.min(count as usize),
        };
        let kept = self.dispatcher.recorder().newest(id, count);
        if let Some(id) = id.filter(|_| kept.is_empty()) {
            return Err(to_status(&unknown(id, self.dispatcher.config().decisions_kept)));
        }
        let decisions = self.answer(move || kept.iter().map(kept_to_wire).collect());
        let decisions = decisions.await?;
        Ok(Response::new(v1::ListDecisionsResponse { decisions }))
    }

    async fn watch_decisions(
        &self,
        _: Request<v1::WatchDecisionsRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let news = self.dispatcher.recorder().watch();
        let watching = (news, self.shutdown.clone());
        Ok(Response::new(Box::pin(stream::unfold(watching, next))))
    }
}

type Watching = (Receiver<Kept>, CancellationToken);

async fn next(
    (mut news, shutdown): Watching,
) -> Option<(Result<v1::WatchDecisionsResponse, Status>, Watching)> {
    let mut missed = 0;
    loop {
        let received = tokio::select! {
            biased;
            () = shutdown.cancelled() => return None,
            received = news.recv() => received,
        };
        match received {
            Ok(kept) => {
                let response = v1::WatchDecisionsResponse {
                    decision: Some(kept_to_wire(&kept)),
                    missed,
                };
                return Some((Ok(response), (news, shutdown)));
            }
            Err(RecvError::Lagged(count)) => missed += count,
            Err(RecvError::Closed) => return None,
        }
    }
}

fn unknown(id: RequestId, kept: usize) -> Error {
    let message = format!("no decision of request {id} is among the last {kept} of this router");
    Error::new(ErrorCode::NotFound, message)
}

/// Reads the wire form. What only the model can tell is checked later, by [`request::prepare`].
fn read(
    dispatcher: &Dispatcher,
    wire: v1::ExplainRequest,
    received: Instant,
) -> Result<request::Request, Error> {
    let v1::ExplainRequest {
        model,
        input,
        ttft_slo_ms,
        tbt_slo_ms,
        tenant,
    } = wire;
    let input = match input {
        None => return Err(no_input()),
        Some(WireInput::Prompt(text)) => Input::Text(text),
        Some(WireInput::Tokens(tokens)) => Input::Tokens(tokens.ids),
        Some(WireInput::Chat(chat)) => Input::Chat(messages(chat.messages)?),
    };
    Ok(request::Request {
        id: dispatcher.request_id(),
        model,
        input,
        sampling: SamplingParams::default(),
        max_tokens: MaxTokens::Context,
        slo: slo(ttft_slo_ms, tbt_slo_ms),
        tenant,
        priority: Priority::default(),
        received,
        trace: None,
        time_limit: None,
    })
}

fn kept_to_wire(kept: &Kept) -> v1::Decision {
    to_wire(kept.number, &kept.decision, Some(kept.outcome))
}

fn to_wire(number: u64, decision: &Decision, outcome: Option<Outcome>) -> v1::Decision {
    let excluded = decision.excluded.iter().map(|(node, why)| v1::ExcludedNode {
        node: node.to_string(),
        reason: exclusion(*why).to_owned(),
    });
    v1::Decision {
        number,
        request_id: decision.request.map_or_else(String::new, |id| id.to_string()),
        made_unix_ms: decision.made_unix_ms,
        tenant: decision.tenant.clone(),
        prompt_tokens: decision.prompt_tokens,
        policy: decision.policy.to_owned(),
        candidates: decision.candidates.iter().map(candidate).collect(),
        candidates_left_out: decision.candidates_left_out as u64,
        excluded: excluded.collect(),
        excluded_left_out: decision.excluded_left_out as u64,
        reason: reason(decision),
        decision_ms: decision.took.0,
        outcome: outcome.map(|outcome| v1::PlacementOutcome {
            state: outcome.ending.map_or("running", Ending::as_str).to_owned(),
            ttft_ms: outcome.ttft.unwrap_or_default().0,
        }),
        admission: decision.admission.map(admission),
    }
}

fn admission(foreseen: Foreseen) -> v1::ForeseenAdmission {
    let Foreseen {
        wait,
        ttft,
        rejection,
    } = foreseen;
    v1::ForeseenAdmission {
        wait_ms: wait.0,
        ttft_ms: ttft.0,
        rejection: rejection.map(|rejection| to_failure(&RequestError::from(rejection).to_error())),
    }
}

fn candidate(candidate: &Candidate) -> v1::PlacementCandidate {
    let prediction = &candidate.prediction;
    let sources = candidate.sources.iter().map(|source| v1::PlacementSource {
        node: source.node.to_string(),
        blocks: source.blocks as u64,
    });
    v1::PlacementCandidate {
        prefill_node: candidate
            .prefill
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        decode_node: candidate.decode.to_string(),
        sources: sources.collect(),
        new_tokens: candidate.new_tokens,
        decode_blocks: candidate.decode_blocks,
        queue_ms: prediction.queue.0,
        promote_ms: prediction.promote.0,
        fetch_ms: prediction.fetch.0,
        compute_ms: prediction.compute.0,
        handoff_ms: prediction.handoff.0,
        ttft_ms: prediction.total.0,
        tbt_ms: candidate.tbt.0,
        interference_charge_ms: candidate.interference_charge.0,
        gap_charge_ms: candidate.gap_charge.0,
        score_ms: candidate.score.0,
        objection: candidate.objection.map_or("", objection).to_owned(),
    }
}

fn objection(objection: Objection) -> &'static str {
    match objection {
        Objection::MissesTbt => "misses_tbt",
        Objection::MissesTtft => "misses_ttft",
        Objection::ShortOfBlocks => "short_of_blocks",
        Objection::LocalPrefillTooLong => "local_prefill_too_long",
    }
}

fn exclusion(exclusion: Exclusion) -> &'static str {
    match exclusion {
        Exclusion::Unreachable => "unreachable",
        Exclusion::Draining => "draining",
        Exclusion::Cordoned => "cordoned",
        Exclusion::FailedBefore => "failed_before",
        Exclusion::ContextTooSmall => "context_too_small",
    }
}
