//! The way of a sequence: from its landing to its last token, step by step.

use std::mem;

use router::cost::learning::Measured;
use types::Millis;

use super::node::{Landing, Prefill, Sequence, Step, Visit};
use super::outcome::{Outcome, Served};
use super::{CHUNK_TOKENS, Kind, Simulation, ms, ns};
use crate::report::tail_mean;

impl Simulation<'_> {
    /// A prompt has landed, and gets blocks when there are some.
    pub(super) fn lands(&mut self, node: usize, visit: Visit) {
        if self.is_too_full(node) {
            return self.end(visit.request, Outcome::Rejected);
        }
        let (request, state) = (&self.requests[visit.request], &self.states[visit.request]);
        let landing = Landing {
            visit,
            tokens: request.prompt_tokens + state.generated,
            left: self.left_tokens(visit.request),
        };
        self.nodes[node].batch.waiting.push_back(landing);
        self.admit(node);
        self.start_step(node);
    }

    /// Whether one more sequence would break the limit on gaps, where nodes turn prompts away for that.
    fn is_too_full(&self, node: usize) -> bool {
        let (limits, batch) = (&self.scenario.slo, &self.nodes[node].batch);
        let sequences = (batch.sequences() + batch.waiting.len()) as u64;
        limits.at_decode && self.profile.step_ms(sequences + 1, batch.resident_tokens) > limits.tbt_ms
    }

    fn admit(&mut self, node: usize) {
        let now = self.instant();
        while let Some(landing) = self.nodes[node].batch.waiting.front().copied() {
            let visit = landing.visit;
            if !self.is_current(visit) {
                self.nodes[node].batch.waiting.pop_front();
                continue;
            }
            let chain = &self.requests[visit.request].chain;
            let blocks = self.blocks(landing.tokens + landing.left);
            let pool = &mut self.nodes[node].pool;
            let mut held = pool.begin(chain, now);
            let (free, evictable) = pool.free_and_evictable();
            if (blocks - held.blocks()) as u64 > free + evictable {
                pool.release(held, now);
                return;
            }
            pool.extend(&mut held, chain, chain.len(), now);
            let rest = blocks - held.blocks();
            if !pool.reserve(&mut held, rest, now) {
                pool.release(held, now);
                return;
            }
            self.nodes[node].batch.waiting.pop_front();
            self.plan_log(node);
            self.join(node, visit, landing.tokens, landing.left, held);
        }
    }

    /// The first token of a placement is out; the sequence decodes from the next step on.
    fn join(&mut self, node: usize, visit: Visit, tokens: u64, left: u64, held: crate::pool::Held) {
        self.token(visit.request);
        if left <= 1 {
            let now = self.instant();
            self.nodes[node].pool.release(held, now);
            self.finish(visit.request);
            return;
        }
        self.nodes[node].batch.joining.push(Sequence {
            visit,
            left: left - 1,
            tokens: tokens + 1,
            held,
        });
    }

    pub(super) fn start_step(&mut self, node: usize) {
        if self.nodes[node].batch.step.is_some() {
            return;
        }
        let batch = &mut self.nodes[node].batch;
        let joining = mem::take(&mut batch.joining);
        batch.resident_tokens += joining.iter().map(|sequence| sequence.tokens).sum::<u64>();
        batch.running.extend(joining);
        let chunk = self.next_chunk(node);
        let batch = &mut self.nodes[node].batch;
        let decodes = !batch.running.is_empty();
        if !decodes && chunk.is_none() {
            return;
        }
        let mut step_ms = 0.0;
        if decodes {
            let sequences = batch.running.len() as u64;
            step_ms += self.profile.step_ms(sequences, batch.resident_tokens);
        }
        let chunk_ms = chunk.map_or(0.0, |(_, from, tokens)| {
            self.profile.prefill_ms(from + tokens, from)
        });
        let ms = step_ms + chunk_ms;
        batch.step = Some(Step {
            decodes,
            ms,
            chunk_ms,
            chunk: chunk.map(|(visit, _, tokens)| (visit, tokens)),
        });
        let at = self.at(node);
        self.plan(self.now_ns + ns(ms), Kind::Stepped(at));
    }

    /// The part of a prompt that is computed beside the next step: whose, from which position, how many tokens.
    fn next_chunk(&mut self, node: usize) -> Option<(Visit, u64, u64)> {
        let next = self.nodes[node].prefills.next_ready()?;
        if !self.claim(node, next) {
            return None;
        }
        let now_ns = self.now_ns;
        let prefill = &mut self.nodes[node].prefills.waiting[next];
        if prefill.done_tokens == 0 {
            prefill.starts_ns = now_ns;
        }
        let from = prefill.cached_tokens + prefill.done_tokens;
        Some((prefill.visit, from, prefill.left_tokens().min(CHUNK_TOKENS)))
    }

    /// Takes the blocks of a prompt that is prefilled here, before its first chunk.
    fn claim(&mut self, node: usize, waiting: usize) -> bool {
        let now = self.instant();
        let prefill = &self.nodes[node].prefills.waiting[waiting];
        if prefill.done_tokens > 0 {
            return true;
        }
        let blocks = self.blocks(prefill.prompt_tokens + self.left_tokens(prefill.visit.request));
        let node = &mut self.nodes[node];
        let prefill = &mut node.prefills.waiting[waiting];
        let rest = blocks - prefill.held.blocks();
        node.pool.reserve(&mut prefill.held, rest, now)
    }

    pub(super) fn stepped(&mut self, node: usize) {
        let batch = &mut self.nodes[node].batch;
        let Some(step) = batch.step.take() else { return };
        if step.decodes {
            batch.stepped(step.ms);
        }
        let running = mem::take(&mut batch.running);
        let mut resident_tokens = 0;
        let mut staying = Vec::with_capacity(running.len());
        for mut sequence in running {
            let request = sequence.visit.request;
            sequence.left -= 1;
            sequence.tokens += 1;
            self.token(request);
            self.nodes[node].totals.decoded += 1;
            if sequence.left == 0 {
                let now = self.instant();
                self.nodes[node].pool.release(sequence.held, now);
                self.finish(request);
            } else {
                resident_tokens += sequence.tokens;
                staying.push(sequence);
            }
        }
        let batch = &mut self.nodes[node].batch;
        batch.running = staying;
        batch.resident_tokens = resident_tokens;
        if let Some((visit, tokens)) = step.chunk {
            self.chunk_done(node, visit, tokens, step.chunk_ms);
        }
        self.admit(node);
        self.plan_log(node);
        self.start_step(node);
    }

    fn chunk_done(&mut self, node: usize, visit: Visit, tokens: u64, chunk_ms: f64) {
        let now = self.instant();
        let waiting = &mut self.nodes[node].prefills.waiting;
        let Some(position) = waiting.iter().position(|prefill| prefill.visit == visit) else {
            return;
        };
        waiting[position].done_tokens += tokens;
        self.states[visit.request].served.compute_ms += chunk_ms;
        self.nodes[node].totals.prefill_ms += chunk_ms;
        if self.nodes[node].prefills.waiting[position].left_tokens() > 0 {
            return;
        }
        let Some(Prefill {
            prompt_tokens,
            mut held,
            starts_ns,
            ..
        }) = self.nodes[node].prefills.waiting.remove(position)
        else {
            return;
        };
        self.nodes[node].totals.prefills += 1;
        let state = &mut self.states[visit.request];
        state.measured.queue = Millis(ms(starts_ns.saturating_sub(state.placed_ns)));
        state.measured.compute = Millis(ms(self.now_ns - starts_ns));
        let left = self.left_tokens(visit.request);
        let chain = &self.requests[visit.request].chain;
        self.nodes[node].pool.settle(&mut held, chain, now);
        self.join(node, visit, prompt_tokens, left, held);
    }

    /// Tokens that the request is still to generate.
    fn left_tokens(&self, request: usize) -> u64 {
        let generated = self.states[request].generated;
        self.requests[request]
            .output_tokens
            .saturating_sub(generated)
            .max(1)
    }

    /// A token of the request is out.
    fn token(&mut self, request: usize) {
        let state = &mut self.states[request];
        if state.generated == 0 {
            state.first_ns = self.now_ns;
        } else {
            state.gaps_ms.push(ms(self.now_ns - state.last_ns) as f32);
        }
        state.generated += 1;
        state.last_ns = self.now_ns;
        if let Some(placement) = &mut state.placement
            && !placement.landed
        {
            placement.landed = true;
            let now = self.begun + std::time::Duration::from_nanos(self.now_ns);
            self.routers[state.router].prefilled(placement.id, now);
        }
    }

    fn finish(&mut self, request: usize) {
        let state = &mut self.states[request];
        if let (Some(foretold), 1) = (&state.foretold, state.served.placements) {
            let ttft = Millis(ms(state.first_ns - state.placed_ns));
            let measured = Measured {
                ttft,
                ..state.measured
            };
            self.routers[state.router].completed(foretold, &measured);
        }
        let mut gaps_ms = mem::take(&mut state.gaps_ms);
        self.gaps_ms.extend_from_slice(&gaps_ms);
        let served = Served {
            ttft_ms: ms(state.first_ns) - self.requests[request].at.as_secs_f64() * 1e3,
            tbt_tail_ms: tail_mean(&mut gaps_ms),
            ..state.served.clone()
        };
        self.end(request, Outcome::Served(served));
    }
}
