//! Where a request would be placed, without placing it.

use std::time::Instant;

use types::Millis;

use super::latency::millis;
use super::{Dispatcher, unix_ms};
use crate::cluster::Query;
use crate::decisions::{Decision, Subject};
use crate::error::RequestError;
use crate::placement::NoPlacement;
use crate::request::{self, Prepared, Request};

impl Dispatcher {
    /// Where `request` would be placed now, with every candidate. It holds nothing but what any request does that is being
    /// tokenised, and takes the cluster's lock for as long as a placement does.
    ///
    /// # Errors
    ///
    /// The request is none that could be placed, or no node can take it.
    pub async fn explain(&self, request: Request) -> Result<Decision, RequestError> {
        let Prepared {
            prompt,
            slo,
            tenant,
            received,
            ..
        } = self.prepare(request).await?;
        let space = self.shared.cluster.lock().kv_space();
        let space = space.ok_or_else(|| NoPlacement { excluded: Vec::new() })?;
        let began = Instant::now();
        let (hashes, key) = request::hashes(&space, &tenant, &prompt);
        let query = Query {
            key,
            hashes: &hashes,
            prompt_tokens: prompt.len() as u64,
            failed: &Default::default(),
            slo: types::Slo {
                ttft: slo
                    .ttft
                    .map(|limit| Millis((limit.0 - millis(received, began).0).max(0.0))),
                tbt: slo.tbt,
            },
            draw: self.shared.entropy.draw(),
        };
        let (explained, tie) = {
            let cluster = self.shared.cluster.lock();
            (cluster.explain(&space, &query), cluster.tie())
        };
        let subject = Subject {
            request: None,
            made_unix_ms: unix_ms(),
            prompt_tokens: query.prompt_tokens,
            tenant,
            tie,
            took: millis(began, Instant::now()),
        };
        Ok(Decision::whole(subject, explained?))
    }
}
