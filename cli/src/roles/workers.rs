//! What each role is made of.

use std::net::SocketAddr;
use std::sync::Arc;

use engine::file::ModelFile;
use kv_store::store_node::{self, StoreNode};
use node::{Drainable, Listeners, LoadSource, NodeService, task};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use types::{Error, KvSpace, NodeRecord, Role};

use super::Process;
use super::drain::{Drain, RouterDrain, Work};
use super::engines::{Engines, ModelSource};
use super::flip::Flip;
use super::membership::Membership;

/// A node with a pool: it prefills, decodes, or holds blocks alone, and may be told to change.
pub(super) async fn pool(process: Process, listeners: Listeners) -> anyhow::Result<()> {
    let source = ModelSource {
        path: process.model.clone(),
        numerics: process.settings.model.numerics(),
    };
    let block_tokens = process.settings.kv.block_tokens;
    let role = process.identity.role;
    let (model, space, context_tokens_max) = match role {
        Role::Store => {
            let (space, context_tokens_max) = facts(&source, block_tokens).await?;
            (None, space, context_tokens_max)
        }
        Role::Router | Role::Prefill | Role::Decode => {
            let model = source.load().await?;
            let space = model.kv_space(block_tokens);
            let context_tokens_max = model.config().context_tokens_max;
            (Some(model), space, context_tokens_max)
        }
    };
    let pool = open_pool(&process, space).await?;
    let record = record(&process, &pool, context_tokens_max);
    let engines = Engines::new(&process, source, model, pool.clone());
    engines.start(role).await?;
    let (registry, _following) = process.registry().await?;
    let exchange = pool.exchange(registry.watch(), process.grpc_endpoint());
    let (store, members, end) = (pool.store().clone(), registry.watch(), process.shutdown.token());
    let quotas = async move { store.follow_quotas(members, end).await };
    let running = engines.clone();
    let work = Work {
        load: Arc::new(engines.clone()),
        // Peers that read are served until the process ends.
        requests: Box::new(move || running.requests()),
    };
    let drain = Drain::new(work, exchange, pool.store().clone(), process.shutdown.token());
    let membership = Membership::new(registry, record.clone());
    let flip = Flip::new(
        engines.clone(),
        drain.clone(),
        membership.clone(),
        process.shutdown.clone(),
    );
    let admin = admin(&process, record, drain.clone()).with_flip(Arc::new(flip));
    let routes = pool
        .grpc()
        .add_service(engines.prefill_server())
        .add_service(engines.decode_server())
        .add_service(admin.server());
    let (exchanging, handed_over) = exchanging(&process, drain);
    let serving = process.serve(routes, listeners, handed_over);
    let work = async move { tokio::join!(serving, engines.ended(), pool.run(), quotas, exchanging).0 };
    process.run(membership, work).await
}

pub(super) async fn router(process: Process, listeners: Listeners) -> anyhow::Result<()> {
    let (path, name) = (process.model.clone(), process.model_name());
    let model = task::blocking("model-open", move || router::Model::open(&path, name))
        .await?
        .map_err(Error::from)?;
    let (registry, _following) = process.registry().await?;
    let record = NodeRecord {
        id: process.identity.id.clone(),
        epoch: process.identity.epoch,
        role: process.identity.role,
        grpc_endpoint: process.grpc_endpoint(),
        http_endpoint: process.http_endpoint(),
        transfer_endpoint: String::new(),
        model: model.name().to_owned(),
        kv_space: None,
        capacity_blocks: 0,
        context_tokens_max: 0,
    };
    let dependencies = router::Dependencies {
        registry: registry.clone(),
        model: Arc::new(model),
        channels: process.channels.clone(),
        metrics: process.metrics.clone(),
        readiness: process.readiness.clone(),
        guard: process.secured.guard.clone(),
        tls: process.secured.tls.clone(),
        node_id: process.identity.id.clone(),
        traces: process.settings.telemetry.clone(),
    };
    let service = router::Service::new(process.settings.router.clone(), dependencies)
        .map_err(|error| Error::invalid("router", error.to_string()))?;
    let drain = RouterDrain::new(
        service.handle(),
        process.readiness.clone(),
        process.shutdown.token(),
    );
    let admin = admin(&process, record.clone(), drain);
    let (serve, shutdown) = (process.settings.node.serve(), process.shutdown.token());
    let work = async move {
        let ran = service
            .run(&serve, Routes::new(admin.server()), listeners, shutdown)
            .await;
        ran.map_err(|error| Error::internal(error.to_string()))
    };
    process.run(Membership::new(registry, record), work).await
}

/// What the pool does with its peers until the process is told to end, and then gives to them. The token is cancelled once that
/// is done: until then peers must be able to read from this node.
fn exchanging(
    process: &Process,
    drain: Drain,
) -> (impl Future<Output = ()> + Send + use<>, CancellationToken) {
    let (shutdown, handed_over) = (process.shutdown.token(), CancellationToken::new());
    let done = handed_over.clone().drop_guard();
    let work = async move {
        let exchange = drain.exchange().clone();
        let drained = shutdown.run_until_cancelled(drain.run());
        tokio::join!(exchange.clone().run(shutdown.clone()), drained);
        let blocks = exchange.hand_over().await;
        tracing::info!(blocks, "gave blocks to the peers");
        drop(done);
    };
    (work, handed_over)
}

fn admin(process: &Process, record: NodeRecord, drain: impl Drainable + LoadSource) -> NodeService {
    let drain = Arc::new(drain);
    NodeService::new(record, drain.clone(), drain, process.shutdown.token())
        .with_log_levels(process.log_levels.clone())
}

/// What a node must know of a model that it has not loaded: the space of its blocks, and its context in tokens.
async fn facts(source: &ModelSource, block_tokens: usize) -> Result<(KvSpace, usize), Error> {
    let ModelSource { path, numerics } = source.clone();
    task::blocking("model-digest", move || {
        let file = ModelFile::open(&path)?;
        let space = engine::model::kv_space(&file, numerics, block_tokens);
        Ok::<_, Error>((space, file.config().context_tokens_max))
    })
    .await?
}

async fn open_pool(process: &Process, space: KvSpace) -> anyhow::Result<StoreNode> {
    let settings = &process.settings;
    let advertise = &settings.node.advertise;
    let config = store_node::Config {
        capacity_bytes: usize::try_from(settings.kv.memory.0).unwrap_or(usize::MAX),
        transfer_listen: SocketAddr::new(settings.node.listen, settings.node.transfer_port),
        transfer: transfer::tcp::Config {
            advertise_host: (!advertise.is_empty()).then(|| advertise.clone()),
            ucx: settings.transfer.ucx_config(),
            huge_pages: settings.kv.huge_pages.into(),
            ..transfer::tcp::Config::default()
        },
        store: settings.store.config(),
        disk: settings.kv.disk_config(&process.identity.id),
        objects: settings.kv.object_config(),
    };
    let shutdown = process.shutdown.token();
    let channels = process.channels.clone();
    let pool = StoreNode::start(
        config,
        space,
        &process.identity,
        channels,
        &process.metrics,
        shutdown,
    )
    .await;
    Ok(pool.map_err(Error::from)?)
}

/// The node's entry in the registry. What the model could take and the pool could not hold is no context.
fn record(process: &Process, pool: &StoreNode, model_context_tokens_max: usize) -> NodeRecord {
    let store = pool.store();
    let pool_tokens = store.capacity() * store.layout().block_tokens;
    let model = process.model_name();
    NodeRecord {
        context_tokens_max: model_context_tokens_max.min(pool_tokens) as u64,
        ..pool.record(
            &process.identity,
            &model,
            &process.grpc_endpoint(),
            &process.http_endpoint(),
        )
    }
}
