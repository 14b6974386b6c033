//! One transfer through the in-memory network, from its draw to its end and what straggles behind it.

use std::sync::Arc;

use tokio::time::{Instant, sleep, timeout_at};
use types::Memory;

use super::plan::{Plan, Random};
use super::{Link, Network, Node, What};
use crate::TransferError;
use crate::barrier::Ticket;
use crate::memory::{MemoryError, copy_in, copy_out};
use crate::region::{Direction, Grant, Refused};
use crate::transport::{RemoteRegion, Slice, TransferBatch, TransferStats, check_batch};

/// A transfer under way.
pub(super) struct Transfer {
    network: Arc<Network>,
    node: Arc<Node>,
    number: u64,
    direction: Direction,
    memory: Arc<dyn Memory>,
    remote: RemoteRegion,
    slices: Vec<Slice>,
    plan: Plan,
    /// Chunks of the plan that arrived.
    arrived: usize,
    /// The peer's incarnation and its grant, once the first chunk was admitted.
    admitted: Option<(Arc<Node>, Arc<Grant>)>,
}

impl Transfer {
    /// Checks what can be checked here, and draws the transfer's fate.
    pub(super) fn begin(
        network: &Arc<Network>,
        node: &Arc<Node>,
        direction: Direction,
        batch: TransferBatch,
    ) -> Result<Self, TransferError> {
        let memory = node.regions.memory(batch.region)?;
        check_batch(&batch, memory.len() as u64)?;
        if !batch.remote.endpoint.starts_with("mem://") {
            let endpoint = batch.remote.endpoint;
            return Err(TransferError::UnsupportedEndpoint { endpoint });
        }
        let number = {
            let mut inner = network.inner();
            inner.transfers += 1;
            inner.transfers
        };
        network.log(What::Begun {
            transfer: number,
            from: node.endpoint.clone(),
            to: batch.remote.endpoint.clone(),
            bytes: batch.slices.iter().map(|slice| slice.len).sum(),
        });
        let mut random = Random::new(network.seed, number);
        let plan = Plan::draw(&mut random, &network.faults, &batch.slices);
        Ok(Self {
            network: network.clone(),
            node: node.clone(),
            number,
            direction,
            memory,
            remote: batch.remote,
            slices: batch.slices,
            plan,
            arrived: 0,
            admitted: None,
        })
    }

    pub(super) fn remote_endpoint(&self) -> &str {
        &self.remote.endpoint
    }

    /// Moves everything, or fails. `ticket` is dropped when that is decided.
    pub(super) async fn run(
        mut self,
        link: &Link,
        ticket: Option<Ticket>,
        deadline: Instant,
    ) -> Result<TransferStats, TransferError> {
        let begun = Instant::now();
        let killed = self.node.killed.clone();
        let moving = killed.run_until_cancelled(link.torn_down.run_until_cancelled(self.deliver()));
        let result = match timeout_at(deadline, moving).await {
            Err(_) => Err(TransferError::Timeout {
                endpoint: self.remote.endpoint.clone(),
            }),
            Ok(None) => Err(TransferError::Closed),
            Ok(Some(None)) => Err(self.lost("torn down")),
            Ok(Some(Some(result))) => result,
        };
        drop(ticket);
        self.network.log(What::Ended {
            transfer: self.number,
            error: result.as_ref().err().map(TransferError::code),
        });
        if result.is_err() {
            self.straggle();
        }
        result.map(|bytes| TransferStats {
            bytes,
            requests: 1,
            elapsed: begun.elapsed(),
            mover: "mem",
        })
    }

    /// Moves chunk by chunk, as far as the plan and the network let it.
    async fn deliver(&mut self) -> Result<u64, TransferError> {
        let mut bytes = 0;
        if self.plan.chunks.is_empty() {
            return Ok(bytes);
        }
        let network = self.network.clone();
        loop {
            let next = self.plan.chunks.get(self.arrived).copied();
            let delay = next.map_or(self.plan.acknowledgement, |(_, delay)| delay);
            // Even a sleep of nothing lasts until the timer's next millisecond.
            if !delay.is_zero() {
                sleep(delay).await;
            }
            network.passage(&self.node.endpoint, &self.remote.endpoint).await;
            if self.plan.breaks_before == Some(self.arrived) {
                network.log(What::Broken {
                    transfer: self.number,
                    chunks: self.plan.chunks.len() - self.arrived,
                });
                return Err(self.lost("broken by the network"));
            }
            let (peer, grant) = self.peer()?;
            let Some((chunk, _)) = next else {
                return Ok(bytes);
            };
            let flip = self.plan.flips.get(&self.arrived).copied();
            match self.move_chunk(&grant, chunk, flip) {
                Ok(Some(())) => {}
                Ok(None) => return Err(refused(&peer, self.unknown_key())),
                Err(error) => return Err(self.lost(&error.to_string())),
            }
            match self.direction {
                Direction::Write => peer.stats.received_bytes.add(chunk.len),
                Direction::Read => peer.stats.served_bytes.add(chunk.len),
            }
            network.log(What::Moved {
                transfer: self.number,
                remote_offset: chunk.remote_offset,
                len: chunk.len,
            });
            if let Some(bit) = flip {
                network.log(What::Flipped {
                    transfer: self.number,
                    remote_offset: chunk.remote_offset,
                    bit,
                });
            }
            self.arrived += 1;
            bytes += chunk.len;
        }
    }

    /// `None` if the grant is closed.
    fn move_chunk(&self, grant: &Grant, chunk: Slice, flip: Option<u64>) -> Result<Option<()>, MemoryError> {
        let changed = |mut bytes: Vec<u8>| {
            if let Some(bit) = flip {
                bytes[bit as usize / 8] ^= 1 << (bit % 8);
            }
            bytes
        };
        // Checked against both memories before: inside them, and so inside `usize`.
        let (local, remote, len) = (
            chunk.local_offset as usize,
            chunk.remote_offset as usize,
            chunk.len as usize,
        );
        match self.direction {
            Direction::Write => {
                let bytes = changed(copy_out(&*self.memory, local, len)?);
                let target = &**grant.memory();
                grant.touch(|| copy_in(target, remote, &bytes)).transpose()
            }
            Direction::Read => {
                let source = &**grant.memory();
                let bytes = grant.touch(|| copy_out(source, remote, len)).transpose()?;
                bytes
                    .map(|bytes| copy_in(&*self.memory, local, &changed(bytes)))
                    .transpose()
            }
        }
    }

    /// The incarnation at the other end and its grant, which are the same from the first chunk to the last.
    fn peer(&mut self) -> Result<(Arc<Node>, Arc<Grant>), TransferError> {
        let living = self.network.inner().nodes.get(&self.remote.endpoint).cloned();
        match (&self.admitted, living) {
            (Some((peer, grant)), Some(living)) if Arc::ptr_eq(peer, &living) => {
                Ok((peer.clone(), grant.clone()))
            }
            (Some(_), _) => Err(self.lost("the peer is gone")),
            (None, None) => Err(TransferError::Unreachable {
                endpoint: self.remote.endpoint.clone(),
                reason: "nobody is there".into(),
            }),
            (None, Some(living)) => {
                let grant = self.admit(&living)?;
                self.admitted = Some((living.clone(), grant.clone()));
                Ok((living, grant))
            }
        }
    }

    /// The peer's check of the whole batch.
    fn admit(&self, peer: &Node) -> Result<Arc<Grant>, TransferError> {
        let (endpoint, key) = (self.remote.endpoint.clone(), self.remote.key);
        let (epoch, current) = (self.remote.epoch, peer.epoch);
        if epoch != current {
            let fenced = TransferError::Fenced {
                endpoint,
                epoch,
                current,
            };
            return Err(refused(peer, fenced));
        }
        let grant = peer.regions.lookup(key);
        let grant = grant.ok_or_else(|| refused(peer, self.unknown_key()))?;
        let table = self.slices.iter().filter(|slice| slice.len > 0);
        let table: Vec<_> = table.map(|slice| (slice.remote_offset, slice.len)).collect();
        match grant.admit(self.direction, table.iter().copied()) {
            Ok(()) => Ok(grant),
            Err(Refused::Denied) => Err(refused(peer, TransferError::Denied { endpoint, key })),
            Err(Refused::OutOfRange { slice }) => {
                let (offset, len) = table[slice];
                let outside = TransferError::OutOfRange {
                    endpoint,
                    offset,
                    len,
                };
                Err(refused(peer, outside))
            }
        }
    }

    /// Lets what had not arrived arrive later, if the plan says so, to knock at the fence.
    fn straggle(self) {
        let (Some(delay), Direction::Write, Some((_, grant))) =
            (self.plan.straggles_after, self.direction, self.admitted)
        else {
            return;
        };
        let missing: Vec<_> = self.plan.chunks[self.arrived..]
            .iter()
            .filter_map(|(chunk, _)| {
                let bytes = copy_out(&*self.memory, chunk.local_offset as usize, chunk.len as usize);
                Some((chunk.remote_offset, bytes.ok()?))
            })
            .collect();
        let (network, transfer) = (self.network, self.number);
        tokio::spawn(async move {
            sleep(delay).await;
            for (remote_offset, bytes) in missing {
                let target = &**grant.memory();
                let written = grant.touch(|| copy_in(target, remote_offset as usize, &bytes));
                network.log(What::Straggled {
                    transfer,
                    remote_offset,
                    len: bytes.len() as u64,
                    landed: matches!(written, Some(Ok(()))),
                });
            }
        });
    }

    fn lost(&self, reason: &str) -> TransferError {
        TransferError::ConnectionLost {
            endpoint: self.remote.endpoint.clone(),
            reason: reason.to_owned(),
        }
    }

    fn unknown_key(&self) -> TransferError {
        TransferError::UnknownKey {
            endpoint: self.remote.endpoint.clone(),
            key: self.remote.key,
        }
    }
}

/// Counts the refusal at the peer.
fn refused(peer: &Node, error: TransferError) -> TransferError {
    peer.stats.serve_failed(error.code());
    error
}
