//! The KV of one running sequence: a run of shared blocks, then the blocks it writes.
//!
//! Invariant: block `i` holds tokens `i * block_tokens ..`. The first [`SequenceBlocks::shared_blocks`] blocks are
//! complete and perhaps shared, and are only read; the rest belongs to this sequence alone. So an engine
//! that writes at positions from [`SequenceBlocks::writable_from`] on never touches what others read.
//!
//! Elsewhere: what computes into the blocks (`engine`), who may be preempted (`decode-node`).

use std::collections::VecDeque;

use types::{BlockHash, BlockId, Checksum, Token};

use crate::store::{BlockPin, Corrupt, Landed, OwnedBlock, Store};
use crate::table::OutOfBlocks;

/// The blocks of one sequence. Dropping it gives all of them back.
#[derive(Debug)]
pub struct SequenceBlocks {
    store: Store,
    root: BlockHash,
    /// Hashes of the sequence's full blocks, as far as its tokens are known.
    chain: Vec<BlockHash>,
    shared: Vec<BlockPin>,
    own: VecDeque<OwnedBlock>,
    /// The shared blocks, then the own ones.
    ids: Vec<BlockId>,
    cached_tokens: usize,
    /// Blocks that turned out to be held already when they were committed, still readable by transfers.
    displaced: Vec<OwnedBlock>,
}

impl SequenceBlocks {
    /// Pins what the store holds of these tokens' full blocks. Allocates nothing.
    pub fn begin(store: &Store, tenant: &str, tokens: &[Token]) -> Self {
        let (root, chain) = store.chain(tenant, tokens);
        let shared = store.match_prefix(&chain);
        let mut sequence = Self {
            store: store.clone(),
            root,
            chain,
            shared: Vec::new(),
            own: VecDeque::new(),
            ids: Vec::new(),
            cached_tokens: 0,
            displaced: Vec::new(),
        };
        sequence.extend_cached(shared);
        sequence
    }

    /// Room for `tokens` tokens of nobody's sequence, or for as many as half of the pool holds.
    pub fn scratch(store: &Store, tokens: usize) -> Result<Self, OutOfBlocks> {
        let half = store.capacity() / 2 * store.layout().block_tokens;
        let mut scratch = Self::begin(store, "", &[]);
        scratch.grow_to(tokens.min(half))?;
        Ok(scratch)
    }

    /// Root of the sequence's space: the parent of its first block.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Hashes of the full blocks of the tokens known so far.
    pub fn chain(&self) -> &[BlockHash] {
        &self.chain
    }

    /// Where each block lies in the pool, first block first. Changes with every call that takes `&mut self`.
    pub fn block_ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Leading tokens whose KV came from a cache: this node's or a peer's. Full blocks only.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Leading blocks that are complete, and must not be written.
    pub fn shared_blocks(&self) -> usize {
        self.shared.len()
    }

    /// The complete blocks at the front, first block first.
    pub fn shared(&self) -> &[BlockPin] {
        &self.shared
    }

    /// First position whose KV may be written.
    pub fn writable_from(&self) -> usize {
        self.shared.len() * self.block_tokens()
    }

    /// Tokens that fit in the blocks at hand.
    pub fn capacity_tokens(&self) -> usize {
        self.ids.len() * self.block_tokens()
    }

    /// Appends blocks that were fetched from a peer: the ones that follow the cached run.
    ///
    /// # Panics
    ///
    /// If they are not the next ones of the chain, or the sequence has blocks of its own already.
    pub fn extend_cached(&mut self, blocks: Vec<BlockPin>) {
        assert!(self.own.is_empty(), "a sequence that computes fetches no more");
        for pin in blocks {
            let next = self.chain.get(self.shared.len());
            assert_eq!(next, Some(&pin.hash()), "a cached block continues the sequence");
            self.push_shared(pin);
        }
        self.cached_tokens = self.writable_from();
        self.store.note_reused(&self.chain[..self.shared.len()]);
    }

    /// Appends blocks that the sequence's peer has written, after verifying all of them: full ones are shared
    /// from now on, a partial last one stays the sequence's own. Give back from the fence
    /// ([`crate::Grant::fence`]) what is passed here. On failure every block given is freed, and the sequence
    /// is as before.
    ///
    /// # Panics
    ///
    /// If there is not one checksum per block, or the sequence has blocks of its own already.
    pub fn adopt(&mut self, blocks: Vec<Landed>, checksums: &[Checksum]) -> Result<(), Corrupt> {
        assert!(self.own.is_empty(), "a sequence that computes receives no more");
        assert_eq!(blocks.len(), checksums.len());
        let first = self.shared.len();
        for (i, (block, checksum)) in blocks.iter().zip(checksums).enumerate() {
            // A partial block has no hash; the one before it says best where it belongs.
            let hash = self.chain.get(first + i).copied();
            let hash = hash.or(self.chain.last().copied()).unwrap_or(self.root);
            block.verify(&self.store, hash, *checksum)?;
        }
        let blocks = blocks.into_iter().map(Landed::into_block);
        for (block, checksum) in blocks.zip(checksums) {
            let index = self.shared.len();
            match self.chain.get(index).copied() {
                Some(hash) if self.own.is_empty() => {
                    let pin = self
                        .store
                        .commit_verified(block, self.parent(index), hash, *checksum);
                    self.push_shared(pin);
                }
                Some(_) | None => self.push_own(block),
            }
        }
        Ok(())
    }

    /// Makes room for `tokens` tokens in total, or changes nothing.
    pub fn grow_to(&mut self, tokens: usize) -> Result<(), OutOfBlocks> {
        let needed = self.store.layout().blocks_for(tokens);
        let missing = needed.saturating_sub(self.ids.len());
        if missing == 0 {
            return Ok(());
        }
        for block in self.store.allocate(missing)? {
            self.push_own(block);
        }
        Ok(())
    }

    /// Shares every own block that is full. `tokens` are all tokens of the sequence, of which the KV of the first
    /// `computed_tokens` is in the blocks. May be called as often as one likes.
    ///
    /// Where another sequence was faster, its block replaces ours in [`SequenceBlocks::block_ids`]. Ours (with
    /// the same bytes) stays readable until [`SequenceBlocks::free_displaced`], for transfers that still read it.
    pub fn commit_full(&mut self, tokens: &[Token], computed_tokens: usize) {
        let block_tokens = self.block_tokens();
        let full = computed_tokens.min(tokens.len()) / block_tokens;
        for index in self.shared.len()..full.min(self.ids.len()) {
            let hash = match self.chain.get(index) {
                Some(hash) => *hash,
                None => {
                    let of_block = &tokens[index * block_tokens..(index + 1) * block_tokens];
                    let hash = self.parent(index).child(of_block);
                    self.chain.push(hash);
                    hash
                }
            };
            let block = self
                .own
                .pop_front()
                .expect("blocks that are not shared are own ones");
            let (pin, displaced) = self.store.commit_keeping(block, self.parent(index), hash);
            self.ids[index] = pin.block();
            self.shared.push(pin);
            self.displaced.extend(displaced);
        }
    }

    /// Frees the blocks that others' blocks have replaced. Call it when no step or transfer uses a block id from
    /// before the last [`SequenceBlocks::commit_full`]; else they are freed with the sequence.
    pub fn free_displaced(&mut self) {
        self.displaced.clear();
    }

    /// Gives all blocks back, as dropping does. What was shared stays cached until it is evicted.
    pub fn release(self) {}

    fn parent(&self, index: usize) -> BlockHash {
        match index.checked_sub(1) {
            None => self.root,
            Some(before) => self.chain[before],
        }
    }

    fn push_shared(&mut self, pin: BlockPin) {
        self.ids.push(pin.block());
        self.shared.push(pin);
    }

    fn push_own(&mut self, block: OwnedBlock) {
        self.ids.push(block.block());
        self.own.push_back(block);
    }

    fn block_tokens(&self) -> usize {
        self.store.layout().block_tokens
    }
}

impl Drop for SequenceBlocks {
    fn drop(&mut self) {
        // Last block first, so that a chain's end is older than its beginning.
        while let Some(pin) = self.shared.pop() {
            drop(pin);
        }
    }
}

#[cfg(test)]
mod tests;
