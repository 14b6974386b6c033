//! Pins that end by themselves. They bound memory; no reader's safety rests on their clock.

use std::time::Instant;

use types::{BlockDescriptor, BlockHash, BlockId, LeaseId};

use super::{BlockTable, Purpose};
use crate::expiring::Full;

impl BlockTable {
    /// Pins the longest leading run of held blocks until `expires`, for a request or to move them. No run, no lease.
    pub fn lease(
        &mut self,
        hashes: &[BlockHash],
        purpose: Purpose,
        expires: Instant,
        now: Instant,
    ) -> Result<Option<(LeaseId, Vec<BlockDescriptor>)>, Full> {
        self.leases.check_room()?;
        let blocks = match purpose {
            Purpose::Request => self.match_prefix(hashes, now),
            Purpose::Move => self.pin_run(hashes),
        };
        if blocks.is_empty() {
            return Ok(None);
        }
        let ids = blocks.iter().map(|held| held.block).collect();
        let id = self.leases.insert(expires, ids)?;
        Ok(Some((LeaseId(id), blocks)))
    }

    /// Ends a lease. `false` if it had ended before.
    pub fn release(&mut self, lease: LeaseId, now: Instant) -> bool {
        let Some(blocks) = self.leases.remove(lease.0) else {
            return false;
        };
        self.unpin_all(&blocks, now);
        true
    }

    /// Ends the leases whose time has come. Returns how many they were.
    pub fn expire_leases(&mut self, now: Instant) -> usize {
        let mut expired = 0;
        while let Some(blocks) = self.leases.expire(now) {
            self.unpin_all(&blocks, now);
            expired += 1;
        }
        expired
    }

    fn unpin_all(&mut self, blocks: &[BlockId], now: Instant) {
        // Last block first: ancestors become the more recent ones, which is the order they are evicted in anyway.
        for block in blocks.iter().rev() {
            self.unpin(*block, now);
        }
    }
}
