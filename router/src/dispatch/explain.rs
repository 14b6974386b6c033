//! Where a request would be placed, without placing it.

use std::time::Instant;

use types::{Millis, Slo};

use super::latency::millis;
use super::{Dispatcher, asks, unix_ms};
use crate::admission::{Admission, Forecast, Rejection};
use crate::cluster::Query;
use crate::decisions::{Decision, Foreseen, Subject};
use crate::error::RequestError;
use crate::placement::{Candidate, NoPlacement};
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
        let prepared = self.prepare(request).await?;
        let Prepared {
            prompt,
            terms,
            tenant,
            received,
            sampling,
            ..
        } = &prepared;
        let space = self.shared.cluster.lock().kv_space();
        let space = space.ok_or_else(|| NoPlacement { excluded: Vec::new() })?;
        let began = Instant::now();
        let (hashes, key) = request::hashes(&space, tenant, prompt);
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
                    .map(|limit| Millis((limit.0 - millis(*received, began).0).max(0.0))),
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
            tenant: tenant.clone(),
            tie,
            took: millis(began, Instant::now()),
        };
        let decision = Decision::whole(subject, explained?);
        let admission = self.foresee(&prepared, decision.choice());
        Ok(decision.admitted(admission))
    }

    /// How admission would take `request` if nodes served it by `choice`. A request that is sent is judged twice, by its wait
    /// before it waits and by its placement after; here by both at once.
    fn foresee(&self, request: &Prepared, choice: &Candidate) -> Foreseen {
        let placed = Forecast::of(choice, self.shared.config.decode_load);
        let foreseen = self.shared.gate.foresee(&asks(request));
        let wait = match foreseen {
            Ok(wait) | Err(Rejection::QueueFull { wait, .. }) => wait,
            Err(_) => Millis(0.0),
        };
        let forecast = Forecast {
            ttft: wait + placed.ttft,
            ..placed
        };
        let waited = request.received.elapsed();
        let judged = foreseen.and_then(|_| Admission::judge(forecast, waited, request.terms.slo));
        Foreseen {
            wait,
            ttft: forecast.ttft,
            rejection: judged.err(),
        }
    }
}
