//! Gives blocks to peers, in the background: the shell of [`crate::cooperate`].
//!
//! While the node has fewer free slots than its margin, rounds restore it: the next victims of eviction are quoted to the
//! peers, decided on, and dropped or offered. Requests never wait for this. They take from the margin, and where it does not
//! suffice, or the network or the peers are slow, eviction drops blocks as ever.
//!
//! Also here, since it needs the peers: copies of pinned prefixes, getting corrupt blocks again, and giving away what is worth
//! keeping when the node ends.
//!
//! Invariant: everything that is asked of a peer has a deadline, at most [`PEERS_MAX`] of them are asked at a time, and a node
//! without peers gives up nothing before it must.
//!
//! Elsewhere: answering (`cache.rs`), verifying (`scrub.rs`).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use node::Channel;
use node::registry::Members;
use proto::v1::cache_client::CacheClient;
use proto::{convert, v1};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use types::{BlockHash, NodeRecord};

use crate::cache::{CHAINS_MAX, Cache, Wanted};
use crate::cooperate::{Candidate, Fate, Reason, Report};
use crate::fetch::{Fetch, Source, fetch_prefix};
use crate::scrub::{Cursor, Verified};
use crate::table::{Path, Purpose};

/// How often the margin is looked at: requests use it up in a few steps of the engine.
const ROUND_INTERVAL: Duration = Duration::from_millis(50);
/// Rounds without a pause.
const ROUNDS_MAX: usize = 8;
/// Chains about which peers are asked in one round.
const CANDIDATES_MAX: usize = 32;
/// Peers that are asked in one round. A larger cluster is asked in turns.
const PEERS_MAX: usize = 16;
/// A peer that needs longer for a look at its table is left out.
const QUOTE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often pinned prefixes are looked after.
const REPLICAS_INTERVAL: Duration = Duration::from_secs(5);
/// The taker's lease ends a round trip after its answer.
const LEASE_END_TIMEOUT: Duration = Duration::from_millis(500);
/// How often it is looked at whether it has.
const LEASE_END_POLL: Duration = Duration::from_millis(5);
/// How often the scrubber goes on.
const SCRUB_INTERVAL: Duration = Duration::from_millis(100);
/// Longest time for which a corrupt block is looked for at peers.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(10);
/// Blocks looked at when a node ends: the ones that are worth most.
const HANDOVER_BLOCKS_MAX: usize = 64 * 1024;

/// What one node does with its peers. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Exchange {
    cache: Cache,
    members: watch::Receiver<Arc<Members>>,
    grpc_endpoint: String,
    /// Where the next round begins to ask.
    turn: Arc<AtomicUsize>,
    /// Blocks that the hand-over has not looked at yet.
    handover_left: Arc<AtomicUsize>,
}

/// A peer that can be asked.
struct Peer {
    record: NodeRecord,
    client: CacheClient<Channel>,
}

/// A run to be offered to one peer.
struct Offering<'a> {
    path: &'a Path,
    from: usize,
    worth: f32,
}

impl Exchange {
    /// The exchange of the node that is reached at `grpc_endpoint` (`host:port`), among `members`.
    pub fn new(cache: Cache, members: watch::Receiver<Arc<Members>>, grpc_endpoint: String) -> Self {
        Self {
            cache,
            members,
            grpc_endpoint,
            turn: Arc::default(),
            handover_left: Arc::default(),
        }
    }

    /// Cooperates, replicates and verifies until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let work = async {
            tokio::join!(self.keep_margin(), self.keep_replicas(), self.scrub());
        };
        shutdown.run_until_cancelled(work).await;
    }

    /// Gives away what is worth keeping, until that is done or the time set for it is over. Call it while the node can still be
    /// read from. Returns the blocks that peers took.
    pub async fn hand_over(&self) -> usize {
        let config = self.cache.store().config();
        if config.cooperation_bytes_per_second == 0 {
            return 0;
        }
        let deadline = Instant::now() + config.handover_timeout;
        let mut given = 0;
        // Ends early with what was given so far; an offer that is cut off leaves nothing behind but a lease.
        let _ = timeout_at(deadline, self.give_away(&mut given)).await;
        self.handover_left.store(0, Ordering::Relaxed);
        given
    }

    /// Blocks that [`Exchange::hand_over`] has still to offer, while it runs.
    pub fn handover_left(&self) -> usize {
        self.handover_left.load(Ordering::Relaxed)
    }

    async fn keep_margin(&self) {
        let store = self.cache.store();
        if store.config().cooperation_bytes_per_second == 0 {
            return;
        }
        let mut ticks = interval(ROUND_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            for _ in 0..ROUNDS_MAX {
                let free = store.table().counts().free;
                let missing = self.cache.margin().saturating_sub(free);
                if missing == 0 || !self.round(missing).await {
                    break;
                }
            }
        }
    }

    /// Frees some of the `missing` slots. False if another round would do no better.
    async fn round(&self, missing: usize) -> bool {
        let store = self.cache.store();
        let now = crate::store::now();
        let candidates: Vec<Candidate> = {
            let mut table = store.table();
            let coldest = table.coldest(CANDIDATES_MAX, now);
            let paths = coldest.iter().filter_map(|victim| {
                let path = table.path(victim.hash)?;
                Some(Candidate {
                    path,
                    worth: victim.worth,
                })
            });
            paths.collect()
        };
        let peers = self.peers();
        let reports = self.quotes(&peers, &candidates).await;
        if reports.is_empty() || candidates.is_empty() {
            return false;
        }
        let now = crate::store::now();
        let (peers, reports): (Vec<&Peer>, Vec<Report>) = reports.into_iter().unzip();
        let fates = self.cache.giver().decide(&candidates, &reports, missing, now);
        let mut offerings: Vec<Vec<Offering<'_>>> = peers.iter().map(|_| Vec::new()).collect();
        for (candidate, fate) in candidates.iter().zip(&fates) {
            if let Fate::Offer { report, from, .. } = fate {
                offerings[*report].push(Offering {
                    path: &candidate.path,
                    from: *from,
                    worth: candidate.worth,
                });
            }
        }
        let offers = peers.iter().zip(&offerings);
        let offers = offers.map(|(peer, runs)| self.offer(peer, runs, false));
        let given: usize = join_all(offers).await.into_iter().sum();
        let mut freed = 0;
        for (candidate, fate) in candidates.iter().zip(fates) {
            freed += match fate {
                Fate::Keep => 0,
                Fate::Drop { blocks, why } => {
                    store.inner().metrics.count_dropped(why.as_str(), blocks);
                    self.evict(&candidate.path, blocks, Duration::ZERO).await
                }
                Fate::Offer { blocks, .. } => {
                    let patience = if given > 0 {
                        LEASE_END_TIMEOUT
                    } else {
                        Duration::ZERO
                    };
                    self.evict(&candidate.path, blocks, patience).await
                }
            };
        }
        freed > 0
    }

    /// Evicts the last `blocks` blocks of a chain, as far as nobody uses them. Waits for a taker's lease to end.
    async fn evict(&self, path: &Path, blocks: usize, patience: Duration) -> usize {
        let store = self.cache.store();
        let until = Instant::now() + patience;
        let mut evicted = 0;
        for hash in path.hashes.iter().rev().take(blocks) {
            while !store.with_table(|table| table.evict(*hash, crate::store::now())) {
                if Instant::now() >= until || !store.table().holds(*hash) {
                    return evicted;
                }
                tokio::time::sleep(LEASE_END_POLL).await;
            }
            self.cache.giver().forget(*hash);
            evicted += 1;
        }
        evicted
    }

    /// Peers to ask now: nodes with blocks of the same space.
    fn peers(&self) -> Vec<Peer> {
        let root = self.cache.store().common_root();
        let records: Vec<NodeRecord> = {
            let members = self.members.borrow();
            let others = members.nodes.values().filter(|record| {
                record.id != *self.cache.id()
                    && record.kv_space.as_ref().is_some_and(|space| space.root() == root)
            });
            others.cloned().collect()
        };
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % records.len().max(1);
        let in_turn = records.iter().skip(turn).chain(records.iter().take(turn));
        let peers = in_turn.take(PEERS_MAX).filter_map(|record| {
            // An endpoint that is no address is the peer's own defect, and the router says so.
            let channel = self.cache.channels().get(&record.grpc_endpoint).ok()?;
            Some(Peer {
                record: record.clone(),
                client: CacheClient::new(channel)
                    .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(proto::MESSAGE_BYTES_MAX),
            })
        });
        peers.collect()
    }

    /// What the peers say about the candidates, in the order of the peers; those that do not answer are left out.
    async fn quotes<'a>(&self, peers: &'a [Peer], candidates: &[Candidate]) -> Vec<(&'a Peer, Report)> {
        let chains = candidates
            .iter()
            .map(|candidate| convert::chain_to_wire(&candidate.path.hashes));
        let request = v1::QuoteRequest {
            kv_root: self.cache.store().common_root().0.to_vec(),
            node_id: self.cache.id().as_str().to_owned(),
            chains: chains.collect(),
        };
        let asked = peers.iter().map(|peer| {
            let (mut client, request) = (peer.client.clone(), request.clone());
            async move { (peer, timeout(QUOTE_TIMEOUT, client.quote(request)).await) }
        });
        let mut reports = Vec::new();
        for (peer, answer) in join_all(asked).await {
            match answer {
                Ok(Ok(answer)) => {
                    let answer = answer.into_inner();
                    let held = answer
                        .held
                        .iter()
                        .map(|held| usize::try_from(*held).unwrap_or(usize::MAX));
                    let report = Report {
                        peer: peer.record.id.clone(),
                        held: held.collect(),
                        price: answer.price,
                    };
                    reports.push((peer, report));
                }
                Ok(Err(error)) => self.failed(peer, "quote", &error),
                Err(_) => self.failed(peer, "quote", &"no answer in time"),
            }
        }
        reports
    }

    /// Offers runs to one peer. Returns the blocks that it holds thereafter.
    async fn offer(&self, peer: &Peer, runs: &[Offering<'_>], replicate: bool) -> usize {
        if runs.is_empty() {
            return 0;
        }
        let store = self.cache.store();
        let wire = runs
            .iter()
            .take(CHAINS_MAX)
            .map(|offering| self.to_wire(offering));
        let request = v1::OfferRequest {
            kv_root: store.common_root().0.to_vec(),
            node_id: self.cache.id().as_str().to_owned(),
            grpc_endpoint: self.grpc_endpoint.clone(),
            runs: wire.collect(),
            replicate,
        };
        let offered: usize = runs.iter().map(|run| run.path.hashes.len() - run.from).sum();
        let metrics = &store.inner().metrics;
        metrics.offered_blocks.inc_by(offered as u64);
        let mut client = peer.client.clone();
        // The taker stops by itself just before.
        let patience = store.config().offer_timeout + QUOTE_TIMEOUT;
        match timeout(patience, client.offer(request)).await {
            Ok(Ok(answer)) => {
                let held: u64 = answer.into_inner().held.iter().sum();
                metrics.given_blocks.inc_by(held);
                usize::try_from(held).unwrap_or(usize::MAX)
            }
            Ok(Err(error)) => {
                self.failed(peer, "offer", &error);
                0
            }
            Err(_) => {
                self.failed(peer, "offer", &"no answer in time");
                0
            }
        }
    }

    fn to_wire(&self, offering: &Offering<'_>) -> v1::OfferedRun {
        let Path { root, hashes, .. } = offering.path;
        let run = &hashes[offering.from..];
        let parent = offering
            .from
            .checked_sub(1)
            .map_or(*root, |before| hashes[before]);
        let giver = self.cache.giver();
        v1::OfferedRun {
            root: root.0.to_vec(),
            parent: parent.0.to_vec(),
            run: Some(convert::chain_to_wire(run)),
            worth: offering.worth,
            recirculations: run.iter().map(|hash| giver.recirculations(*hash)).collect(),
        }
    }

    fn failed(&self, peer: &Peer, what: &str, error: &dyn std::fmt::Display) {
        self.cache.store().inner().metrics.peer_failures.inc();
        tracing::debug!(peer = %peer.record.id, what, %error, "peer does not cooperate");
    }

    async fn give_away(&self, given: &mut usize) {
        let store = self.cache.store();
        let now = crate::store::now();
        let (leaves, mut left): (Vec<BlockHash>, HashSet<BlockHash>) = {
            let table = store.table();
            let ranked = table.ranked(HANDOVER_BLOCKS_MAX, false, now);
            let leaves = ranked.iter().filter(|block| block.children == 0);
            (
                leaves.map(|block| block.hash).collect(),
                ranked.iter().map(|block| block.hash).collect(),
            )
        };
        self.handover_left.store(left.len(), Ordering::Relaxed);
        let mut batches = leaves.chunks(CANDIDATES_MAX);
        let mut again = None;
        while let Some(batch) = again.take().or_else(|| batches.next()) {
            let candidates: Vec<Candidate> = {
                let table = store.table();
                let each = batch.iter().filter_map(|leaf| {
                    let path = table.path(*leaf)?;
                    Some(Candidate {
                        worth: table.worth(*leaf, crate::store::now())?,
                        // All of it leaves with the node, so all of it is worth moving.
                        path: Path {
                            tail: path.hashes.len(),
                            ..path
                        },
                    })
                });
                each.collect()
            };
            let peers = self.peers();
            let reports = self.quotes(&peers, &candidates).await;
            // Peers that take nothing are ending, too, or have taken what they may.
            if reports.iter().all(|(_, report)| report.price.is_empty()) {
                return;
            }
            let (peers, reports): (Vec<&Peer>, Vec<Report>) = reports.into_iter().unzip();
            let now = crate::store::now();
            let fates = self.cache.giver().decide(&candidates, &reports, usize::MAX, now);
            let too_fast = |fate: &Fate| {
                matches!(
                    fate,
                    Fate::Drop {
                        why: Reason::Rate,
                        ..
                    }
                )
            };
            let waits = fates.iter().any(too_fast);
            for (candidate, fate) in candidates.iter().zip(fates) {
                if let Fate::Offer { report, from, .. } = fate {
                    let run = Offering {
                        path: &candidate.path,
                        from,
                        worth: candidate.worth,
                    };
                    *given += self.offer(peers[report], &[run], false).await;
                }
            }
            if waits {
                // Bounded by the time for all of it.
                again = Some(batch);
                tokio::time::sleep(ROUND_INTERVAL).await;
                continue;
            }
            for candidate in &candidates {
                for hash in &candidate.path.hashes {
                    left.remove(hash);
                }
            }
            self.handover_left.store(left.len(), Ordering::Relaxed);
        }
    }

    async fn keep_replicas(&self) {
        let mut ticks = interval(REPLICAS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.cache.pins().expire(crate::store::now());
            for wanted in self.cache.pins().wanted() {
                self.replicate(&wanted).await;
            }
        }
    }

    /// Offers a pinned prefix to peers until enough of them hold it.
    async fn replicate(&self, wanted: &Wanted) {
        let path = Path {
            root: wanted.root,
            tail: wanted.chain.len(),
            hashes: wanted.chain.clone(),
        };
        let candidate = Candidate {
            path: path.clone(),
            worth: 0.0,
        };
        let peers = self.peers();
        let mut reports = self.quotes(&peers, &[candidate]).await;
        let held = |report: &Report| report.held.first().copied().unwrap_or_default();
        let holders = reports
            .iter()
            .filter(|(_, report)| held(report) == path.hashes.len())
            .count();
        // Those that have most of it, then those that have most room.
        reports.retain(|(_, report)| held(report) < path.hashes.len());
        reports.sort_by_key(|(_, report)| std::cmp::Reverse((held(report), report.price.len())));
        let mut missing = wanted.peers_min.saturating_sub(holders);
        for (peer, report) in &reports {
            if missing == 0 {
                return;
            }
            let from = held(report);
            let run = Offering {
                path: &path,
                from,
                worth: 0.0,
            };
            if self.offer(peer, &[run], true).await == path.hashes.len() - from {
                missing -= 1;
            }
        }
    }

    async fn scrub(&self) {
        let store = self.cache.store();
        let per_second = store.config().scrub_bytes_per_second as f64;
        if per_second == 0.0 {
            return;
        }
        let block_bytes = store.layout().block_bytes() as f64;
        let mut ticks = interval(SCRUB_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut cursor, mut credit) = (Cursor::default(), 0.0);
        loop {
            ticks.tick().await;
            credit = (credit + per_second * SCRUB_INTERVAL.as_secs_f64()).min(per_second.max(block_bytes));
            while credit >= block_bytes {
                credit -= block_bytes;
                match cursor.next(store) {
                    None => break,
                    Some(Verified::Good | Verified::Gone) => {}
                    Some(Verified::Corrupt { paths, dropped }) => {
                        tracing::error!(dropped, "a cached block is corrupt and was dropped");
                        self.repair(&paths).await;
                    }
                }
                tokio::task::yield_now().await;
            }
        }
    }

    /// Gets chains again that lost their ends to a corrupt block, from the peers that have most of them.
    async fn repair(&self, paths: &[Path]) {
        let candidates: Vec<Candidate> = paths
            .iter()
            .map(|path| Candidate {
                path: path.clone(),
                worth: 0.0,
            })
            .collect();
        let peers = self.peers();
        let reports = self.quotes(&peers, &candidates).await;
        let deadline = Instant::now() + REPAIR_TIMEOUT;
        for (index, path) in paths.iter().enumerate() {
            let mut sources: Vec<Source> = reports
                .iter()
                .map(|(peer, report)| Source {
                    node_id: peer.record.id.to_string(),
                    grpc_endpoint: peer.record.grpc_endpoint.clone(),
                    blocks: report.held.get(index).copied().unwrap_or_default(),
                })
                .collect();
            sources.sort_by_key(|source| std::cmp::Reverse(source.blocks));
            let fetch = Fetch {
                purpose: Purpose::Move,
                root: path.root,
                chain: &path.hashes,
                from: 0,
                sources: &sources,
                deadline,
            };
            let fetched = fetch_prefix(self.cache.store(), self.cache.channels(), fetch).await;
            tracing::info!(
                blocks = path.hashes.len(),
                held = fetched.blocks.len(),
                "looked at the peers for a chain with a corrupt block"
            );
        }
    }
}

#[cfg(test)]
mod tests;
