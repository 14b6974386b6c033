//! A set of small numbers: one word inline, more words once a cluster has more than 64 nodes.

/// A set of node slots.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct NodeSet {
    first: u64,
    /// Slots from 64 on. Empty, without an allocation, in small clusters.
    rest: Vec<u64>,
}

impl NodeSet {
    pub(super) fn insert(&mut self, slot: usize) {
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        if word == 0 {
            self.first |= bit;
            return;
        }
        if self.rest.len() < word {
            self.rest.resize(word, 0);
        }
        self.rest[word - 1] |= bit;
    }

    pub(super) fn remove(&mut self, slot: usize) {
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        if word == 0 {
            self.first &= !bit;
        } else if let Some(bits) = self.rest.get_mut(word - 1) {
            *bits &= !bit;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first == 0 && self.rest.iter().all(|bits| *bits == 0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        let words = std::iter::once(self.first).chain(self.rest.iter().copied());
        words.enumerate().flat_map(|(word, bits)| {
            (0..64)
                .filter(move |bit| bits >> bit & 1 == 1)
                .map(move |bit| word * 64 + bit)
        })
    }

    /// Those in `self` that are not in `other`.
    pub(super) fn minus(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a & !b)
    }

    /// Keeps those that are in `other` too.
    pub(super) fn intersect(&mut self, other: &Self) {
        *self = self.combine(other, |a, b| a & b);
    }

    fn combine(&self, other: &Self, with: impl Fn(u64, u64) -> u64) -> Self {
        let others = other.rest.iter().copied().chain(std::iter::repeat(0));
        Self {
            first: with(self.first, other.first),
            rest: self.rest.iter().zip(others).map(|(a, b)| with(*a, b)).collect(),
        }
    }
}
