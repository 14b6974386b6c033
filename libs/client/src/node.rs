//! What every node says of itself.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::node_client::NodeClient;
use tonic::Streaming;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use types::{Error, LoadReport, NodeRecord, Role};

use crate::call::{self, UNARY_DEADLINE};

/// Client of `perigee.v1.Node`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Node {
    client: NodeClient<Channel>,
    health: HealthClient<Channel>,
    deadline: Duration,
}

/// Who a node is.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// Its entry in the registry.
    pub record: NodeRecord,
    /// The version of its program.
    pub version: String,
    /// What its clock showed when it answered, in milliseconds since 1970; `None` from nodes that do not say.
    pub unix_time_ms: Option<u64>,
}

impl Node {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self {
            health: HealthClient::new(channel.clone()),
            client: NodeClient::new(channel).max_decoding_message_size(proto::MESSAGE_BYTES_MAX),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives unary calls, and the opening of streams, another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Asks who the node is.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time, or its record cannot be read.
    pub async fn info(&self) -> Result<NodeInfo, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::InfoRequest {}, self.deadline);
        let response = call::unary("Node/Info", self.deadline, client.info(request)).await?;
        Ok(NodeInfo {
            record: proto::convert::record(&response.record_json)?,
            version: response.version,
            unix_time_ms: (response.unix_time_ms > 0).then_some(response.unix_time_ms),
        })
    }

    /// Asks whether the node takes requests (`grpc.health.v1`). One that starts or drains does not.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time.
    pub async fn serving(&self) -> Result<bool, Error> {
        let mut client = self.health.clone();
        let request = call::request(HealthCheckRequest::default(), self.deadline);
        let response = call::unary("Health/Check", self.deadline, client.check(request)).await?;
        Ok(response.status() == ServingStatus::Serving)
    }

    /// Follows the node's load: a report at once, then one per `interval`; zero takes the node's own.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time.
    pub async fn watch_load(&self, interval: Duration) -> Result<LoadStream, Error> {
        let mut client = self.client.clone();
        let interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        let request = v1::WatchLoadRequest { interval_ms };
        let stream = call::unary(LoadStream::METHOD, self.deadline, client.watch_load(request)).await?;
        Ok(LoadStream { stream })
    }

    /// Tells the node to finish what it has and to take nothing new. Does not wait for the end of that.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time.
    pub async fn drain(&self) -> Result<(), Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::DrainRequest {}, self.deadline);
        call::unary("Node/Drain", self.deadline, client.drain(request)).await?;
        Ok(())
    }

    /// Tells the node to ask routers for nothing new.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time.
    pub async fn cordon(&self) -> Result<(), Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::CordonRequest {}, self.deadline);
        call::unary("Node/Cordon", self.deadline, client.cordon(request)).await?;
        Ok(())
    }

    /// Has the node take another role, and gives the one that it had. Its requests have `grace` to end there.
    ///
    /// # Errors
    ///
    /// `invalid` if it cannot have that role, `conflict` while it drains or flips already; it does not answer in time, which is
    /// `grace` and this client's deadline, or fails to work in that role.
    pub async fn flip(&self, to: Role, grace: Duration) -> Result<Role, Error> {
        const METHOD: &str = "Node/Flip";
        let mut client = self.client.clone();
        let wire = v1::FlipRequest {
            role: to.as_str().to_owned(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        };
        let deadline = self.deadline.saturating_add(grace);
        let request = call::request(wire, deadline);
        let response = call::unary(METHOD, deadline, client.flip(request)).await?;
        Role::parse(&response.role)
            .ok_or_else(|| Error::internal(format!("{METHOD} answered with a role {:?}", response.role)))
    }

    /// Tells a node that was drained or cordoned to take requests again.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time, ends, or is quarantined.
    pub async fn resume(&self) -> Result<(), Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::ResumeRequest {}, self.deadline);
        call::unary("Node/Resume", self.deadline, client.resume(request)).await?;
        Ok(())
    }

    /// Changes what the node logs, and says what that is then.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time, or cannot read the filter.
    pub async fn log_level(&self, change: LogChange) -> Result<LogLevel, Error> {
        let mut client = self.client.clone();
        let wire = match change {
            LogChange::Stay => v1::LogLevelRequest::default(),
            LogChange::Set(filter, lasts) => v1::LogLevelRequest {
                filter,
                for_ms: lasts.map_or(0, |lasts| u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX)),
                revert: false,
            },
            LogChange::Revert => v1::LogLevelRequest {
                revert: true,
                ..v1::LogLevelRequest::default()
            },
        };
        let request = call::request(wire, self.deadline);
        let response = call::unary("Node/LogLevel", self.deadline, client.log_level(request)).await?;
        Ok(LogLevel {
            filter: response.filter,
            configured: response.configured,
            reverts_in: (response.reverts_in_ms > 0).then(|| Duration::from_millis(response.reverts_in_ms)),
        })
    }
}

/// What a process logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLevel {
    /// Levels by module.
    pub filter: String,
    /// The process's own setting.
    pub configured: String,
    /// When that holds again; `None` if it does.
    pub reverts_in: Option<Duration>,
}

/// What becomes of what a process logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogChange {
    /// Nothing.
    Stay,
    /// Levels by module, for a while: ten minutes if it is not said for how long.
    Set(String, Option<Duration>),
    /// The process's own setting holds again.
    Revert,
}

/// Reports of one node.
#[derive(Debug)]
pub struct LoadStream {
    stream: Streaming<v1::LoadReport>,
}

impl LoadStream {
    const METHOD: &str = "Node/WatchLoad";

    /// The next report; `None` when the node ends the stream because it shuts down. Cancel safe.
    ///
    /// # Errors
    ///
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<LoadReport>, Error> {
        let report = call::next(Self::METHOD, &mut self.stream, None).await?;
        Ok(report.as_ref().map(proto::convert::load))
    }
}
