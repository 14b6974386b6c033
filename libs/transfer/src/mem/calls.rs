//! Calls through the in-memory network: each is one message there and one back, with the delays and breaks of transfers;
//! bytes that go with it are copied in chunks, and their bits may flip.

use std::sync::{Arc, Weak};

use tokio::time::sleep;
use types::Memory;

use super::plan::{Plan, Random};
use super::{MemTransport, SCHEME};
use crate::TransferError;
use crate::calls::{Answered, Call, Payload, Place, Reply, pair, total};
use crate::memory::{copy_in, copy_out};
use crate::tcp::check_runs;
use crate::transport::Slice;

/// Offset there, offset here, and length of each run.
type Pairs = Vec<(u64, u64, u64)>;

impl MemTransport {
    pub(super) async fn ask(&self, call: Call) -> Result<Answered, TransferError> {
        call.check()?;
        let number = {
            let mut inner = self.network.inner();
            inner.transfers += 1;
            inner.transfers
        };
        let (local, sent, room) = match &call.payload {
            Payload::None => (None, Vec::new(), Vec::new()),
            Payload::Send { region, runs } => {
                (Some(self.node.regions.memory(*region)?), runs.clone(), Vec::new())
            }
            Payload::Receive { region, runs, .. } => {
                (Some(self.node.regions.memory(*region)?), Vec::new(), runs.clone())
            }
        };
        if let Some(local) = &local {
            check_runs(&sent, local.len() as u64)?;
            check_runs(&room, local.len() as u64)?;
        }
        let random = Random::new(self.network.seed, number);
        self.pass(&call.endpoint, &random, &[]).await?;
        let peer = self.network.inner().nodes.get(&call.endpoint).cloned();
        let endpoint = || call.endpoint.clone();
        let peer = peer.ok_or_else(|| TransferError::Unreachable {
            endpoint: endpoint(),
            reason: "no such node".into(),
        })?;
        if peer.epoch != call.epoch {
            return Err(TransferError::Fenced {
                endpoint: endpoint(),
                epoch: call.epoch,
                current: peer.epoch,
            });
        }
        let calls = peer.calls.get().and_then(Weak::upgrade);
        let calls = calls.ok_or_else(|| TransferError::Unserved { endpoint: endpoint() })?;
        let (message, received_bytes) = match calls.call(&call.message, total(&sent)).await {
            Reply::Answer(message) => (message, 0),
            Reply::Take { into, landed } => {
                if let Some(local) = &local {
                    let runs = pair(&sent, &into.runs);
                    self.carry(&call.endpoint, &random, local, &into.memory, runs)
                        .await?;
                }
                drop(into);
                (landed(Vec::new()).await, 0)
            }
            Reply::Give { message, from } => {
                let bytes = self.give(&call.endpoint, &random, &from, local.as_ref(), &room);
                (message, bytes.await?)
            }
        };
        self.pass(&call.endpoint, &random, &[]).await?;
        Ok(Answered {
            message,
            received_bytes,
            mover: SCHEME,
            checksums: Vec::new(),
        })
    }

    async fn give(
        &self,
        endpoint: &str,
        random: &Random,
        from: &Place,
        local: Option<&Arc<dyn Memory>>,
        room: &[(u64, u64)],
    ) -> Result<u64, TransferError> {
        if from.len() > total(room) {
            return Err(TransferError::Protocol {
                endpoint: endpoint.to_owned(),
                reason: format!("{} bytes for room of {}", from.len(), total(room)),
            });
        }
        if let Some(local) = local {
            let runs = pair(&from.runs, room);
            self.carry(endpoint, random, &from.memory, local, runs).await?;
        }
        Ok(from.len())
    }

    /// Copies bytes from one memory into another one, as the network does it.
    async fn carry(
        &self,
        endpoint: &str,
        random: &Random,
        from: &Arc<dyn Memory>,
        to: &Arc<dyn Memory>,
        runs: Pairs,
    ) -> Result<(), TransferError> {
        let slice = |(from, to, len): &(u64, u64, u64)| Slice {
            local_offset: *from,
            remote_offset: *to,
            len: *len,
        };
        let slices: Vec<Slice> = runs.iter().map(slice).collect();
        let plan = self.pass(endpoint, random, &slices).await?;
        for (position, (chunk, _)) in plan.chunks.iter().enumerate() {
            let (at, len) = (chunk.local_offset as usize, chunk.len as usize);
            let mut bytes = copy_out(from.as_ref(), at, len)?;
            if let Some(bit) = plan.flips.get(&position) {
                bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
            }
            copy_in(to.as_ref(), chunk.remote_offset as usize, &bytes)?;
        }
        Ok(())
    }

    /// Waits as the network makes it wait, or breaks.
    async fn pass(&self, endpoint: &str, random: &Random, slices: &[Slice]) -> Result<Plan, TransferError> {
        let plan = Plan::draw(&mut random.clone(), &self.network.faults, slices);
        let delay = plan
            .chunks
            .iter()
            .map(|(_, delay)| *delay)
            .sum::<std::time::Duration>();
        let delay = delay.max(plan.acknowledgement);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        self.network.passage(&self.node.endpoint, endpoint).await;
        if plan.breaks_before.is_some() {
            return Err(TransferError::ConnectionLost {
                endpoint: endpoint.to_owned(),
                reason: "broken by the network".into(),
            });
        }
        Ok(plan)
    }
}
