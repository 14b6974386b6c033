//! The roles as processes: `perigee router | prefill | decode | store`.
//!
//! Every role starts in the same steps: settings (a bad one ends it with exit code 64 before anything is bound), logs,
//! listeners, model, memory, services, registration. It ends in the opposite order: unregister, drain, stop.

mod drain;
mod engines;
mod flip;
mod membership;
mod workers;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use membership::Membership;
use node::registry::{self, Registry};
use node::serve::Server;
use node::telemetry::LogLevels;
use node::tls::ClientCertificates;
use node::{Channels, Connector, Identity, Listeners, Metrics, Readiness, Shutdown, Tls, identity, task};
use router::Guard;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::Routes;
use types::{Error, ErrorCode, Role};

use crate::arguments::RoleArgs;
use crate::reach;
use crate::settings::{self, Settings};

/// A condition of readiness: the cluster knows this node.
const REGISTERED: &str = "registered";

/// Runs a role until it is told to end.
pub(crate) fn run(role: Role, flags: &RoleArgs) -> anyhow::Result<()> {
    let loaded = settings::load(flags)?;
    settings::warn_of_unknown(&loaded);
    let settings = loaded.value;
    settings.validate()?;
    if role != Role::Router {
        settings.transfer.check_library()?;
    }
    let tls = reach::load_tls(&settings.tls)?;
    let guard = match role {
        Role::Router => Guard::new(&settings.router, tls.is_some())
            .map_err(|error| Error::invalid("router.api_keys_file", error.message))?,
        Role::Prefill | Role::Decode | Role::Store => Guard::default(),
    };
    let model = model_path(&settings)?;
    if flags.check_config {
        return check(&loaded.unknown_keys);
    }
    if settings.registry.url.is_empty() {
        return Err(Error::invalid(
            "registry.url",
            "no registry is given: --registry etcd://HOST:PORT, or run a whole cluster with perigee up",
        )
        .into());
    }
    let log_levels = node::telemetry::init(&settings.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let secured = Secured { tls, guard };
    let result = runtime.block_on(serve(
        role,
        settings,
        model,
        secured,
        log_levels,
        flags.exit_with_parent,
    ));
    // Tasks that do not end by themselves must not hold the process up.
    runtime.shutdown_background();
    result
}

fn check(unknown_keys: &[String]) -> anyhow::Result<()> {
    match unknown_keys {
        [] => {
            eprintln!("the configuration is valid");
            Ok(())
        }
        keys => Err(Error::invalid("config", format!("unknown settings: {}", keys.join(", "))).into()),
    }
}

fn model_path(settings: &Settings) -> Result<PathBuf, Error> {
    let path = &settings.model.path;
    if path.is_empty() {
        return Err(Error::invalid(
            "model.path",
            "no model is given: --model PATH (perigee model pull gets one)",
        ));
    }
    if !Path::new(path).exists() {
        return Err(Error::new(
            ErrorCode::NotFound,
            format!("model {path} does not exist"),
        ));
    }
    Ok(path.into())
}

/// What keeps strangers out.
struct Secured {
    tls: Option<Tls>,
    /// A router's. Nodes have no callers but members.
    guard: Guard,
}

/// What every role has once it is bound.
struct Process {
    settings: Settings,
    model: PathBuf,
    identity: Identity,
    shutdown: Shutdown,
    log_levels: LogLevels,
    metrics: Metrics,
    readiness: Readiness,
    secured: Secured,
    channels: Channels,
    grpc_address: SocketAddr,
    http_address: SocketAddr,
}

async fn serve(
    role: Role,
    settings: Settings,
    model: PathBuf,
    secured: Secured,
    log_levels: LogLevels,
    exit_with_parent: bool,
) -> anyhow::Result<()> {
    let shutdown = if exit_with_parent {
        Shutdown::listen_with_parent()?
    } else {
        Shutdown::listen()?
    };
    let id = match settings.node.id.as_str() {
        "" => identity::default_node_id(role, &identity::hostname()),
        id => identity::node_id(id)?,
    };
    let identity = Identity {
        id,
        role,
        epoch: identity::epoch(SystemTime::now(), None),
    };
    let serve = settings.node.serve();
    let listeners = Listeners::bind(&serve)
        .await
        .map_err(|error| Error::new(error.code(), error.to_string()))?;
    tracing::info!(
        node_id = %identity.id,
        epoch = %identity.epoch,
        %role,
        grpc = %listeners.grpc_address(),
        http = %listeners.http_address(),
        "starting"
    );
    let process = Process {
        settings,
        model,
        identity,
        shutdown: shutdown.clone(),
        log_levels,
        metrics: Metrics::new(),
        readiness: Readiness::new([REGISTERED]),
        channels: Channels::over(Connector::new(secured.tls.clone())),
        secured,
        grpc_address: listeners.grpc_address(),
        http_address: listeners.http_address(),
    };
    process.follow_certificates();
    match role {
        Role::Router => workers::router(process, listeners).await?,
        Role::Prefill | Role::Decode | Role::Store => workers::pool(process, listeners).await?,
    }
    match shutdown.failure() {
        Some(error) => Err(error.clone().into()),
        None => Ok(()),
    }
}

impl Process {
    /// The name under which clients ask for the model: the setting, or the file's name without its format and quantisation.
    fn model_name(&self) -> String {
        model_name(&self.settings.model.name, &self.model)
    }

    fn grpc_endpoint(&self) -> String {
        self.settings.node.reached_at(self.grpc_address.port())
    }

    fn http_endpoint(&self) -> String {
        self.settings.node.reached_at(self.http_address.port())
    }

    /// Reads the certificates again when they change.
    fn follow_certificates(&self) {
        if let Some(tls) = self.secured.tls.clone() {
            task::spawn(
                "certificates",
                task::OnEnd::Log,
                tls.follow(self.shutdown.token()),
            );
        }
    }

    /// Connects to the registry. It outlives the shutdown's start, so that the node can leave it.
    async fn registry(&self) -> Result<(Arc<dyn Registry>, DropGuard), Error> {
        let settings = &self.settings.registry;
        let connector = Connector::new(self.secured.tls.clone());
        let (config, end) = (settings.config(connector), CancellationToken::new());
        let registry = registry::connect(&settings.url, &config, end.clone());
        tokio::select! {
            biased;
            () = self.shutdown.started() => Err(Error::unavailable("told to end before the registry answered")),
            registry = registry => Ok((registry?, end.drop_guard())),
        }
    }

    /// Serves `routes` of a role that has no HTTP of its own, until `end`.
    fn serve(
        &self,
        routes: Routes,
        listeners: Listeners,
        end: CancellationToken,
    ) -> impl Future<Output = Result<(), Error>> + Send + 'static {
        let server = Server::new(
            &self.settings.node.serve(),
            self.readiness.clone(),
            self.metrics.clone(),
        )
        .tls(self.secured.tls.clone(), ClientCertificates::Required)
        .grpc(routes);
        async move {
            let served = server.run(listeners, end).await;
            served.map_err(|error| Error::new(error.code(), error.to_string()))
        }
    }

    /// Runs `work`, registers, waits until shutdown, unregisters, and waits for the end of `work`.
    async fn run(
        self,
        membership: Membership,
        work: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) -> anyhow::Result<()> {
        let working = task::spawn("role", task::OnEnd::FailProcess(self.shutdown.clone()), work);
        membership.join(&self.shutdown).await?;
        self.readiness.meet(REGISTERED);
        self.shutdown.started().await;
        membership.leave().await;
        working.await.context("wait for the role's task")
    }
}

/// The name that the settings give to the model at `path`, or that of its file.
pub(crate) fn model_name(setting: &str, path: &Path) -> String {
    match setting {
        "" => default_model_name(path),
        name => name.to_owned(),
    }
}

/// `models/SmolLM2-135M-Instruct.Q4_1.gguf` gives `SmolLM2-135M-Instruct`.
fn default_model_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let Some(stem) = name.strip_suffix(".gguf") else {
        return name.into_owned();
    };
    let quantised = |part: &str| {
        let part = part.to_ascii_uppercase();
        let formats = ["F16", "F32", "BF16"];
        formats.contains(&part.as_str())
            || (part.starts_with('Q') && part[1..].starts_with(|digit: char| digit.is_ascii_digit()))
    };
    match stem.rsplit_once(['.', '-']) {
        Some((base, last)) if quantised(last) => base.to_owned(),
        Some(_) | None => stem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_after_its_file() {
        for (path, name) in [
            ("models/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("Llama-3.1-8B-Q4_K_M.gguf", "Llama-3.1-8B"),
            ("a/b/tiny.gguf", "tiny"),
            ("/models/org--model", "org--model"),
        ] {
            assert_eq!(default_model_name(Path::new(path)), name);
        }
    }
}
