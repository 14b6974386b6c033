//! The way of a prompt: its prefix, its turn, its computation, and its landing on the decode node.

use router::cost::Priors;
use router::cost::learning::Moved;
use types::{Millis, Role};

use super::node::{Computing, Prefill, Visit};
use super::{Kind, Simulation, ms, ns};

impl Simulation<'_> {
    /// The prompt comes to a node, which takes what it holds of it and asks one peer for more.
    pub(super) fn queue_prefill(&mut self, request: usize, node: usize, sources: &[(usize, usize)]) {
        let now = self.instant();
        let chain = &self.requests[request].chain;
        let state = &self.states[request];
        let visit = Visit {
            request,
            attempt: state.attempt,
        };
        let prompt_tokens = self.requests[request].prompt_tokens + state.generated;
        let held = self.nodes[node].pool.begin(chain, now);
        let own = held.blocks();
        // What the index promised may have been evicted since.
        let source = sources.iter().find_map(|(source, blocks)| {
            let has = self.nodes[*source].pool.match_len(chain).min(*blocks);
            (has > own && self.nodes[*source].alive).then_some((*source, has))
        });
        let prefix_blocks = source.map_or(own, |(_, blocks)| blocks);
        let mut prefill = Prefill {
            visit,
            ready: source.is_none(),
            prefix_blocks,
            cached_tokens: 0,
            prompt_tokens,
            held,
            done_tokens: 0,
            starts_ns: 0,
        };
        self.count_cached(&mut prefill, prefix_blocks, own);
        self.nodes[node].prefills.waiting.push_back(prefill);
        let Some((source, blocks)) = source else {
            return self.advance(node);
        };
        self.nodes[source].pool.read_by_peer(chain, blocks, now);
        let bytes = self.bytes(blocks - own);
        let arrives_ns = self.links.send(source, node, bytes, self.now_ns);
        self.nodes[node].moved(bytes, ms(arrives_ns - self.now_ns));
        let fixed_ns = ns(Priors::default().fetch_fixed_ms);
        self.states[request].measured.fetch = Moved {
            bytes,
            took: Millis(ms(arrives_ns + fixed_ns - self.now_ns)),
        };
        let at = self.at(node);
        self.plan(arrives_ns + fixed_ns, Kind::Fetched { node: at, visit });
    }

    pub(super) fn fetched(&mut self, node: usize, visit: Visit) {
        let now = self.instant();
        let waiting = &mut self.nodes[node].prefills.waiting;
        let Some(position) = waiting.iter().position(|prefill| prefill.visit == visit) else {
            return;
        };
        let Some(mut prefill) = waiting.remove(position) else {
            return;
        };
        let own = prefill.held.blocks();
        let chain = &self.requests[visit.request].chain;
        let blocks = prefill.prefix_blocks;
        self.nodes[node]
            .pool
            .extend(&mut prefill.held, chain, blocks, now);
        prefill.ready = true;
        // A pool that is in use as a whole keeps less.
        let kept = prefill.held.blocks();
        self.count_cached(&mut prefill, kept, own);
        self.nodes[node].prefills.waiting.insert(position, prefill);
        self.plan_log(node);
        self.advance(node);
    }

    /// The prompt is computed; its KV is on its way since the first layer was.
    pub(super) fn computed(&mut self, node: usize) {
        let now = self.instant();
        let Some(Computing {
            mut prefill,
            starts_ns,
            ..
        }) = self.nodes[node].prefills.current.take()
        else {
            return;
        };
        let visit = prefill.visit;
        let compute_ms = ms(self.now_ns - starts_ns);
        self.count_prefill(node, visit, compute_ms);
        let chain = &self.requests[visit.request].chain;
        let pool = &mut self.nodes[node].pool;
        pool.extend(&mut prefill.held, chain, chain.len(), now);
        if let Some(placement) = self.states[visit.request].placement
            && self.is_current(visit)
        {
            let decode = placement.decode;
            let lacks = self.blocks(prefill.prompt_tokens) - self.nodes[decode].pool.match_len(chain);
            let bytes = self.bytes(lacks);
            let sent_ns = self.links.send(node, decode, bytes, starts_ns);
            let moving_ns = self.links.duration_ns(bytes);
            self.nodes[node].moved(bytes, ms(moving_ns));
            self.nodes[decode].moved(bytes, ms(moving_ns));
            // The last layer is pushed when all is computed.
            let last_layer_ns = moving_ns / self.space.layout.layers as u64;
            let lands_ns = sent_ns.max(self.now_ns + last_layer_ns) + ns(Priors::default().handoff_fixed_ms);
            self.nodes[node].prefills.landing.insert(visit, prefill.held);
            let state = &mut self.states[visit.request];
            let measured = &mut state.measured;
            measured.queue = Millis(ms(starts_ns.saturating_sub(state.placed_ns)));
            measured.compute = Millis(compute_ms);
            measured.handoff = Moved {
                bytes,
                took: Millis(ms(sent_ns - starts_ns)),
            };
            measured.exposed = Millis(ms(lands_ns - self.now_ns));
            let kind = Kind::Lands {
                prefill: self.at(node),
                decode: self.at(decode),
                visit,
            };
            self.plan(lands_ns, kind);
        } else {
            self.nodes[node].pool.release(prefill.held, now);
        }
        self.plan_log(node);
        self.advance(node);
    }

    /// The prefill node's part of a request is over.
    pub(super) fn let_go(&mut self, node: usize, visit: Visit) {
        let now = self.instant();
        let node = &mut self.nodes[node];
        if let Some(held) = node.prefills.landing.remove(&visit) {
            node.pool.release(held, now);
        }
    }

    /// Begins what the node can begin.
    pub(super) fn advance(&mut self, node: usize) {
        if self.nodes[node].role == Role::Decode {
            return self.start_step(node);
        }
        let prefills = &mut self.nodes[node].prefills;
        if prefills.current.is_some() {
            return;
        }
        let Some(prefill) = prefills
            .next_ready()
            .and_then(|next| prefills.waiting.remove(next))
        else {
            return;
        };
        let work_ms = self
            .profile
            .prefill_ms(prefill.prompt_tokens, prefill.cached_tokens);
        let ends_ns = self.now_ns + ns(work_ms);
        prefills.current = Some(Computing {
            prefill,
            starts_ns: self.now_ns,
            ends_ns,
        });
        let at = self.at(node);
        self.plan(ends_ns, Kind::Computed(at));
    }

    pub(super) fn count_prefill(&mut self, node: usize, visit: Visit, compute_ms: f64) {
        let totals = &mut self.nodes[node].totals;
        totals.prefills += 1;
        totals.prefill_ms += compute_ms;
        if self.is_current(visit) {
            self.states[visit.request].served.compute_ms += compute_ms;
        }
    }

    fn count_cached(&mut self, prefill: &mut Prefill, blocks: usize, own: usize) {
        let block_tokens = self.scenario.workload.block_tokens;
        let tokens = |blocks: usize| (blocks as u64 * block_tokens).min(prefill.prompt_tokens - 1);
        // The last token is always computed: its logits give the first one of the answer.
        let (cached, own) = (tokens(blocks), tokens(own));
        prefill.cached_tokens = cached;
        let served = &mut self.states[prefill.visit.request].served;
        served.cached_tokens = cached;
        served.fetched_tokens = cached - own;
        self.states[prefill.visit.request].measured.cached_tokens = cached;
    }

    pub(super) fn bytes(&self, blocks: usize) -> u64 {
        blocks as u64 * self.space.layout.block_bytes() as u64
    }

    pub(super) fn blocks(&self, tokens: u64) -> usize {
        let blocks = tokens.div_ceil(self.scenario.workload.block_tokens);
        usize::try_from(blocks).unwrap_or(usize::MAX)
    }
}
