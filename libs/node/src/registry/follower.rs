//! Follows the members, over either implementation, and makes it a [`Registry`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use types::{NodeRecord, TenantQuota};

use super::view::{Change, View};
use super::{
    Backend, Config, Members, RETRY_FIRST, RETRY_LONGEST, Registration, Registry, RegistryError, keeper,
};
use crate::backoff::{self, Backoff};
use crate::task::{self, OnEnd};

/// Follows the members until `shutdown`. Returns when they are known.
pub(super) async fn start<B: Backend>(
    backend: B,
    config: &Config,
    shutdown: CancellationToken,
) -> Result<Arc<dyn Registry>, RegistryError> {
    let follower = Arc::new(Follower::new(backend.clone(), config));
    let mut members = follower.members.subscribe();
    let run = Arc::clone(&follower).run();
    task::spawn("members", OnEnd::Log, async move {
        // Never ends by itself.
        shutdown.run_until_cancelled(run).await;
        Ok::<(), RegistryError>(())
    });
    let known = members.wait_for(|members| members.connected);
    match tokio::time::timeout(config.connect_deadline, known).await {
        Ok(Ok(_)) => {}
        // The task ended: the process is shutting down before it got anywhere.
        Ok(Err(_)) => return Err(follower.unreachable("shutting down")),
        Err(_) => {
            follower.given_up.cancel();
            return Err(follower.unreachable(&format!("no answer within {:?}", config.connect_deadline)));
        }
    }
    Ok(Arc::new(Member {
        backend,
        config: config.clone(),
        members,
    }))
}

/// What [`super::connect`] gives.
#[derive(Debug)]
struct Member<B> {
    backend: B,
    config: Config,
    members: watch::Receiver<Arc<Members>>,
}

impl<B: Backend> Registry for Member<B> {
    fn register(&self, record: NodeRecord) -> BoxFuture<'_, Result<Registration, RegistryError>> {
        keeper::register(self.backend.session(), record, &self.config).boxed()
    }

    fn put_quota(&self, tenant: &str, quota: TenantQuota) -> BoxFuture<'_, Result<(), RegistryError>> {
        // Judged by what is known here: what only etcd could count is not worth a transaction.
        let mut known = self.members.borrow().quotas.clone();
        let tenant = tenant.to_owned();
        async move {
            super::set_quota(&mut known, &tenant, quota).map_err(RegistryError::Refused)?;
            self.backend.put_quota(&tenant, quota).await
        }
        .boxed()
    }

    fn watch(&self) -> watch::Receiver<Arc<Members>> {
        self.members.clone()
    }
}

struct Follower<B> {
    backend: B,
    view: Mutex<View>,
    members: watch::Sender<Arc<Members>>,
    /// Wakes the clock after every change.
    changed: Notify,
    /// Why the registry could not be reached last.
    failure: Mutex<Option<RegistryError>>,
    /// Nobody waits for the members any more.
    given_up: CancellationToken,
}

impl<B: Backend> Follower<B> {
    fn new(backend: B, config: &Config) -> Self {
        Self {
            backend,
            view: Mutex::new(View::new(config.lease_ttl)),
            members: watch::Sender::new(Arc::default()),
            changed: Notify::new(),
            failure: Mutex::new(None),
            given_up: CancellationToken::new(),
        }
    }

    async fn run(self: Arc<Self>) {
        let connect = self.keep_connected();
        let expire = self.expire_in_time();
        tokio::select! {
            () = self.given_up.cancelled() => {}
            () = connect => {}
            () = expire => {}
        }
    }

    async fn keep_connected(&self) {
        let mut retry = Backoff::new(RETRY_FIRST, RETRY_LONGEST, backoff::seed(self.backend.address()));
        loop {
            let failure = self.backend.follow(&|change| self.apply(change)).await;
            // One line per outage: a registry that is away for an hour must not fill the log.
            if self.disconnect() {
                retry.reset();
                tracing::warn!(%failure, "registry is lost, going on with the last members");
            }
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
            tokio::time::sleep(retry.next_wait()).await;
        }
    }

    async fn expire_in_time(&self) {
        loop {
            let at = self
                .view
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .expires_at();
            let due = async {
                match at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => self.update(|view| { view.expire(Instant::now()); }),
                () = self.changed.notified() => {}
            }
        }
    }

    fn apply(&self, change: Change) {
        self.update(|view| {
            if !view.members().connected {
                tracing::info!(registry = self.backend.address(), "following the members");
            }
            view.apply(change, Instant::now());
        });
    }

    /// Whether it was connected.
    fn disconnect(&self) -> bool {
        let was_connected = self.members.borrow().connected;
        if was_connected {
            self.update(View::disconnect);
        }
        was_connected
    }

    fn update(&self, change: impl FnOnce(&mut View)) {
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut view);
        // Sent under the lock, so that a newer state is never replaced by an older one.
        self.members.send_if_modified(|members| {
            let changed = **members != *view.members();
            if changed {
                *members = Arc::new(view.members().clone());
            }
            changed
        });
        drop(view);
        self.changed.notify_one();
    }

    fn unreachable(&self, reason: &str) -> RegistryError {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failure.unwrap_or_else(|| RegistryError::Unreachable {
            registry: self.backend.address().to_owned(),
            reason: reason.to_owned(),
        })
    }
}
