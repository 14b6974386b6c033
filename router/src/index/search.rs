//! How far each node's run of a chain goes: a search for all nodes at once, in memory and in all.

use types::BlockHash;

use super::holders::{Sets, members};
use super::key_of;
use super::table::Table;

/// A search under way. A set of it is two bitsets: who holds a block, and who does in memory.
pub(super) struct Search<'a> {
    table: &'a Table,
    sets: &'a Sets,
    hashes: &'a [BlockHash],
    /// How many leading blocks a node holds, and which slot it has; longest first.
    pub(super) runs: Vec<(usize, usize)>,
    /// By slot, how many leading blocks it holds in memory.
    pub(super) in_memory: Vec<usize>,
}

impl<'a> Search<'a> {
    /// Searches among `nodes`, a bitset.
    pub(super) fn run(table: &'a Table, sets: &'a Sets, hashes: &'a [BlockHash], nodes: &[u64]) -> Self {
        let mut search = Self {
            table,
            sets,
            hashes,
            runs: Vec::new(),
            in_memory: Vec::new(),
        };
        let width = 2 * sets.words();
        // Every level splits one set in two, and halves the blocks between; the first probe is at the end.
        let levels = hashes.len().next_power_of_two().ilog2() as usize + 2;
        let mut space = vec![0; width * (1 + 2 * levels)];
        let (all, rest) = space.split_at_mut(width);
        if !search.load(0, all) {
            return search;
        }
        let (held, in_memory) = all.split_at_mut(width / 2);
        intersect(held, nodes);
        intersect(in_memory, nodes);
        search.in_memory = vec![0; nodes.len() * 64];
        // A prompt that came before is held to its end by whoever served it.
        search.split(0, hashes.len() - 1, hashes.len(), all, rest);
        search
    }

    /// Finds where the runs of the nodes of `set` end. All of them hold block `held`, and none holds block `lacked`, as far as is known.
    fn search(&mut self, held: usize, lacked: usize, set: &[u64], rest: &mut [u64]) {
        if set.iter().all(|word| *word == 0) {
            return;
        }
        if lacked - held > 1 {
            self.split(held, held + (lacked - held) / 2, lacked, set, rest);
            return;
        }
        let (holders, in_memory) = set.split_at(set.len() / 2);
        self.runs.extend(members(holders).map(|slot| (held + 1, slot)));
        for slot in members(in_memory) {
            self.in_memory[slot] = held + 1;
        }
    }

    /// Those that hold block `middle` go on beyond it, the others before it.
    fn split(&mut self, held: usize, middle: usize, lacked: usize, set: &[u64], rest: &mut [u64]) {
        if middle == held {
            return self.search(held, lacked, set, rest);
        }
        let (beyond, rest) = rest.split_at_mut(set.len());
        let (before, rest) = rest.split_at_mut(set.len());
        self.load(middle, beyond);
        for ((beyond, before), set) in beyond.iter_mut().zip(before.iter_mut()).zip(set) {
            (*beyond, *before) = (*beyond & set, !*beyond & set);
        }
        self.search(middle, lacked, beyond, rest);
        self.search(held, middle, before, rest);
    }

    /// Writes who holds a block of the chain. Whether anyone does.
    fn load(&self, block: usize, out: &mut [u64]) -> bool {
        let entry = self
            .hashes
            .get(block)
            .and_then(|hash| self.table.get(key_of(hash)));
        match entry {
            Some(entry) => self.sets.load(entry.holders, out),
            None => out.fill(0),
        }
        entry.is_some()
    }
}

fn intersect(set: &mut [u64], with: &[u64]) {
    for (word, with) in set.iter_mut().zip(with) {
        *word &= with;
    }
}
