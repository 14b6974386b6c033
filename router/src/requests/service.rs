//! The requests of this router over gRPC: `perigee.v1.Requests`.

use proto::convert;
use proto::status::to_status;
use proto::v1;
use proto::v1::requests_server::{Requests, RequestsServer};
use tonic::{Request, Response, Status};
use types::{Error, ErrorCode, Millis, RequestId};

use super::{Requests as Table, Snapshot};
use crate::timeline::{Part, PlacementTimes, parts};

/// Most requests in one answer: without spans some 100 KiB.
const LISTED_MAX: usize = 256;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    requests: Table,
}

impl Service {
    pub(crate) fn server(requests: Table) -> RequestsServer<Self> {
        RequestsServer::new(Self { requests })
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }
}

#[tonic::async_trait]
impl Requests for Service {
    async fn list(
        &self,
        request: Request<v1::ListRequestsRequest>,
    ) -> Result<Response<v1::ListRequestsResponse>, Status> {
        let v1::ListRequestsRequest { running, count } = request.into_inner();
        let count = match count {
            0 => LISTED_MAX,
            count => LISTED_MAX.min(count as usize),
        };
        let (live, ended) = self.requests.newest(count, if running { 0 } else { count });
        let listed = live.iter().chain(&ended).take(count);
        let requests = listed.map(|snapshot| to_wire(snapshot, false)).collect();
        Ok(Response::new(v1::ListRequestsResponse { requests }))
    }

    async fn show(
        &self,
        request: Request<v1::ShowRequestRequest>,
    ) -> Result<Response<v1::ShowRequestResponse>, Status> {
        let id = read_id(&request.into_inner().request_id)?;
        let found = self.requests.of_id(id);
        if found.is_empty() {
            let message = format!(
                "request {id} does not run, and is not among the last {} that ended at this router",
                self.requests.kept_max()
            );
            return Err(to_status(&Error::new(ErrorCode::NotFound, message)));
        }
        let shown = found.iter().take(LISTED_MAX);
        let requests = shown.map(|snapshot| to_wire(snapshot, true)).collect();
        Ok(Response::new(v1::ShowRequestResponse { requests }))
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequestRequest>,
    ) -> Result<Response<v1::CancelRequestResponse>, Status> {
        let id = read_id(&request.into_inner().request_id)?;
        match self.requests.cancel(id) {
            0 => {
                let message = format!("request {id} does not run at this router");
                Err(to_status(&Error::new(ErrorCode::NotFound, message)))
            }
            requests => {
                tracing::info!(request_id = %id, requests, "cancelled by an operator");
                let requests = requests as u32;
                Ok(Response::new(v1::CancelRequestResponse { requests }))
            }
        }
    }
}

fn read_id(text: &str) -> Result<RequestId, Status> {
    convert::request_id(text).map_err(|error| to_status(&error))
}

/// The wire form; with all parts of the way, if `whole`.
pub(crate) fn to_wire(snapshot: &Snapshot, whole: bool) -> v1::RequestTimeline {
    let Snapshot { timeline, now } = snapshot;
    let limit = |limit: Option<Millis>| limit.map_or(0.0, |limit| limit.0);
    let spans = match whole {
        true => parts(timeline, *now).into_iter().map(part).collect(),
        false => Vec::new(),
    };
    v1::RequestTimeline {
        request_id: timeline.arrival.request.to_string(),
        arrived_unix_ms: timeline.arrival.arrived_unix_ms,
        state: timeline.state().as_str().to_owned(),
        age_ms: timeline.age(*now).0,
        error: timeline.error.clone(),
        tenant: timeline.arrival.tenant.clone(),
        priority: timeline.arrival.priority.as_str().to_owned(),
        prompt_tokens: timeline.prompt_tokens,
        cached_tokens: timeline.cached_tokens,
        output_tokens: timeline.output_tokens,
        output_tokens_max: timeline.output_tokens_max,
        ttft_ms: limit(timeline.first_token),
        tbt_mean_ms: timeline.tbt_mean().0,
        ttft_slo_ms: limit(timeline.slo.ttft),
        tbt_slo_ms: limit(timeline.slo.tbt),
        trace_id: format!("{:032x}", timeline.arrival.root.trace),
        placements: timeline.placements.iter().map(placement).collect(),
        spans,
    }
}

fn placement(placement: &PlacementTimes) -> v1::PlacementTimeline {
    let told = &placement.told;
    v1::PlacementTimeline {
        prefill_node: placement
            .prefill
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        decode_node: placement.decode.to_string(),
        state: placement.state().as_str().to_owned(),
        ttft_predicted_ms: placement.ttft_predicted.0,
        ttft_ms: placement.ttft().map_or(0.0, |ttft| ttft.0),
        fetched_bytes: told.fetched_bytes,
        handoff_bytes: told.handoff_bytes,
        handoff_hidden_ms: told.handoff_hidden.0,
        handoff_exposed_ms: told.handoff_exposed.0,
        transport: told.transport.clone(),
    }
}

fn part(part: Part) -> v1::TimelineSpan {
    v1::TimelineSpan {
        name: part.name.into_owned(),
        node: part.node,
        depth: part.depth,
        start_ms: part.start.0,
        duration_ms: part.duration.0,
        running: part.running,
        bytes: part.bytes,
        detail: part.detail,
    }
}
