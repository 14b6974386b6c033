//! Everything an operator can set on a router, with its default and the reason for it.

use std::collections::BTreeMap;

use node::config::{ByteSize, Duration};
use node::tls;
use serde::{Deserialize, Serialize};
use types::{Millis, Priority, Slo};

use crate::admission::Limits;
use crate::cost::Priors;
use crate::decisions::DECISIONS_KEPT_MAX;
use crate::index::ENTRIES_MAX_DEFAULT;
use crate::placement::{DecodeLoad, Settings};
use crate::policy::PolicyName;
use crate::requests::REQUESTS_KEPT_MAX;
use crate::tenants::{self, TENANTS_MAX, TenantSettings, Terms};

/// Configuration of a router.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// How one of the possible placements is picked.
    pub policy: PolicyName,
    /// Most new prompt tokens that a decode node prefills by itself while a prefill node could.
    pub local_prefill_tokens_max: u64,
    /// Milliseconds of a request's time to first token that one millisecond of delay of one other sequence is worth.
    pub interference_weight: f64,
    /// Milliseconds of time to first token that one millisecond of gap between tokens is worth.
    pub decode_gap_weight: f64,
    /// By which batch of a decode node the gaps of a request are judged.
    pub decode_load: DecodeLoad,
    /// How long a prompt may have to wait at a node. What would wait longer waits at the router, where more important requests
    /// overtake and nodes are chosen later.
    pub node_queue_max: Duration,
    /// Time to first token of requests that name none, and whose tenants name none; 0 is none.
    pub ttft_slo: Duration,
    /// Time between tokens, likewise.
    pub tbt_slo: Duration,
    /// Requests on nodes at a time.
    pub running_requests_max: usize,
    /// Prompt tokens of those.
    pub running_prompt_tokens_max: u64,
    /// Requests that wait for a place. More are turned away.
    pub waiting_requests_max: usize,
    /// Prompt tokens of those.
    pub waiting_prompt_tokens_max: u64,
    /// Requests that are being read and tokenised at a time. More are turned away.
    pub arriving_requests_max: usize,
    /// Time that a request has in all.
    pub request_deadline: Duration,
    /// Silence of a decode node, before the first token of a placement, after which it counts as lost.
    pub first_token_silence_max: Duration,
    /// Silence between tokens after which it counts as lost.
    pub token_silence_max: Duration,
    /// How long opening a decode node's stream may take.
    pub dispatch_deadline: Duration,
    /// How often a request is placed before it fails.
    pub placements_max: u32,
    /// How long a request waits for a node to appear while none can take it.
    pub placement_wait: Duration,
    /// (node, block) pairs in the prefix index.
    pub index_entries_max: usize,
    /// Decisions kept to be explained.
    pub decisions_kept: usize,
    /// Requests whose way is kept after they have ended.
    pub requests_kept: usize,
    /// Whether the live page is served at `/ui`.
    pub ui: bool,
    /// Longest body of an HTTP request.
    pub body_bytes_max: ByteSize,
    /// File of the API keys that count, which is read again when it changes. Empty asks no client for one.
    pub api_keys_file: String,
    /// Whether clients must show a certificate of the cluster, where there is TLS.
    pub client_certificates: ClientCertificates,
    /// What single tenants may ask, by name.
    pub tenants: BTreeMap<String, TenantSettings>,
}

/// Whether clients must show a certificate of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientCertificates {
    /// Who shows none is a client like any other.
    Optional,
    /// Who shows none may ask for the health alone.
    Required,
}

impl From<ClientCertificates> for tls::ClientCertificates {
    fn from(clients: ClientCertificates) -> Self {
        match clients {
            ClientCertificates::Optional => Self::Optional,
            ClientCertificates::Required => Self::Required,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let (settings, limits) = (Settings::default(), Limits::default());
        Self {
            policy: PolicyName::Perigee,
            local_prefill_tokens_max: settings.local_prefill_tokens_max,
            interference_weight: settings.interference_weight,
            decode_gap_weight: settings.decode_gap_weight,
            decode_load: settings.decode_load,
            // Some prompts: a node that is out of work for as long as a report takes has lost a fortieth of this.
            node_queue_max: Duration::from_secs(2),
            ttft_slo: Duration::from_secs(0),
            tbt_slo: Duration::from_secs(0),
            running_requests_max: limits.running_max,
            running_prompt_tokens_max: limits.running_prompt_tokens_max,
            waiting_requests_max: limits.waiting_max,
            waiting_prompt_tokens_max: limits.waiting_prompt_tokens_max,
            // Each may hold a body in memory; tokenising takes milliseconds, so these are many per second.
            arriving_requests_max: 256,
            // As the official clients of OpenAI's API.
            request_deadline: Duration::from_secs(600),
            // A long prompt behind other long prompts on a slow machine.
            first_token_silence_max: Duration::from_secs(180),
            // A decode step takes milliseconds, and a preempted sequence is prefilled again within seconds.
            token_silence_max: Duration::from_secs(60),
            // Nodes answer before they work; this covers the connection being made.
            dispatch_deadline: Duration::from_secs(10),
            // Two nodes may die under one request, and one may answer that it is full.
            placements_max: 4,
            // A restarted node is back within a second or two; a client rather waits that long than retries.
            placement_wait: Duration::from_secs(3),
            index_entries_max: ENTRIES_MAX_DEFAULT,
            // Seconds of a busy router, in some 5 MiB.
            decisions_kept: 256,
            // The last minute or so of a busy router, in some 3 MiB.
            requests_kept: 1_024,
            // It shows nothing of what clients say, and costs nothing while nobody looks.
            ui: true,
            // A context of a million tokens as text, or as a JSON list of ids.
            body_bytes_max: ByteSize::from_mib(16),
            // Whom a cluster on one machine serves, its user knows.
            api_keys_file: String::new(),
            // Clients of OpenAI's API have none.
            client_certificates: ClientCertificates::Optional,
            tenants: BTreeMap::new(),
        }
    }
}

/// A setting that makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// A bound of nothing lets nothing through.
    #[error("{0} must not be 0")]
    Zero(&'static str),
    /// A bound on memory that bounds nothing.
    #[error("{name} is {value}, but must be at most {max}")]
    TooMany {
        /// Which one.
        name: &'static str,
        /// As configured.
        value: usize,
        /// What it may be.
        max: usize,
    },
    /// Where traces go makes no sense.
    #[error("{0}")]
    Traces(#[from] types::Error),
    /// A weight is no finite, non-negative number.
    #[error("{name} is {value}, but must be a number that is not negative")]
    Weight {
        /// Which one.
        name: &'static str,
        /// As configured.
        value: f64,
    },
}

impl Config {
    /// Checks every setting.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let weights = [
            ("interference_weight", self.interference_weight),
            ("decode_gap_weight", self.decode_gap_weight),
        ];
        for (name, value) in weights {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::Weight { name, value });
            }
        }
        if self.tenants.len() > TENANTS_MAX {
            return Err(ConfigError::TooMany {
                name: "tenants",
                value: self.tenants.len(),
                max: TENANTS_MAX,
            });
        }
        if self.decisions_kept > DECISIONS_KEPT_MAX {
            return Err(ConfigError::TooMany {
                name: "decisions_kept",
                value: self.decisions_kept,
                max: DECISIONS_KEPT_MAX,
            });
        }
        if self.requests_kept > REQUESTS_KEPT_MAX {
            return Err(ConfigError::TooMany {
                name: "requests_kept",
                value: self.requests_kept,
                max: REQUESTS_KEPT_MAX,
            });
        }
        let bounds = [
            ("running_requests_max", self.running_requests_max as u64),
            ("running_prompt_tokens_max", self.running_prompt_tokens_max),
            ("arriving_requests_max", self.arriving_requests_max as u64),
            ("placements_max", u64::from(self.placements_max)),
            ("body_bytes_max", self.body_bytes_max.0),
            ("node_queue_max", u64::from(!self.node_queue_max.0.is_zero())),
            ("request_deadline", u64::from(!self.request_deadline.0.is_zero())),
            (
                "first_token_silence_max",
                u64::from(!self.first_token_silence_max.0.is_zero()),
            ),
            (
                "token_silence_max",
                u64::from(!self.token_silence_max.0.is_zero()),
            ),
            (
                "dispatch_deadline",
                u64::from(!self.dispatch_deadline.0.is_zero()),
            ),
        ];
        match bounds.into_iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(ConfigError::Zero(name)),
            None => Ok(()),
        }
    }

    /// The bounds of admission.
    pub fn limits(&self) -> Limits {
        Limits {
            running_max: self.running_requests_max,
            running_prompt_tokens_max: self.running_prompt_tokens_max,
            waiting_max: self.waiting_requests_max,
            waiting_prompt_tokens_max: self.waiting_prompt_tokens_max,
        }
    }

    /// The settings of placement.
    pub fn placement(&self) -> Settings {
        Settings {
            local_prefill_tokens_max: self.local_prefill_tokens_max,
            interference_weight: self.interference_weight,
            decode_gap_weight: self.decode_gap_weight,
            decode_load: self.decode_load,
            node_queue_max: Millis(self.node_queue_max.get().as_secs_f64() * 1e3),
            tie: Millis(1.0),
        }
    }

    /// What holds for a request of `tenant`.
    pub fn terms(&self, tenant: &str, priority: Priority, asked: Slo) -> Terms {
        let of_all = Slo {
            ttft: tenants::limit(self.ttft_slo),
            tbt: tenants::limit(self.tbt_slo),
        };
        tenants::terms(&self.tenants, of_all, tenant, priority, asked)
    }

    /// What is assumed of nodes that have not measured themselves.
    pub fn priors(&self) -> Priors {
        Priors::default()
    }
}
