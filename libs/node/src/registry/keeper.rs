//! Keeps one node registered: prolongs its lease, and registers again when the lease is gone.
//!
//! Invariant: whatever the registry does, the keeper goes on trying, at a bounded rate, until the registration is
//! given back. It stops by itself only when a newer incarnation of the node has taken over.

use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use types::{ErrorCode, NodeRecord};

use super::{Alive, CALL_DEADLINE, Config, RETRY_FIRST, RETRY_LONGEST, RegistryError, Session};
use crate::backoff::{self, Backoff};
use crate::task::{self, OnEnd};

/// Keep-alives per lease: two may be lost before the lease is.
const KEEP_ALIVES_PER_LEASE: u32 = 3;
/// A call on a short lease still gets this long.
const CALL_DEADLINE_MIN: Duration = Duration::from_millis(500);

/// Where a registration stands.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// The node is a member.
    Registered,
    /// The registry does not answer, or the lease was lost. It is being tried again.
    Retrying(RegistryError),
    /// The registry does not take the node back. A conflict is tried again once per lease; a node that is fenced must
    /// not come back, and what it holds must not be used any more.
    Refused(RegistryError),
}

/// Keeps its node a member for as long as it lives. Dropping it is like dying: the lease runs out.
/// [`Registration::unregister`] ends it at once.
#[derive(Debug)]
pub struct Registration {
    stop: oneshot::Sender<oneshot::Sender<Result<(), RegistryError>>>,
    state: watch::Receiver<State>,
}

impl Registration {
    /// Follows where the registration stands.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Ends the membership. The first step of a graceful end, so that nobody sends new work.
    ///
    /// # Errors
    ///
    /// The registry did not answer: the lease will run out instead.
    pub async fn unregister(self) -> Result<(), RegistryError> {
        let (done_tx, done_rx) = oneshot::channel();
        // A keeper that has stopped (fenced) or dies holds no membership that could be ended.
        if self.stop.send(done_tx).is_err() {
            return Ok(());
        }
        done_rx.await.unwrap_or(Ok(()))
    }
}

/// Registers `record`, trying for [`Config::connect_deadline`], and keeps it registered.
pub(super) async fn register<S: Session>(
    mut session: S,
    record: NodeRecord,
    config: &Config,
) -> Result<Registration, RegistryError> {
    let retry = Backoff::new(RETRY_FIRST, RETRY_LONGEST, backoff::seed(record.id.as_str()));
    let lease = first_registration(&mut session, &record, retry.clone(), config.connect_deadline).await?;
    tracing::info!(node_id = %record.id, epoch = %record.epoch, "registered");
    let (stop_tx, stop_rx) = oneshot::channel();
    let (state_tx, state_rx) = watch::channel(State::Registered);
    let keeper = Keeper {
        session,
        record,
        lease_ttl: config.lease_ttl,
        retry,
        lease: Some(lease),
        state: state_tx,
    };
    task::spawn("registration", OnEnd::Log, keeper.run(stop_rx));
    Ok(Registration {
        stop: stop_tx,
        state: state_rx,
    })
}

async fn first_registration<S: Session>(
    session: &mut S,
    record: &NodeRecord,
    mut retry: Backoff,
    deadline: Duration,
) -> Result<u64, RegistryError> {
    let deadline = tokio::time::Instant::now() + deadline;
    loop {
        let failure = match within(CALL_DEADLINE, session.register(record)).await {
            Ok(lease) => return Ok(lease),
            Err(failure @ RegistryError::Unreachable { .. }) => failure,
            Err(failure @ (RegistryError::Config(_) | RegistryError::Refused(_))) => return Err(failure),
        };
        let next_try = tokio::time::Instant::now() + retry.next_wait();
        if next_try >= deadline {
            return Err(failure);
        }
        tokio::time::sleep_until(next_try).await;
    }
}

struct Keeper<S> {
    session: S,
    record: NodeRecord,
    lease_ttl: Duration,
    retry: Backoff,
    /// `None` while the node is to be registered again.
    lease: Option<u64>,
    state: watch::Sender<State>,
}

impl<S: Session> Keeper<S> {
    async fn run(
        mut self,
        mut stop: oneshot::Receiver<oneshot::Sender<Result<(), RegistryError>>>,
    ) -> Result<(), RegistryError> {
        let mut wait = self.interval();
        loop {
            tokio::select! {
                // Who gives the registration back shall not wait for a registry that hangs.
                biased;
                stopped = &mut stop => {
                    // Dropped without a word: the lease runs out.
                    if let Ok(done) = stopped {
                        let _ = done.send(self.unregister().await);
                    }
                    return Ok(());
                }
                next = async { tokio::time::sleep(wait).await; self.step().await } => match next {
                    Some(next) => wait = next,
                    None => return Ok(()),
                },
            }
        }
    }

    fn interval(&self) -> Duration {
        self.lease_ttl / KEEP_ALIVES_PER_LEASE
    }

    fn call_deadline(&self) -> Duration {
        self.interval().clamp(CALL_DEADLINE_MIN, CALL_DEADLINE)
    }

    /// Does what is due, and says when the next thing is; `None` if never.
    async fn step(&mut self) -> Option<Duration> {
        let deadline = self.call_deadline();
        let result = match self.lease {
            Some(lease) => match within(deadline, self.session.keep_alive(&self.record, lease)).await {
                Ok(Alive::Yes) => Ok(()),
                Ok(Alive::Gone) => {
                    tracing::warn!(node_id = %self.record.id, "lease was lost, registering again");
                    self.lease = None;
                    self.register_again(deadline).await
                }
                Err(error) => Err(error),
            },
            None => self.register_again(deadline).await,
        };
        self.judge(result)
    }

    async fn register_again(&mut self, deadline: Duration) -> Result<(), RegistryError> {
        let lease = within(deadline, self.session.register(&self.record)).await?;
        tracing::info!(node_id = %self.record.id, "registered again");
        self.lease = Some(lease);
        Ok(())
    }

    fn judge(&mut self, result: Result<(), RegistryError>) -> Option<Duration> {
        let Err(error) = result else {
            self.retry.reset();
            self.enter(State::Registered);
            return Some(self.interval());
        };
        let node_id = &self.record.id;
        match &error {
            RegistryError::Unreachable { .. } | RegistryError::Config(_) => {
                tracing::debug!(%node_id, %error, "registration is tried again");
                self.enter(State::Retrying(error));
                Some(self.retry.next_wait().min(self.interval()))
            }
            RegistryError::Refused(_) => {
                let fenced = error.code() == ErrorCode::Fenced;
                tracing::error!(%node_id, %error, "registry does not take this node back");
                self.enter(State::Refused(error));
                (!fenced).then_some(self.lease_ttl)
            }
        }
    }

    fn enter(&self, state: State) {
        self.state.send_if_modified(|current| {
            let changed = std::mem::discriminant(current) != std::mem::discriminant(&state);
            *current = state;
            changed
        });
    }

    async fn unregister(&mut self) -> Result<(), RegistryError> {
        let Some(lease) = self.lease.take() else {
            return Ok(());
        };
        within(CALL_DEADLINE, self.session.unregister(lease)).await
    }
}

async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, RegistryError>>,
) -> Result<T, RegistryError> {
    match timeout(deadline, call).await {
        Ok(result) => result,
        Err(_) => Err(RegistryError::Unreachable {
            registry: "of this cluster".to_owned(),
            reason: format!("no answer within {deadline:?}"),
        }),
    }
}
