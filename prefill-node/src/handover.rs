//! One prompt from the engine to the decode node: listens to both, lets the handoff decide, and begins its writes.
//!
//! Invariant: our blocks are freed only when neither the engine nor a write uses them. A job of the engine holds
//! them too, and the writes are dropped before them, so this is also true of a session that is cut off.
//!
//! Elsewhere: which slices may go out ([`crate::handoff`]), the stream ([`crate::peer`]), how the prompt got its blocks
//! ([`crate::session`]).

use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::sampler::Sampled;
use kv_store::{SequenceBlocks, Store};
use proto::v1::prefill_event::Event;
use proto::{convert, span, v1};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use transfer::RemoteRegion;
use types::{BlockId, Checksum, Epoch, Error, ErrorCode};

use crate::engine_loop::{Job, PROGRESS_MAX, Progress, lock};
use crate::handoff::{Handoff, Limits, Phase, Shape};
use crate::peer::{End, Peer};
use crate::push::{Ended, Pusher, Target, may_still_land};
use crate::request::Prompt;
use crate::shared::{Admitted, Shared};

/// A prompt whose blocks are in place.
pub(crate) struct Prepared {
    pub(crate) blocks: SequenceBlocks,
    pub(crate) fetched: Option<Fetched>,
}

/// A prefix that was looked for elsewhere.
pub(crate) struct Fetched {
    bytes: u64,
    began: Instant,
    ended: Instant,
    /// Where it came from, for people.
    origin: String,
}

/// See the module documentation. Fields are dropped in this order: first nothing reads our blocks any more, then the
/// engine is told, then they are given back.
pub(crate) struct Handover<'a> {
    shared: &'a Shared,
    prompt: &'a Prompt,
    pusher: Pusher,
    /// Cancels the engine's job.
    cancel: DropGuard,
    /// The place in the queue, until all is computed.
    admitted: Option<Admitted>,
    /// `None` after the last of it was heard.
    progress: Option<mpsc::Receiver<Progress>>,
    handoff: Handoff,
    owner: Arc<Mutex<SequenceBlocks>>,
    transfer_id: u64,
    cached_tokens: usize,
    fetched: Option<Fetched>,
    arrived: Instant,
    started: Option<Instant>,
    computed: Option<(Instant, Sampled)>,
}

impl<'a> Handover<'a> {
    /// Gives the prompt to the engine.
    pub(crate) async fn begin(
        shared: &'a Shared,
        prompt: &'a Prompt,
        admitted: Admitted,
        prepared: Prepared,
        arrived: Instant,
    ) -> Result<Self, End> {
        let Prepared { blocks, fetched } = prepared;
        let ids: Arc<[BlockId]> = blocks.block_ids().into();
        let cached_tokens = blocks.cached_tokens();
        let owner = Arc::new(Mutex::new(blocks));
        let (progress_tx, progress_rx) = mpsc::channel(PROGRESS_MAX);
        let cancelled = CancellationToken::new();
        let job = Job {
            ticket: admitted.ticket(),
            tokens: prompt.tokens.clone(),
            prompt_tokens: prompt.prompt_tokens,
            sampling: prompt.sampling.clone(),
            // Without new tokens there are no logits: the last one is computed again, and not written.
            start: cached_tokens.min(prompt.tokens.len() - 1),
            cached_tokens,
            blocks: ids.clone(),
            owner: owner.clone(),
            cancelled: cancelled.clone(),
            progress: progress_tx,
        };
        shared.submit(job).await?;
        Ok(Self {
            pusher: Pusher::new(&shared.store, ids.clone(), prompt.held_blocks),
            handoff: Handoff::new(
                Shape {
                    layers: shared.store.layout().layers,
                    held_blocks: prompt.held_blocks,
                    blocks: ids.len(),
                },
                limits(shared),
            ),
            cancel: cancelled.drop_guard(),
            shared,
            prompt,
            admitted: Some(admitted),
            progress: Some(progress_rx),
            owner,
            transfer_id: 0,
            cached_tokens,
            fetched,
            arrived,
            started: None,
            computed: None,
        })
    }

    /// Goes on until the decode node was told that all has landed, or the request ends otherwise.
    pub(crate) async fn run(mut self, peer: &mut Peer) -> Result<(), End> {
        match self.push(peer).await {
            Ok(sampled) => {
                self.land(peer, sampled).await;
                Ok(())
            }
            Err(end) => Err(self.stop(end).await),
        }
    }

    /// Returns when everything is computed and in the decode node's memory.
    async fn push(&mut self, peer: &mut Peer) -> Result<Sampled, End> {
        loop {
            if self.handoff.phase() == Phase::Flushed
                && let Some((_, sampled)) = &self.computed
            {
                return Ok(sampled.clone());
            }
            while let Some(write) = self.handoff.next_write() {
                self.pusher
                    .begin(&write, self.shared.config.write_timeout, peer.deadline());
            }
            let offer_due = self.offer_due(peer.deadline());
            tokio::select! {
                // An end is heard before more is begun; the engine is heard before the peer, so that it never waits.
                biased;
                offer = peer.next() => self.aim(offer?)?,
                progress = next_progress(&mut self.progress) => self.advance(progress, peer).await?,
                ended = self.pusher.ended() => self.settle(ended)?,
                () = sleep_until(offer_due), if self.awaits_offer() => {
                    let message = "the decode node offered no memory in time";
                    return Err(Error::new(ErrorCode::Timeout, message).into());
                }
            }
        }
    }

    fn awaits_offer(&self) -> bool {
        self.handoff.phase() == Phase::Running && self.handoff.blocks_to_push() > 0
    }

    fn offer_due(&self, deadline: Instant) -> Instant {
        let started = self.started.unwrap_or_else(Instant::now);
        deadline.min(started + self.shared.config.offer_timeout)
    }

    fn aim(&mut self, offer: v1::PrefillOffer) -> Result<(), End> {
        let v1::PrefillOffer {
            transfer_id,
            region,
            block_offsets,
        } = offer;
        self.handoff.offer(block_offsets.len())?;
        self.transfer_id = transfer_id;
        if self.handoff.blocks_to_push() == 0 {
            return Ok(());
        }
        let region = region.ok_or_else(|| Error::invalid("offer", "the offer names no memory"))?;
        self.pusher.aim(Target {
            remote: RemoteRegion {
                endpoint: region.endpoint,
                epoch: Epoch(region.epoch),
                key: region.key,
            },
            block_offsets,
        });
        Ok(())
    }

    async fn advance(&mut self, progress: Option<Progress>, peer: &Peer) -> Result<(), End> {
        match progress {
            Some(Progress::Started) => self.start(peer),
            Some(Progress::Written { layer, blocks_end }) => {
                self.handoff.written(layer, blocks_end);
                if layer + 1 == self.shared.store.layout().layers {
                    self.commit(blocks_end).await;
                }
            }
            Some(Progress::Computed(sampled)) => {
                let now = Instant::now();
                self.computed = Some((now, sampled));
                self.pusher.overlap.computed(now);
                self.handoff.computed();
                self.progress = None;
                self.admitted = None;
            }
            Some(Progress::Failed(error)) => return Err(error.into()),
            None => return Err(Error::internal("the engine gave the prompt up").into()),
        }
        Ok(())
    }

    fn start(&mut self, peer: &Peer) {
        let now = Instant::now();
        self.started = Some(now);
        let layout = self.shared.store.layout();
        self.handoff.start(self.cached_tokens / layout.block_tokens);
        let metrics = &self.shared.metrics;
        metrics.queue_seconds.observe((now - self.arrived).as_secs_f64());
        metrics.cached_tokens.inc_by(self.cached_tokens as u64);
        tracing::debug!(cached_tokens = self.cached_tokens, "prefill started");
        peer.send(Event::Started(v1::PrefillStarted {
            blocks: self.handoff.blocks_to_push() as u64,
        }));
    }

    /// Shares the full blocks before `blocks_end`, one at a time, since each one is hashed. Block ids that the engine and
    /// the writes use stay readable, see [`SequenceBlocks::commit_full`].
    async fn commit(&mut self, blocks_end: usize) {
        let block_tokens = self.shared.store.layout().block_tokens;
        let full = (self.prompt.tokens.len() / block_tokens).min(blocks_end);
        loop {
            {
                let mut blocks = lock(&self.owner);
                let next = blocks.shared_blocks() + 1;
                if next > full {
                    return;
                }
                blocks.commit_full(&self.prompt.tokens, next * block_tokens);
            }
            tokio::task::yield_now().await;
        }
    }

    fn settle(&mut self, ended: Ended) -> Result<(), End> {
        match ended.result {
            Ok(_) => {
                self.handoff.acknowledged(ended.id);
                Ok(())
            }
            Err(error) => {
                self.handoff.write_failed(ended.id, may_still_land(&error));
                Err(error.into())
            }
        }
    }

    /// Tells the decode node what to verify, and what comes next.
    async fn land(mut self, peer: &Peer, sampled: Sampled) {
        let checksums = self.checksums().await;
        self.handoff.land();
        let now = Instant::now();
        let computed_at = self.computed.as_ref().map_or(now, |(at, _)| *at);
        let started = self.started.unwrap_or(computed_at);
        let spans = self.spans(started, computed_at);
        let overlap = &self.pusher.overlap;
        self.shared.observe_handoff(overlap, self.pusher.pushed_bytes);
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let tokenizer = self.shared.model.tokenizer();
        peer.send(Event::Landed(v1::PrefillLanded {
            transfer_id: self.transfer_id,
            checksums: checksums.into_iter().map(|checksum| checksum.0).collect(),
            first_token: sampled.token,
            logprob: sampled.logprob.as_ref().map(|logprob| {
                convert::logprob_to_wire(logprob, |token| tokenizer.token_bytes(token).to_vec())
            }),
            cached_tokens: self.cached_tokens as u64,
            fetched_bytes: self.fetched.as_ref().map_or(0, |fetched| fetched.bytes),
            handoff_bytes: self.pusher.pushed_bytes,
            fetch_ms: self
                .fetched
                .as_ref()
                .map_or(0.0, |fetched| ms(fetched.ended - fetched.began)),
            queue_ms: ms(started - self.arrived),
            prefill_ms: ms(computed_at - started),
            handoff_hidden_ms: ms(overlap.hidden()),
            handoff_exposed_ms: ms(overlap.exposed()),
            transport: self.pusher.mover.to_owned(),
            spans,
        }));
    }

    /// The way so far, from the prompt's arrival on.
    fn spans(&self, started: Instant, computed_at: Instant) -> Vec<v1::Span> {
        let node = self.shared.node_id.as_str();
        let of = |name, from: Instant, to: Instant| span::span(name, node, from - self.arrived, to - from);
        let mut spans = vec![of(span::QUEUE, self.arrived, started)];
        spans.extend(self.fetched.as_ref().map(|fetched| v1::Span {
            bytes: fetched.bytes,
            detail: fetched.origin.clone(),
            ..of(span::FETCH, fetched.began, fetched.ended)
        }));
        spans.push(of(span::PREFILL, started, computed_at));
        spans.extend(self.pusher.overlap.extent().map(|(from, to)| v1::Span {
            bytes: self.pusher.pushed_bytes,
            detail: self.pusher.mover.to_owned(),
            ..of(span::HANDOFF, from, to)
        }));
        spans
    }

    /// Of every pushed block. Full ones were hashed when they were shared.
    async fn checksums(&mut self) -> Vec<Checksum> {
        self.commit(usize::MAX).await;
        let blocks = lock(&self.owner);
        let shared = blocks.shared().iter().map(|pin| pin.checksum());
        let own = &blocks.block_ids()[blocks.shared_blocks()..];
        let own = own.iter().map(|block| self.shared.store.checksum(*block));
        shared.chain(own).skip(self.prompt.held_blocks).collect()
    }

    /// Stops the engine and lets the writes in flight end, so that the peer's memory is safe where that is possible.
    async fn stop(mut self, end: End) -> End {
        drop(self.cancel);
        self.handoff.stop();
        if matches!(end, End::Gone) {
            // Its fence is all that counts; it does not read what we could say.
            return end;
        }
        let (handoff, pusher) = (&mut self.handoff, &mut self.pusher);
        let settled = timeout(self.shared.config.quiesce_timeout, async {
            while handoff.phase() == Phase::Stopping {
                let ended = pusher.ended().await;
                match ended.result {
                    Ok(_) => handoff.acknowledged(ended.id),
                    Err(error) => handoff.write_failed(ended.id, may_still_land(&error)),
                }
            }
        })
        .await;
        let quiesced = settled.is_ok() && handoff.phase() == Phase::Stopped { quiesced: true };
        match end {
            End::Aborted if !quiesced => End::Failed(Error::unavailable(
                "the handoff was aborted, but some of its writes may still be on their way",
            )),
            End::Aborted | End::Failed(_) | End::Gone => end,
        }
    }
}

fn limits(shared: &Shared) -> Limits {
    let config = &shared.config;
    Limits {
        writes_in_flight_max: config.writes_in_flight_max,
        write_slices_max: config.write_slices_max,
        write_units_max: (config.write_bytes_max / shared.store.layout().layer_bytes()).max(1),
    }
}

/// What the engine says next; nothing after its last word. Cancel safe.
async fn next_progress(progress: &mut Option<mpsc::Receiver<Progress>>) -> Option<Progress> {
    match progress {
        Some(progress) => progress.recv().await,
        None => std::future::pending().await,
    }
}

/// Fetches and allocates what the prompt needs. Waits for memory that readers' leases hold; the caller bounds the time.
pub(crate) async fn prepare(shared: &Shared, prompt: &Prompt, deadline: Instant) -> Prepared {
    let store: &Store = &shared.store;
    let mut blocks = SequenceBlocks::begin(store, &prompt.tenant, &prompt.tokens);
    let mut fetched = None;
    let has_source = !prompt.sources.is_empty() || store.has_lower_tiers();
    if blocks.shared_blocks() < blocks.chain().len() && has_source {
        let fetch = kv_store::Fetch {
            purpose: kv_store::table::Purpose::Request,
            root: blocks.root(),
            chain: blocks.chain(),
            from: blocks.shared_blocks(),
            sources: &prompt.sources,
            deadline: deadline.min(Instant::now() + shared.config.fetch_timeout),
        };
        let began = Instant::now();
        let outcome = kv_store::fetch_prefix(store, &shared.channels, fetch).await;
        fetched = Some(Fetched {
            bytes: outcome.bytes,
            began,
            ended: Instant::now(),
            origin: outcome.origin(),
        });
        blocks.extend_cached(outcome.blocks);
    }
    while let Err(short) = blocks.grow_to(prompt.tokens.len()) {
        tracing::debug!(%short, "waiting for blocks that readers hold");
        tokio::time::sleep(shared.config.memory_retry_interval).await;
    }
    Prepared { blocks, fetched }
}
