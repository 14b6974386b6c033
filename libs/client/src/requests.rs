//! The requests of a router: those that run, and the last ones that ended.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::requests_client::RequestsClient;
use types::{Error, RequestId};

use crate::call::{self, UNARY_DEADLINE};

/// Client of `perigee.v1.Requests`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Requests {
    client: RequestsClient<Channel>,
    deadline: Duration,
}

/// A request and its way, as `perigee.v1.RequestTimeline` documents it.
pub type RequestTimeline = v1::RequestTimeline;

/// One of its placements, as `perigee.v1.PlacementTimeline` documents it.
pub type PlacementTimeline = v1::PlacementTimeline;

/// A part of its way, as `perigee.v1.TimelineSpan` documents it.
pub type TimelineSpan = v1::TimelineSpan;

impl Requests {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        let client = RequestsClient::new(channel);
        Self {
            client: client.max_decoding_message_size(proto::MESSAGE_BYTES_MAX),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives calls another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Those that run, then those that ended unless only `running` ones are wanted; newest first, at most `count`, or 256, which
    /// an answer never exceeds. Without the parts of their way.
    ///
    /// # Errors
    ///
    /// The router cannot be reached in time.
    pub async fn list(&self, running: bool, count: Option<u32>) -> Result<Vec<RequestTimeline>, Error> {
        let mut client = self.client.clone();
        let wire = v1::ListRequestsRequest {
            running,
            count: count.unwrap_or(0),
        };
        let request = call::request(wire, self.deadline);
        let response = call::unary("Requests/List", self.deadline, client.list(request)).await?;
        Ok(response.requests)
    }

    /// The requests of that name, newest first; at least one.
    ///
    /// # Errors
    ///
    /// `not_found` if none runs or is kept; the router cannot be reached in time.
    pub async fn show(&self, id: RequestId) -> Result<Vec<RequestTimeline>, Error> {
        const METHOD: &str = "Requests/Show";
        let mut client = self.client.clone();
        let wire = v1::ShowRequestRequest {
            request_id: id.to_string(),
        };
        let request = call::request(wire, self.deadline);
        let response = call::unary(METHOD, self.deadline, client.show(request)).await?;
        match response.requests.is_empty() {
            true => Err(call::empty(METHOD)),
            false => Ok(response.requests),
        }
    }

    /// Ends what runs under that name. Does not wait until it has ended.
    ///
    /// # Errors
    ///
    /// `not_found` if nothing runs under that name; the router cannot be reached in time.
    pub async fn cancel(&self, id: RequestId) -> Result<u32, Error> {
        let mut client = self.client.clone();
        let wire = v1::CancelRequestRequest {
            request_id: id.to_string(),
        };
        let request = call::request(wire, self.deadline);
        let response = call::unary("Requests/Cancel", self.deadline, client.cancel(request)).await?;
        Ok(response.requests)
    }
}
