//! The `perigee.v1.Cache` service: what peers and people do with this node's blocks beside reading and putting them.
//!
//! Invariant: nothing here makes a block findable that was not verified, and nothing that is in use is dropped, but for blocks
//! that are corrupt. What a caller can make the node hold is bounded: offers and verifications at a time, pins by number
//! and by share of the pool.
//!
//! Elsewhere: what is offered to others (`exchange.rs`), what is decided about offers (`cooperate.rs`), reading and putting
//! (`service.rs`).

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::{Stream, stream};
use node::Channels;
use proto::v1::cache_server::{Cache as CacheRpc, CacheServer};
use proto::{convert, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use types::{BlockHash, Error, NodeId};

use crate::cooperate::{Giver, Limits, Offered, Taker};
use crate::fetch::{Fetch, Source, fetch_prefix};
use crate::scrub::Pass;
use crate::service::{answer, check_root};
use crate::store::Store;
use crate::table::Purpose;

mod files;
mod pins;

use pins::Pins;
pub(crate) use pins::Wanted;

/// Chains of one `Quote`, and runs of one `Offer`.
pub(crate) const CHAINS_MAX: usize = 64;
/// Blocks whose price one `Quote` says, and so the most that one round can place at a peer: 2 KiB.
const PRICE_BLOCKS_MAX: usize = 512;
/// Offers from which blocks are fetched at a time; more are turned away, and their givers drop the blocks or ask others.
const OFFERS_MAX: usize = 4;
/// Entries of one `Top`.
const TOP_MAX: u64 = 1000;
/// Longest time of one `Warm`.
const WARM_TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// Exports, imports and verifications at a time: each one costs memory or memory bandwidth.
const HEAVY_CALLS_MAX: usize = 2;
/// When a caller that found no place may try again.
const RETRY_MS: u64 = 1000;
/// Longest run that moves to a peer.
const RUN_BLOCKS_MAX: usize = 1024;
/// More moves than this bring next to nothing (`docs/cooperation.md`).
const RECIRCULATIONS_MAX: u8 = 4;
/// A node takes its whole rate only when it is so old.
const RAMP: Duration = Duration::from_secs(60);
/// Longer than a round of a peer takes, with its offers.
const CONFIRMATION_TTL: Duration = Duration::from_secs(5);
/// One of so many slots is kept free ahead of need, so that no request waits for the network.
const MARGIN_SHARE: usize = 64;

/// The service of one store. Clones are one and the same.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    channels: Channels,
    id: NodeId,
    /// Replaced as a whole by nobody: what is decided depends on what was decided before.
    giver: Mutex<Giver>,
    taker: Mutex<Taker>,
    pins: Pins,
    offers: Semaphore,
    heavy: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("store", &self.inner.store).finish()
    }
}

impl Cache {
    /// The service of `store`, whose node is called `id`. It takes nothing any more once `shutdown` began.
    pub fn new(store: Store, id: NodeId, channels: Channels, shutdown: CancellationToken) -> Self {
        let now = crate::store::now();
        let limits = limits(&store);
        Self {
            inner: Arc::new(Inner {
                giver: Mutex::new(Giver::new(id.clone(), limits, now)),
                taker: Mutex::new(Taker::new(limits, now)),
                pins: Pins::new(&store),
                offers: Semaphore::new(OFFERS_MAX),
                heavy: Arc::new(Semaphore::new(HEAVY_CALLS_MAX)),
                store,
                channels,
                id,
                shutdown,
            }),
        }
    }

    /// The service in the form that a server takes.
    pub fn server(&self) -> CacheServer<Self> {
        CacheServer::new(self.clone())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.inner.store
    }

    pub(crate) fn id(&self) -> &NodeId {
        &self.inner.id
    }

    pub(crate) fn channels(&self) -> &Channels {
        &self.inner.channels
    }

    pub(crate) fn giver(&self) -> MutexGuard<'_, Giver> {
        self.inner
            .giver
            .lock()
            .expect("nothing panics while it decides what to give")
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.inner.pins
    }

    /// Slots that are kept free ahead of need. 0 in pools that are too small for it.
    pub(crate) fn margin(&self) -> usize {
        self.inner.store.capacity() / MARGIN_SHARE
    }

    fn taker(&self) -> MutexGuard<'_, Taker> {
        self.inner
            .taker
            .lock()
            .expect("nothing panics while it decides what to take")
    }

    /// Whether the node takes anything from peers.
    fn is_open(&self) -> bool {
        !self.inner.shutdown.is_cancelled()
            && !self.inner.store.is_quarantined()
            && !self.inner.store.is_draining()
    }

    fn chain(&self, field: &str, wire: Option<&v1::BlockChain>) -> Result<Vec<BlockHash>, Error> {
        convert::chain(field, wire, self.inner.store.config().hashes_max)
    }

    fn heavy(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.inner.heavy.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("{HEAVY_CALLS_MAX} exports, imports or verifications run, which is the most allowed");
            Error::overloaded(message, RETRY_MS)
        })
    }

    fn quote(&self, request: &v1::QuoteRequest) -> Result<v1::QuoteResponse, Error> {
        check_root(&self.inner.store, &request.kv_root)?;
        at_most("chains", request.chains.len(), CHAINS_MAX)?;
        let chains = request
            .chains
            .iter()
            .map(|chain| self.chain("chains", Some(chain)));
        let chains: Vec<Vec<BlockHash>> = chains.collect::<Result<_, _>>()?;
        if !self.is_open() {
            // What is said to be held may be gone before it could be counted on.
            return Ok(v1::QuoteResponse {
                held: vec![0; chains.len()],
                price: Vec::new(),
            });
        }
        let now = crate::store::now();
        let room = self.taker().room(now).min(PRICE_BLOCKS_MAX);
        let (held, price) = {
            let mut table = self.inner.store.table();
            let held: Vec<usize> = chains.iter().map(|chain| table.match_len(chain)).collect();
            (held, table.price(room, self.margin(), now))
        };
        let confirmed = chains.iter().zip(&held);
        let confirmed = confirmed.filter_map(|(chain, held)| chain.last().filter(|_| *held == chain.len()));
        let confirmed: Vec<BlockHash> = confirmed.copied().collect();
        self.giver()
            .confirm(&NodeId::new(request.node_id.as_str()), &confirmed, now);
        Ok(v1::QuoteResponse {
            held: held.into_iter().map(|held| held as u64).collect(),
            price,
        })
    }

    async fn offer(&self, request: &v1::OfferRequest) -> Result<v1::OfferResponse, Error> {
        check_root(&self.inner.store, &request.kv_root)?;
        at_most("runs", request.runs.len(), CHAINS_MAX)?;
        let runs: Vec<Run> = request
            .runs
            .iter()
            .map(|run| Run::read(self, run))
            .collect::<Result<_, _>>()?;
        let mut held = vec![0; runs.len()];
        let permit = self.inner.offers.try_acquire();
        if let (Ok(_permit), true) = (permit, self.is_open()) {
            let takes = self.decide(&runs, request.replicate);
            let deadline = Instant::now() + self.inner.store.config().offer_timeout;
            for ((run, takes), held) in runs.iter().zip(takes).zip(&mut held) {
                if takes {
                    *held = self.take(run, &request.grpc_endpoint, deadline).await as u64;
                }
            }
        }
        Ok(v1::OfferResponse { held })
    }

    fn decide(&self, runs: &[Run], replicate: bool) -> Vec<bool> {
        let now = crate::store::now();
        let store = &self.inner.store;
        let price = store.table().price(PRICE_BLOCKS_MAX, self.margin(), now);
        let offered: Vec<Offered> = runs
            .iter()
            .map(|run| Offered {
                blocks: run.hashes.len(),
                worth: if replicate { f32::MAX } else { run.worth },
                attached: run.parent == run.root || store.table().holds(run.parent),
            })
            .collect();
        self.taker().take(&offered, &price, now)
    }

    /// Fetches a run. Returns the leading blocks of it that are held now.
    async fn take(&self, run: &Run, giver: &str, deadline: Instant) -> usize {
        let store = &self.inner.store;
        store.learn_root(run.root);
        let parent = if run.parent == run.root {
            Vec::new()
        } else {
            store.pin_held(&[run.parent])
        };
        let source = Source {
            node_id: giver.to_owned(),
            grpc_endpoint: giver.to_owned(),
            blocks: run.hashes.len(),
        };
        let fetch = Fetch {
            purpose: Purpose::Move,
            root: run.parent,
            chain: &run.hashes,
            from: 0,
            sources: &[source],
            deadline,
        };
        let fetched = fetch_prefix(store, &self.inner.channels, fetch).await;
        let held = fetched.blocks.iter().take_while(|pin| !pin.is_private()).count();
        drop((fetched, parent));
        let now = crate::store::now();
        store.with_table(|table| {
            for hash in &run.hashes[..held] {
                table.lower_worth(*hash, run.worth, now);
            }
            // What was displaced is what the cluster values least: it goes now, and is offered to nobody.
            table.make_room(self.margin(), now);
        });
        let mut giver = self.giver();
        for (hash, recirculations) in run.hashes[..held].iter().zip(&run.recirculations) {
            giver.received(*hash, *recirculations);
        }
        store.inner().metrics.taken_blocks.inc_by(held as u64);
        held
    }

    fn locate(&self, request: &v1::LocateRequest) -> Result<v1::LocateResponse, Error> {
        check_root(&self.inner.store, &request.kv_root)?;
        let chain = self.chain("chain", request.chain.as_ref())?;
        let table = self.inner.store.table();
        let (held, used) = table.usage(&chain);
        let last = held.checked_sub(1).map(|last| chain[last]);
        Ok(v1::LocateResponse {
            held_blocks: held as u64,
            used_blocks: used as u64,
            worth: last
                .and_then(|last| table.worth(last, crate::store::now()))
                .unwrap_or_default(),
        })
    }

    fn top(&self, request: &v1::TopRequest) -> v1::TopResponse {
        let count = request.count.min(TOP_MAX) as usize;
        let now = crate::store::now();
        let ranked = self.inner.store.table().ranked(count, request.coldest, now);
        let blocks = ranked.into_iter().map(|block| v1::TopBlock {
            hash: block.hash.0.to_vec(),
            depth: block.depth as u64,
            pins: block.pins as u64,
            children: block.children as u64,
            worth: block.worth,
        });
        v1::TopResponse {
            blocks: blocks.collect(),
        }
    }

    fn exists(&self, request: &v1::ExistsRequest) -> Result<v1::ExistsResponse, Error> {
        check_root(&self.inner.store, &request.kv_root)?;
        let hashes = self.chain("hashes", request.hashes.as_ref())?;
        let held = self.inner.store.exists(&hashes).into_iter().map(u8::from);
        Ok(v1::ExistsResponse { held: held.collect() })
    }

    fn evict(&self, request: &v1::EvictRequest) -> Result<v1::EvictResponse, Error> {
        check_root(&self.inner.store, &request.kv_root)?;
        let store = &self.inner.store;
        let (evicted, kept) = if request.all {
            store.with_table(|table| {
                let before = table.counts().cached;
                table.make_room(table.counts().capacity, crate::store::now());
                let kept = table.counts().cached;
                (before - kept, kept)
            })
        } else {
            let chain = self.chain("chain", request.chain.as_ref())?;
            store.with_table(|table| table.evict_chain(&chain, crate::store::now()))
        };
        Ok(v1::EvictResponse {
            evicted_blocks: evicted as u64,
            kept_blocks: kept as u64,
        })
    }

    async fn warm(&self, request: &v1::WarmRequest) -> Result<v1::WarmResponse, Error> {
        check_root(&self.inner.store, &request.kv_root)?;
        self.inner.store.check_takes()?;
        let root = convert::hash("root", &request.root)?;
        let chain = self.chain("chain", request.chain.as_ref())?;
        let store = &self.inner.store;
        store.learn_root(root);
        let source = Source {
            node_id: request.source_grpc_endpoint.clone(),
            grpc_endpoint: request.source_grpc_endpoint.clone(),
            blocks: chain.len(),
        };
        let timeout = Duration::from_millis(request.timeout_ms).min(WARM_TIMEOUT_MAX);
        let fetch = Fetch {
            purpose: Purpose::Move,
            root,
            chain: &chain,
            from: 0,
            sources: &[source],
            deadline: Instant::now() + timeout,
        };
        let fetched = fetch_prefix(store, &self.inner.channels, fetch).await;
        let held = fetched.blocks.iter().take_while(|pin| !pin.is_private()).count();
        Ok(v1::WarmResponse {
            held_blocks: held as u64,
            fetched_bytes: fetched.bytes,
        })
    }
}

/// A run that is offered, checked.
struct Run {
    root: BlockHash,
    parent: BlockHash,
    hashes: Vec<BlockHash>,
    worth: f32,
    recirculations: Vec<u8>,
}

impl Run {
    fn read(cache: &Cache, wire: &v1::OfferedRun) -> Result<Self, Error> {
        let hashes = cache.chain("run", wire.run.as_ref())?;
        if wire.recirculations.len() != hashes.len() {
            let message = format!(
                "{} recirculations were given for {} blocks",
                wire.recirculations.len(),
                hashes.len()
            );
            return Err(Error::invalid("recirculations", message));
        }
        Ok(Self {
            root: convert::hash("root", &wire.root)?,
            parent: convert::hash("parent", &wire.parent)?,
            hashes,
            worth: wire.worth,
            recirculations: wire.recirculations.clone(),
        })
    }
}

/// What a store may give and take.
fn limits(store: &Store) -> Limits {
    let config = store.config();
    let block_bytes = store.layout().block_bytes().max(1) as f64;
    Limits {
        blocks_per_second: config.cooperation_bytes_per_second as f64 / block_bytes,
        run_blocks_max: RUN_BLOCKS_MAX,
        recirculations_max: RECIRCULATIONS_MAX,
        copies_max: config.copies_max,
        ramp: RAMP,
        confirmation_ttl: CONFIRMATION_TTL,
    }
}

fn at_most(field: &str, given: usize, max: usize) -> Result<(), Error> {
    if given <= max {
        return Ok(());
    }
    let message = format!("{field} has {given} entries, but at most {max} are allowed");
    Err(Error::invalid(field, message))
}

/// A pass over the pool that its caller follows.
struct Following {
    pass: Pass,
    shutdown: CancellationToken,
    done: bool,
    _permit: OwnedSemaphorePermit,
}

/// The next message of a verification. The last one has verified as many blocks as there were, or the node ends.
async fn next_part(mut following: Following) -> Option<(Result<v1::VerifyResponse, Status>, Following)> {
    if following.done || following.shutdown.is_cancelled() {
        return None;
    }
    following.done = !following.pass.part().await;
    let progress = following.pass.progress();
    Some((Ok(progress), following))
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl CacheRpc for Cache {
    async fn quote(&self, request: Request<v1::QuoteRequest>) -> Answer<v1::QuoteResponse> {
        answer(self.quote(request.get_ref()))
    }

    async fn offer(&self, request: Request<v1::OfferRequest>) -> Answer<v1::OfferResponse> {
        answer(self.offer(request.get_ref()).await)
    }

    async fn exists(&self, request: Request<v1::ExistsRequest>) -> Answer<v1::ExistsResponse> {
        answer(self.exists(request.get_ref()))
    }

    async fn locate(&self, request: Request<v1::LocateRequest>) -> Answer<v1::LocateResponse> {
        answer(self.locate(request.get_ref()))
    }

    async fn top(&self, request: Request<v1::TopRequest>) -> Answer<v1::TopResponse> {
        answer(Ok(self.top(request.get_ref())))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let request = request.get_ref();
        let pinned = check_root(&self.inner.store, &request.kv_root).and_then(|()| {
            let root = convert::hash("root", &request.root)?;
            let chain = self.chain("chain", request.chain.as_ref())?;
            self.inner.pins.pin(&self.inner.store, root, &chain, request)
        });
        answer(pinned)
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        let held = self.inner.pins.unpin(request.get_ref().pin_id);
        answer(Ok(v1::UnpinResponse { held }))
    }

    async fn list_pins(&self, _: Request<v1::ListPinsRequest>) -> Answer<v1::ListPinsResponse> {
        answer(Ok(v1::ListPinsResponse {
            pins: self.inner.pins.list(crate::store::now()),
        }))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictResponse> {
        answer(self.evict(request.get_ref()))
    }

    async fn warm(&self, request: Request<v1::WarmRequest>) -> Answer<v1::WarmResponse> {
        answer(self.warm(request.get_ref()).await)
    }

    type VerifyStream = Pin<Box<dyn Stream<Item = Result<v1::VerifyResponse, Status>> + Send>>;

    async fn verify(&self, _: Request<v1::VerifyRequest>) -> Answer<Self::VerifyStream> {
        answer(self.heavy().map(|permit| {
            let following = Following {
                pass: Pass::new(self.inner.store.clone()),
                shutdown: self.inner.shutdown.clone(),
                done: false,
                _permit: permit,
            };
            let parts: Self::VerifyStream = Box::pin(stream::unfold(following, next_part));
            parts
        }))
    }

    type ExportStream = Pin<Box<dyn Stream<Item = Result<v1::ExportResponse, Status>> + Send>>;

    async fn export(&self, request: Request<v1::ExportRequest>) -> Answer<Self::ExportStream> {
        let request = request.get_ref();
        let exported = check_root(&self.inner.store, &request.kv_root).and_then(|()| {
            let chain = self.chain("chain", request.chain.as_ref())?;
            files::export(&self.inner.store, &chain, self.heavy()?)
        });
        answer(exported.map(|parts| {
            let parts: Self::ExportStream = Box::pin(parts);
            parts
        }))
    }

    async fn import(&self, request: Request<Streaming<v1::ImportRequest>>) -> Answer<v1::ImportResponse> {
        let imported = async {
            self.inner.store.check_takes()?;
            let _permit = self.heavy()?;
            files::import(self, request.into_inner()).await
        };
        answer(imported.await)
    }
}

#[cfg(test)]
mod tests;
