//! Which sequences compute which tokens in the next step of the engine: continuous batching with chunked
//! prefill, under a budget of tokens and of KV blocks.
//!
//! Invariants:
//! - A step never holds more rows than [`Limits::step_tokens`], nor more tokens of prompts than keep the limits on gaps of the
//!   sequences that decode in it (`pace.rs`).
//! - The oldest prompt is in every step, with half of what there is for prompts; the other half goes to those that need least, so
//!   that a short prompt does not wait for a long one.
//! - Age decides. An older sequence that finds no block takes those of the youngest, which is computed anew
//!   later; nobody ever takes from an older one. So the oldest sequence always advances unless blocks are held
//!   outside of the batch, and hence every sequence ends.
//! - Computing a sequence anew gives the same bits (the engine's contract), so preemption is invisible.
//!
//! A pure state machine over token counts: the tokens, the blocks and the engine are its caller's.
//! Elsewhere: the blocks themselves (`kv_store::SequenceBlocks`, reached through [`Blocks`]), and when a
//! sequence ends (`output.rs`).

use std::collections::BTreeMap;
use std::ops::Bound;

use types::Millis;

use crate::pace::Pace;

/// A sequence, named by its age: ids grow with acceptance, so of two the smaller one is older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// The bounds of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that compute at the same time.
    pub sequences_max: usize,
    /// Sequences that wait, in all.
    pub waiting_max: usize,
    /// Rows of one step. More than `sequences_max`, so that prefill always advances.
    pub step_tokens: usize,
    /// Tokens of a KV block.
    pub block_tokens: usize,
}

/// What came of holding a sequence's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// They are held, and so many leading tokens are cached.
    Held(usize),
    /// There is no room, and nothing is held.
    NoRoom,
    /// What is cached of it is being read back: it is asked for again in the next step. Nothing is held.
    Later,
}

/// The KV memory of the sequences, as far as the batch needs to know it.
pub trait Blocks {
    /// Holds what is cached of a sequence and makes room for its first `tokens` tokens.
    fn begin(&mut self, sequence: SequenceId, tokens: usize) -> Begun;
    /// Makes room for the first `tokens` tokens of a sequence that holds blocks. False, with nothing changed, if
    /// there is none.
    fn grow(&mut self, sequence: SequenceId, tokens: usize) -> bool;
    /// Gives back all blocks of a sequence.
    fn release(&mut self, sequence: SequenceId);
}

/// One run of tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Position of the first one.
    pub start: usize,
    /// Position after the last one.
    pub end: usize,
    /// Leading tokens of the sequence whose KV exists, and must not be written again.
    pub cached_tokens: usize,
    /// Whether the next token is to be drawn from the last row's logits.
    pub sample: bool,
}

/// What to do next.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Step {
    /// What the engine computes, oldest sequence first. Empty if there is nothing to do or no memory to do it in.
    pub rows: Vec<Row>,
    /// Sequences that lost their blocks to an older one.
    pub preempted: Vec<SequenceId>,
    /// Whether a sequence waits for blocks. Until this is false again, nobody outside of the batch should take any.
    pub short_of_blocks: bool,
}

impl Step {
    /// Tokens that are computed.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.end - row.start).sum()
    }
}

/// What a computed row leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advanced {
    /// More of the sequence's known tokens are to be computed.
    Partial,
    /// The next token is to be drawn: call [`Batch::extend`] or [`Batch::finish`].
    Sample,
    /// The sequence had finished and has now left the batch. Its blocks are the caller's to give back.
    Closed,
}

/// Whether a finished sequence has left the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has left. Its blocks are the caller's to give back.
    Left,
    /// Its last token completes a block and is computed in the next step, so that the block can be cached.
    Closing,
}

/// Refusal of a sequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{waiting} sequences wait already, and no more are accepted")]
pub struct QueueFull {
    /// How many wait.
    pub waiting: usize,
}

#[derive(Debug, Clone, Copy)]
struct Sequence {
    /// Tokens that are known: prompt and output.
    known: usize,
    /// Leading tokens whose KV is in the sequence's blocks.
    computed: usize,
    /// Finished, but for the computation of its last token.
    closing: bool,
    /// Longest gap between its tokens.
    gap: Option<Millis>,
}

impl Sequence {
    fn remaining(&self) -> usize {
        self.known - self.computed
    }

    /// Whether one row brings it to its next token. So too if all is cached: the last token is then computed
    /// again for its logits, without writing KV.
    fn decodes(&self) -> bool {
        self.remaining() <= 1
    }

    fn row(&self, sequence: SequenceId, tokens: usize) -> Row {
        let start = self.computed.min(self.known - 1);
        let end = start + tokens;
        Row {
            sequence,
            start,
            end,
            cached_tokens: self.computed,
            sample: end == self.known && !self.closing,
        }
    }
}

/// The sequences of a node's engine. Each one is in exactly one of the three maps, all sorted by age.
#[derive(Debug)]
pub struct Batch {
    limits: Limits,
    /// Without blocks.
    waiting: BTreeMap<SequenceId, Sequence>,
    /// With blocks, without a seat.
    ready: BTreeMap<SequenceId, Sequence>,
    /// With blocks and a seat.
    running: BTreeMap<SequenceId, Sequence>,
}

impl Batch {
    /// An empty batch.
    ///
    /// # Panics
    ///
    /// If `limits` leave no row for prefill beside a full set of running sequences.
    pub fn new(limits: Limits) -> Self {
        assert!(
            limits.sequences_max > 0 && limits.step_tokens > limits.sequences_max && limits.block_tokens > 0,
            "limits without progress: {limits:?}"
        );
        Self {
            limits,
            waiting: BTreeMap::new(),
            ready: BTreeMap::new(),
            running: BTreeMap::new(),
        }
    }

    /// Adds a sequence of `known` tokens that holds no blocks: it is prefilled here.
    pub fn submit(
        &mut self,
        sequence: SequenceId,
        known: usize,
        gap: Option<Millis>,
    ) -> Result<(), QueueFull> {
        assert!(known > 0, "a sequence has at least one token");
        self.check_room()?;
        self.waiting.insert(
            sequence,
            Sequence {
                known,
                computed: 0,
                closing: false,
                gap,
            },
        );
        Ok(())
    }

    /// Adds a sequence of `known` tokens that holds blocks with the KV of all but the last one.
    pub fn join(&mut self, sequence: SequenceId, known: usize, gap: Option<Millis>) -> Result<(), QueueFull> {
        self.join_as(sequence, known, gap, false)
    }

    /// As [`Batch::join`], for a sequence that ended with its last token, of which only the KV is wanted.
    pub fn join_finished(&mut self, sequence: SequenceId, known: usize) -> Result<(), QueueFull> {
        self.join_as(sequence, known, None, true)
    }

    fn join_as(
        &mut self,
        sequence: SequenceId,
        known: usize,
        gap: Option<Millis>,
        closing: bool,
    ) -> Result<(), QueueFull> {
        assert!(known > 1, "a prompt and its first token are known");
        self.check_room()?;
        self.ready.insert(
            sequence,
            Sequence {
                known,
                computed: known - 1,
                closing,
                gap,
            },
        );
        Ok(())
    }

    fn check_room(&self) -> Result<(), QueueFull> {
        let waiting = self.waiting();
        if waiting >= self.limits.waiting_max {
            return Err(QueueFull { waiting });
        }
        Ok(())
    }

    /// Takes a sequence out, whatever it is doing. Its blocks are the caller's to give back.
    pub fn remove(&mut self, sequence: SequenceId) {
        self.waiting.remove(&sequence);
        self.ready.remove(&sequence);
        self.running.remove(&sequence);
    }

    /// Decides the next step. Its rows must be computed and reported to [`Batch::advance`] before the next call,
    /// or their sequences removed.
    pub fn plan(&mut self, blocks: &mut impl Blocks, pace: &Pace) -> Step {
        let mut step = Step::default();
        self.plan_decode(blocks, &mut step);
        self.admit(blocks, &mut step);
        self.plan_prefill(pace, &mut step);
        step.rows.sort_unstable_by_key(|row| row.sequence);
        step
    }

    /// One token of every running sequence that finds room, oldest first.
    fn plan_decode(&mut self, blocks: &mut impl Blocks, step: &mut Step) {
        let oldest_first: Vec<SequenceId> = self.running.keys().copied().collect();
        for id in oldest_first {
            // One that is gone was preempted for an older one.
            let Some(sequence) = self.running.get(&id).copied().filter(Sequence::decodes) else {
                continue;
            };
            if self.make_room(id, sequence.known, blocks, step) {
                step.rows.push(sequence.row(id, 1));
            } else {
                // It keeps what it has: it goes on as soon as a block is free, unless an older one needs them.
                step.short_of_blocks = true;
            }
        }
    }

    fn make_room(
        &mut self,
        id: SequenceId,
        tokens: usize,
        blocks: &mut impl Blocks,
        step: &mut Step,
    ) -> bool {
        loop {
            if blocks.grow(id, tokens) {
                return true;
            }
            let Some(victim) = self.youngest_with_blocks().filter(|victim| *victim > id) else {
                return false;
            };
            let mut sequence = self
                .ready
                .remove(&victim)
                .or_else(|| self.running.remove(&victim))
                .expect("the victim was found in one of these maps");
            blocks.release(victim);
            sequence.computed = 0;
            self.waiting.insert(victim, sequence);
            step.rows.retain(|row| row.sequence != victim);
            step.preempted.push(victim);
            step.short_of_blocks = true;
        }
    }

    /// A closing sequence is no victim: it gives its blocks back after this step anyway.
    fn youngest_with_blocks(&self) -> Option<SequenceId> {
        let youngest = |map: &BTreeMap<SequenceId, Sequence>| {
            let mut victims = map.iter().rev().filter(|(_, sequence)| !sequence.closing);
            victims.next().map(|(id, _)| *id)
        };
        youngest(&self.ready).max(youngest(&self.running))
    }

    /// Fills free seats, oldest first. A sequence that finds no room keeps all that need room behind it waiting, so
    /// that none overtakes it; those that hold blocks may pass, because only running gives blocks back.
    fn admit(&mut self, blocks: &mut impl Blocks, step: &mut Step) {
        // Those up to it have been looked at.
        let mut passed = None;
        while self.running.len() < self.limits.sequences_max {
            let ready = self.ready.first_key_value().map(|(id, _)| *id);
            let after = passed.map_or(Bound::Unbounded, Bound::Excluded);
            let waiting = self.waiting.range((after, Bound::Unbounded)).next();
            let waiting = waiting.map(|(id, _)| *id);
            match (ready, waiting.filter(|_| !step.short_of_blocks)) {
                (Some(ready), waiting) if waiting.is_none_or(|waiting| ready < waiting) => {
                    let sequence = self.ready.remove(&ready).expect("it is the first key");
                    self.running.insert(ready, sequence);
                    if self.make_room(ready, sequence.known, blocks, step) {
                        step.rows.push(sequence.row(ready, 1));
                    } else {
                        step.short_of_blocks = true;
                    }
                }
                (_, Some(waiting)) => {
                    let mut sequence = self.waiting[&waiting];
                    let cached = match blocks.begin(waiting, sequence.known) {
                        Begun::Held(cached) => cached,
                        Begun::NoRoom => {
                            step.short_of_blocks = true;
                            continue;
                        }
                        Begun::Later => {
                            passed = Some(waiting);
                            continue;
                        }
                    };
                    sequence.computed = cached.min(sequence.known);
                    self.waiting.remove(&waiting);
                    self.running.insert(waiting, sequence);
                    if sequence.decodes() {
                        step.rows.push(sequence.row(waiting, 1));
                    }
                }
                (_, None) => break,
            }
        }
    }

    /// Spends what is left of the budget on prompts. Their room was made when they were admitted.
    fn plan_prefill(&self, pace: &Pace, step: &mut Step) {
        let prompts = self.running.iter().filter(|(_, sequence)| !sequence.decodes());
        let mut prompts: Vec<(SequenceId, &Sequence)> =
            prompts.map(|(id, sequence)| (*id, sequence)).collect();
        let Some(&(oldest, first)) = prompts.first() else {
            return;
        };
        let room = self.limits.step_tokens - step.rows.len();
        let gaps = step.rows.iter().filter_map(|row| self.running[&row.sequence].gap);
        let strictest = gaps.min_by(|a, b| a.0.total_cmp(&b.0));
        let deepest = prompts
            .iter()
            .map(|(_, sequence)| sequence.computed)
            .max()
            .unwrap_or(0);
        let mut budget = strictest.map_or(room, |limit| pace.prompt_tokens(limit, deepest, room));
        let reserved = first.remaining().min(budget.div_ceil(2));
        budget -= reserved;
        // Stable, so that of two that need as much the older one comes first.
        prompts.sort_by_key(|(_, sequence)| sequence.remaining());
        let mut given: Vec<(SequenceId, usize)> = Vec::with_capacity(prompts.len());
        for (id, sequence) in prompts.into_iter().filter(|(id, _)| *id != oldest) {
            let tokens = sequence.remaining().min(budget);
            budget -= tokens;
            given.push((id, tokens));
        }
        given.push((oldest, reserved + budget.min(first.remaining() - reserved)));
        let given = given.into_iter().filter(|(_, tokens)| *tokens > 0);
        step.rows
            .extend(given.map(|(id, tokens)| self.running[&id].row(id, tokens)));
    }

    /// Records that a row of the last plan was computed.
    pub fn advance(&mut self, row: &Row) -> Advanced {
        let Some(sequence) = self.running.get_mut(&row.sequence) else {
            return Advanced::Closed;
        };
        sequence.computed = row.end;
        if row.sample {
            Advanced::Sample
        } else if sequence.closing {
            self.running.remove(&row.sequence);
            Advanced::Closed
        } else {
            Advanced::Partial
        }
    }

    /// Adds the drawn token to a sequence that goes on.
    pub fn extend(&mut self, sequence: SequenceId) {
        if let Some(sequence) = self.running.get_mut(&sequence) {
            sequence.known += 1;
        }
    }

    /// Adds the drawn token to a sequence that ends with it.
    pub fn finish(&mut self, id: SequenceId) -> Finish {
        match self.running.get_mut(&id) {
            Some(sequence) if (sequence.known + 1).is_multiple_of(self.limits.block_tokens) => {
                sequence.known += 1;
                sequence.closing = true;
                Finish::Closing
            }
            Some(_) | None => {
                self.running.remove(&id);
                Finish::Left
            }
        }
    }

    /// Sequences that have no seat.
    pub fn waiting(&self) -> usize {
        self.waiting.len() + self.ready.len()
    }

    /// Sequences that have a seat.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether there is no sequence at all.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.ready.is_empty() && self.running.is_empty()
    }

    /// Prompt tokens that wait or are being computed.
    pub fn prefill_tokens(&self) -> usize {
        let sequences = self.waiting.values().chain(self.running.values());
        sequences
            .filter(|sequence| !sequence.decodes())
            .map(Sequence::remaining)
            .sum()
    }

    /// Tokens whose KV the sequences hold.
    pub fn resident_tokens(&self) -> usize {
        let sequences = self.ready.values().chain(self.running.values());
        sequences.map(|sequence| sequence.computed).sum()
    }

    /// Property tests call this after every step.
    #[cfg(test)]
    fn check_integrity(&self) {
        assert!(self.running.len() <= self.limits.sequences_max);
        for id in self.running.keys() {
            assert!(!self.waiting.contains_key(id) && !self.ready.contains_key(id));
        }
        for id in self.ready.keys() {
            assert!(!self.waiting.contains_key(id));
        }
        for sequence in self.waiting.values() {
            assert_eq!(sequence.computed, 0, "a waiting sequence holds nothing");
            assert!(!sequence.closing, "a finished sequence does not wait");
        }
        for sequence in self.running.values().chain(self.ready.values()) {
            assert!(sequence.computed <= sequence.known && sequence.known > 0);
        }
    }
}

#[cfg(test)]
mod tests;
