//! Where a request would be placed, without placing it.

use std::time::Instant;

use types::{Millis, Slo};

use super::latency::millis;
use super::{Dispatcher, unix_ms};
use crate::cluster::Query;
use crate::decisions::{Decision, Subject};
use crate::error::RequestError;
use crate::placement::NoPlacement;
use crate::request::{self, Prepared, Request};
use crate::residents::Answer;

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
            terms,
            tenant,
            received,
            sampling,
            ..
        } = self.prepare(request).await?;
        let space = self.shared.cluster.lock().kv_space();
        let space = space.ok_or_else(|| NoPlacement { excluded: Vec::new() })?;
        let began = Instant::now();
        let (hashes, key) = request::hashes(&space, &tenant, &prompt);
        let answer = Answer {
            tenant: tenant.clone(),
            tokens: 0,
            tokens_max: u64::from(sampling.max_tokens),
        };
        let query = Query {
            key,
            hashes: &hashes,
            prompt_tokens: prompt.len() as u64,
            failed: &Default::default(),
            slo: Slo {
                ttft: terms
                    .slo
                    .ttft
                    .map(|limit| Millis((limit.0 - millis(received, began).0).max(0.0))),
                tbt: terms.slo.tbt,
            },
            answer: &answer,
            draw: self.shared.entropy.draw(),
        };
        let (explained, tie) = {
            let cluster = self.shared.cluster.lock();
            (cluster.explain(&space, &query, began), cluster.tie())
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
