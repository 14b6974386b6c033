//! This process as a member of the cluster: its entry in the registry, from its registration to its end.

use std::sync::Arc;
use std::time::Duration;

use node::Shutdown;
use node::registry::{Registration, Registry};
use tokio::sync::Mutex;
use types::{Error, NodeRecord, Role};

/// Between two tries to come back under another role. Each try waits for the registry by itself.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A member. Clones are one and the same.
#[derive(Clone)]
pub(super) struct Membership {
    shared: Arc<Shared>,
}

struct Shared {
    registry: Arc<dyn Registry>,
    record: NodeRecord,
    held: Mutex<Option<Registration>>,
}

impl Membership {
    /// Nobody knows of it yet.
    pub(super) fn new(registry: Arc<dyn Registry>, record: NodeRecord) -> Self {
        Self {
            shared: Arc::new(Shared {
                registry,
                record,
                held: Mutex::default(),
            }),
        }
    }

    /// Registers, unless the process is told to end before the registry answers.
    pub(super) async fn join(&self, shutdown: &Shutdown) -> Result<(), Error> {
        let mut held = self.shared.held.lock().await;
        tokio::select! {
            biased;
            () = shutdown.started() => {}
            registration = self.shared.registry.register(self.shared.record.clone()) => *held = Some(registration?),
        }
        Ok(())
    }

    /// Leaves the registry.
    pub(super) async fn leave(&self) {
        if let Some(registration) = self.shared.held.lock().await.take()
            && let Err(error) = registration.unregister().await
        {
            tracing::warn!(%error, "could not leave the registry, the lease will run out");
        }
    }

    /// Leaves, and comes back under another role: whoever follows the members takes it for another node with the same blocks.
    /// Tries until it is a member again or the process ends, since nobody finds a node that is none.
    pub(super) async fn change(&self, role: Role, shutdown: &Shutdown) {
        self.leave().await;
        let mut held = self.shared.held.lock().await;
        let record = NodeRecord {
            role,
            ..self.shared.record.clone()
        };
        loop {
            let again = async {
                match self.shared.registry.register(record.clone()).await {
                    Ok(registration) => Some(registration),
                    Err(error) => {
                        tracing::warn!(%error, %role, "could not register again, tries on");
                        tokio::time::sleep(RETRY_INTERVAL).await;
                        None
                    }
                }
            };
            tokio::select! {
                biased;
                () = shutdown.started() => return,
                registration = again => if registration.is_some() {
                    *held = registration;
                    return;
                },
            }
        }
    }
}
