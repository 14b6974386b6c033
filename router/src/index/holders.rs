//! Who holds one block, in four bytes: up to two nodes inline, more as two bitsets (who holds it, who holds it in memory) that
//! lie in [`Sets`].

/// Slots that [`Holders`] can name.
pub(super) const SLOTS_MAX: usize = (1 << CODE_BITS) / 2 - 1;

/// A holder inline: zero for none, or 1 + 2 × slot + whether the block is in memory.
const CODE_BITS: u32 = 15;
const CODE_MASK: u32 = (1 << CODE_BITS) - 1;
/// The other bits are the number of a set.
const IN_SET: u32 = 1 << 31;
/// Sets are allocated by the chunk, so that growing copies nothing.
const CHUNK_SETS: usize = 1024;
const NO_SET: u32 = u32::MAX;

/// The holders of one block. Without one it stands for an unused entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holders(u32);

/// The bitsets of blocks with more than two holders.
#[derive(Debug)]
pub(super) struct Sets {
    /// Words of one bitset.
    words: usize,
    chunks: Vec<Vec<u64>>,
    /// Sets ever made, in use or free.
    made: u32,
    /// The first free set. Its first word is the number of the next one.
    free: u32,
}

impl Holders {
    pub(super) const NONE: Self = Self(0);

    pub(super) fn one(slot: usize, in_memory: bool) -> Self {
        Self(code(slot, in_memory))
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn codes(self) -> [u32; 2] {
        [self.0 & CODE_MASK, self.0 >> CODE_BITS & CODE_MASK]
    }

    /// The holders of a block that has no set, and whether each has it in memory.
    fn inline(self) -> impl Iterator<Item = (usize, bool)> {
        self.codes().into_iter().filter(|code| *code != 0).map(decode)
    }

    fn set(self) -> Option<u32> {
        (self.0 & IN_SET != 0).then_some(self.0 & !IN_SET)
    }

    fn of_codes(first: u32, second: u32) -> Self {
        if first == 0 {
            Self(second)
        } else {
            Self(first | second << CODE_BITS)
        }
    }
}

fn code(slot: usize, in_memory: bool) -> u32 {
    1 + 2 * slot as u32 + u32::from(in_memory)
}

fn decode(code: u32) -> (usize, bool) {
    (((code - 1) / 2) as usize, (code - 1) % 2 == 1)
}

fn has(words: &[u64], slot: usize) -> bool {
    words[slot / 64] >> (slot % 64) & 1 == 1
}

/// Makes `slot` a member of the set, or none.
pub(super) fn assign(words: &mut [u64], slot: usize, member: bool) {
    let bit = 1 << (slot % 64);
    if member {
        words[slot / 64] |= bit;
    } else {
        words[slot / 64] &= !bit;
    }
}

/// The slots of a set, lowest first.
pub(super) fn members(words: &[u64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().flat_map(|(word, bits)| {
        let mut bits = *bits;
        std::iter::from_fn(move || {
            let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
            bits &= bits - 1;
            Some(word * 64 + bit)
        })
    })
}

impl Sets {
    pub(super) fn new() -> Self {
        Self {
            words: 1,
            chunks: Vec::new(),
            made: 0,
            free: NO_SET,
        }
    }

    /// Words of one bitset: 64 slots each.
    pub(super) fn words(&self) -> usize {
        self.words
    }

    /// Makes every set wide enough for `slots` slots. Copies all of them when a further word is needed.
    pub(super) fn widen(&mut self, slots: usize) {
        let words = slots.div_ceil(64);
        if words <= self.words {
            return;
        }
        for chunk in &mut self.chunks {
            let mut wider = vec![0; CHUNK_SETS * 2 * words];
            // Each bitset by itself: a set is two of them.
            for (narrow, wide) in chunk.chunks(self.words).zip(wider.chunks_mut(words)) {
                wide[..narrow.len()].copy_from_slice(narrow);
            }
            *chunk = wider;
        }
        self.words = words;
    }

    /// Whether `slot` is a holder, and then whether in memory.
    pub(super) fn get(&self, holders: Holders, slot: usize) -> Option<bool> {
        if let Some(set) = holders.set() {
            let (held, in_memory) = self.bits(set).split_at(self.words);
            return has(held, slot).then(|| has(in_memory, slot));
        }
        let found = holders.inline().find(|(held, _)| *held == slot);
        found.map(|(_, in_memory)| in_memory)
    }

    /// Writes who holds the block, then who does in memory, into `out`: two bitsets.
    pub(super) fn load(&self, holders: Holders, out: &mut [u64]) {
        if let Some(set) = holders.set() {
            out.copy_from_slice(self.bits(set));
            return;
        }
        out.fill(0);
        let (held, in_memory) = out.split_at_mut(self.words);
        for (slot, fast) in holders.inline() {
            assign(held, slot, true);
            assign(in_memory, slot, fast);
        }
    }

    /// How many of `among`, a bitset, hold the block.
    pub(super) fn count_among(&self, holders: Holders, among: &[u64]) -> usize {
        if let Some(set) = holders.set() {
            let held = &self.bits(set)[..self.words];
            return held
                .iter()
                .zip(among)
                .map(|(a, b)| (a & b).count_ones() as usize)
                .sum();
        }
        holders.inline().filter(|(slot, _)| has(among, *slot)).count()
    }

    /// Makes `slot` a holder, or changes whether it is one in memory.
    pub(super) fn insert(&mut self, holders: &mut Holders, slot: usize, in_memory: bool) {
        if holders.set().is_none() {
            let [first, second] = holders.codes();
            let new = code(slot, in_memory);
            let is_it = |code: u32| code != 0 && decode(code).0 == slot;
            *holders = match (is_it(first), is_it(second)) {
                (true, _) => Holders::of_codes(new, second),
                (_, true) => Holders::of_codes(first, new),
                _ if second == 0 => Holders::of_codes(first, new),
                _ => self.spill([first, second]),
            };
        }
        if let Some(set) = holders.set() {
            let words = self.words;
            let (held, fast) = self.bits_mut(set).split_at_mut(words);
            assign(held, slot, true);
            assign(fast, slot, in_memory);
        }
    }

    /// Makes `slot` no holder. A set with one holder left is given up for the inline form; not with two, since the next
    /// holder would need it again.
    pub(super) fn remove(&mut self, holders: &mut Holders, slot: usize) {
        let Some(set) = holders.set() else {
            let [first, second] = holders.codes().map(|code| {
                let is_it = code != 0 && decode(code).0 == slot;
                if is_it { 0 } else { code }
            });
            *holders = Holders::of_codes(first, second);
            return;
        };
        let words = self.words;
        let (held, fast) = self.bits_mut(set).split_at_mut(words);
        assign(held, slot, false);
        assign(fast, slot, false);
        let mut left = members(held);
        let one = (left.next(), left.next());
        if let (last, None) = one {
            let inline = last.map_or(Holders::NONE, |last| Holders::one(last, has(fast, last)));
            drop(left);
            self.release(*holders);
            *holders = inline;
        }
    }

    /// The block has no holders any more.
    pub(super) fn release(&mut self, holders: Holders) {
        if let Some(set) = holders.set() {
            let next = self.free;
            self.bits_mut(set)[0] = u64::from(next);
            self.free = set;
        }
    }

    fn spill(&mut self, codes: [u32; 2]) -> Holders {
        let set = self.free;
        let set = if set == NO_SET {
            if self.made as usize == self.chunks.len() * CHUNK_SETS {
                self.chunks.push(vec![0; CHUNK_SETS * 2 * self.words]);
            }
            self.made += 1;
            self.made - 1
        } else {
            self.free = self.bits(set)[0] as u32;
            set
        };
        let words = self.words;
        self.bits_mut(set).fill(0);
        let (held, fast) = self.bits_mut(set).split_at_mut(words);
        for (slot, in_memory) in codes.map(decode) {
            assign(held, slot, true);
            assign(fast, slot, in_memory);
        }
        Holders(IN_SET | set)
    }

    fn bits(&self, set: u32) -> &[u64] {
        let at = set as usize % CHUNK_SETS * 2 * self.words;
        &self.chunks[set as usize / CHUNK_SETS][at..][..2 * self.words]
    }

    fn bits_mut(&mut self, set: u32) -> &mut [u64] {
        let at = set as usize % CHUNK_SETS * 2 * self.words;
        &mut self.chunks[set as usize / CHUNK_SETS][at..][..2 * self.words]
    }
}
