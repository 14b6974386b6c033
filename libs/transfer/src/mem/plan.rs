//! The fate of one transfer, drawn before it begins. Pure: the same seed, faults and size give the same plan.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::Faults;
use crate::Slice;

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// An independent sequence for each pair.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut base = Self(seed);
        Self(base.next() ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not 0. The bias is below 2⁻³² for all that is drawn here.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn happens(&mut self, probability: f64) -> bool {
        ((self.next() >> 11) as f64) < probability * (1_u64 << 53) as f64
    }

    fn duration(&mut self, range: &Range<Duration>) -> Duration {
        let width = range.end.saturating_sub(range.start);
        let width_ns = u64::try_from(width.as_nanos()).unwrap_or(u64::MAX);
        match width_ns {
            0 => range.start,
            width_ns => range.start + Duration::from_nanos(self.below(width_ns)),
        }
    }
}

/// What happens to a transfer, if nobody interferes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Pieces of its slices in the order in which they arrive, each with the time it takes after the one before.
    pub(crate) chunks: Vec<(Slice, Duration)>,
    /// Bits that change on their way, by the position of their chunk.
    pub(crate) flips: BTreeMap<usize, u64>,
    /// The connection breaks before the chunk at this position; the number of chunks means before the
    /// acknowledgement.
    pub(crate) breaks_before: Option<usize>,
    /// Chunks that had not arrived when the transfer failed arrive after this time all the same.
    pub(crate) straggles_after: Option<Duration>,
    /// How long the acknowledgement takes.
    pub(crate) acknowledgement: Duration,
}

impl Plan {
    pub(crate) fn draw(random: &mut Random, faults: &Faults, slices: &[Slice]) -> Self {
        let mut chunks = pieces(slices, faults.chunk_bytes.get() as u64);
        if faults.reorder {
            for last in (1..chunks.len()).rev() {
                chunks.swap(last, random.below(last as u64 + 1) as usize);
            }
        }
        let chunks: Vec<_> = chunks
            .into_iter()
            .map(|chunk| (chunk, random.duration(&faults.delay)))
            .collect();
        let breaks = random.happens(faults.break_probability);
        let position = random.below(chunks.len() as u64 + 1) as usize;
        let straggles = random.happens(faults.straggle_probability);
        let straggle_delay = random.duration(&faults.straggle_delay);
        let acknowledgement = random.duration(&faults.delay);
        let mut flips = BTreeMap::new();
        for (position, (chunk, _)) in chunks.iter().enumerate() {
            if random.happens(faults.flip_probability) {
                flips.insert(position, random.below(chunk.len * 8));
            }
        }
        Self {
            chunks,
            flips,
            breaks_before: breaks.then_some(position),
            straggles_after: straggles.then_some(straggle_delay),
            acknowledgement,
        }
    }
}

fn pieces(slices: &[Slice], chunk_bytes: u64) -> Vec<Slice> {
    let mut pieces = Vec::new();
    for slice in slices {
        let mut rest = *slice;
        while rest.len > 0 {
            let len = rest.len.min(chunk_bytes);
            pieces.push(Slice { len, ..rest });
            rest.local_offset += len;
            rest.remote_offset += len;
            rest.len -= len;
        }
    }
    pieces
}
