//! Changing a node's role without a restart and with the blocks that it has: prefill to decode or back (`perigee node flip`), to a
//! store without a model (`perigee model unload`), and from there to one with an engine (`perigee model load`).
//!
//! The service of the new role starts before anything else happens, its model loaded if need be, so that a failure costs nothing.
//! Then the node takes nothing new, lets its requests end or, after their grace, has them go on elsewhere, and comes back to the
//! registry in the other role. Its pool and its epoch stay what they are: no block changes, so that none has to be named anew. What
//! a store does not need of a model is given back last.
//!
//! Invariant: however a flip ends, the node takes requests afterwards, in the one role or the other.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use node::task::{self, OnEnd};
use node::{Flippable, Shutdown};
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;
use types::{Error, ErrorCode, Role};

use super::drain::Drain;
use super::engines::Engines;
use super::membership::Membership;

/// How long requests that were told to go on elsewhere may take to give back what they hold. Fences close in milliseconds.
const MOVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Changes the role of this process. Clones are one and the same.
#[derive(Clone)]
pub(super) struct Flip {
    engines: Engines,
    drain: Drain,
    membership: Membership,
    shutdown: Shutdown,
    one_by_one: Arc<Mutex<()>>,
}

impl Flip {
    pub(super) fn new(engines: Engines, drain: Drain, membership: Membership, shutdown: Shutdown) -> Self {
        Self {
            engines,
            drain,
            membership,
            shutdown,
            one_by_one: Arc::default(),
        }
    }

    async fn run(&self, to: Role, grace: Duration) -> Result<Role, Error> {
        let _alone = self
            .one_by_one
            .try_lock()
            .map_err(|_| Error::new(ErrorCode::Conflict, "the node changes its role already"))?;
        let from = self.engines.role();
        if to == from {
            return Ok(from);
        }
        self.engines.start(to).await?;
        self.drain.begin_flip()?;
        let idle = self.let_go(grace).await;
        if idle.is_ok() {
            tracing::info!(%from, %to, "changes its role");
            self.engines.set_role(to);
            self.membership.change(to, &self.shutdown).await;
            if to == Role::Store {
                self.engines.unload().await;
            }
        }
        self.drain.end_flip();
        idle.map(|()| from)
    }

    /// Waits until no request runs here any more.
    async fn let_go(&self, grace: Duration) -> Result<(), Error> {
        if timeout(grace, self.drain.idle()).await.is_ok() {
            return Ok(());
        }
        tracing::info!(
            requests = self.engines.requests(),
            "has its requests go on elsewhere"
        );
        self.engines.move_away();
        timeout(MOVE_TIMEOUT, self.drain.idle()).await.map_err(|_| {
            let requests = self.engines.requests();
            let message = format!(
                "{requests} requests did not end when they were told to, so that the node keeps its role"
            );
            Error::new(ErrorCode::Timeout, message)
        })
    }
}

impl Flippable for Flip {
    fn role(&self) -> Role {
        self.engines.role()
    }

    fn flip(&self, to: Role, grace: Duration) -> BoxFuture<'_, Result<Role, Error>> {
        let (flip, (done_tx, done_rx)) = (self.clone(), oneshot::channel());
        // A task of its own, since whoever asks may go away in the middle.
        task::spawn("flip", OnEnd::Log, async move {
            let flipped = flip.run(to, grace).await;
            let _ = done_tx.send(flipped);
            Ok::<(), Error>(())
        });
        Box::pin(async move {
            let ended = |_| Error::internal("the change of the role did not come to an end");
            done_rx.await.map_err(ended)?
        })
    }
}
