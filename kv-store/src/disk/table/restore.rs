//! The table as the records of an earlier process tell it.

use std::collections::HashMap;

use types::BlockHash;

use super::{DiskTable, SlotId};
use crate::disk::format::Record;

impl DiskTable {
    /// Stores what the records name, parents before children. Records whose parent is not there, and all but the newest of those
    /// that name one block, are dropped; they are as if they had been evicted in the moment the process ended.
    ///
    /// `announce` is told of every block that is there again, and gives the number of the log entry that says so. Returns how
    /// many records were dropped.
    ///
    /// # Panics
    ///
    /// If the table is not new, or a slot is beyond it.
    pub fn restore(
        &mut self,
        records: Vec<(SlotId, Record)>,
        mut announce: impl FnMut(&Record) -> u64,
    ) -> usize {
        assert_eq!(self.free.len(), self.slots.len(), "only a new table is restored");
        let found = records.len();
        let mut newest: HashMap<BlockHash, (SlotId, Record)> = HashMap::with_capacity(found);
        for (slot, record) in records {
            self.sequence = self.sequence.max(record.sequence);
            let known = newest.entry(record.hash).or_insert((slot, record));
            if known.1.sequence < record.sequence {
                *known = (slot, record);
            }
        }
        // A parent's record is older than its children's, unless it was evicted and written again; and then they were
        // dropped with it. So one pass in the order of writing finds every parent first.
        let mut ordered: Vec<(SlotId, Record)> = newest.into_values().collect();
        ordered.sort_unstable_by_key(|(_, record)| record.sequence);
        for (slot, record) in ordered {
            let parent = match record.follows_root {
                true => None,
                false => match self.find(&record.parent) {
                    Some(parent) => Some(parent),
                    None => continue,
                },
            };
            let stored_at = announce(&record);
            self.store(slot, record, parent, stored_at);
        }
        let slots = (0..).map(SlotId).zip(&self.slots);
        let empty = slots.filter(|(_, slot)| !matches!(slot, super::Slot::Stored(_)));
        let mut free: Vec<SlotId> = empty.map(|(slot, _)| slot).collect();
        free.reverse();
        self.free = free;
        found - self.stored
    }
}
