//! Which prefixes are asked for most: the beginnings that prompts share.
//!
//! Invariant: at most `PREFIXES_MAX` prefixes with at most `CHAIN_MAX` blocks each are remembered. The coldest one goes first, and heat
//! halves every `HALF_LIFE`, so what nobody asks for any more makes room by itself.
//!
//! Pure: callers pass times. Elsewhere: who holds their blocks (`index.rs`).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use types::BlockHash;

/// Prefixes that are remembered: far more than are shown, so that a burst of new prompts does not drive out those that last.
const PREFIXES_MAX: usize = 256;
/// Leading blocks that are remembered of each: with 16 bytes each some 2 MiB for all.
const CHAIN_MAX: usize = 512;
/// Requests count half after this long.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// The prefixes that are asked for.
#[derive(Debug, Default)]
pub struct Heat {
    prefixes: HashMap<BlockHash, Prefix>,
}

/// Prompts that begin with the same block.
#[derive(Debug, Clone, PartialEq)]
pub struct Prefix {
    /// Whose they are.
    pub tenant: String,
    /// How many there were.
    pub requests: u64,
    /// The last one's leading blocks.
    pub chain: Vec<BlockHash>,
    /// How many of those all of them have had.
    pub shared_blocks: usize,
    /// Requests, of which older ones count less.
    pub heat: f64,
    updated: Instant,
}

impl Heat {
    /// A prompt of these blocks is asked for.
    pub fn asked(&mut self, tenant: &str, chain: &[BlockHash], now: Instant) {
        let Some(first) = chain.first() else {
            return;
        };
        let chain = &chain[..chain.len().min(CHAIN_MAX)];
        if let Some(prefix) = self.prefixes.get_mut(first) {
            prefix.heat = prefix.heat_at(now) + 1.0;
            prefix.updated = now;
            prefix.requests += 1;
            prefix.shared_blocks = common(&prefix.chain[..prefix.shared_blocks], chain);
            prefix.chain.clear();
            prefix.chain.extend_from_slice(chain);
            return;
        }
        if self.prefixes.len() == PREFIXES_MAX {
            let heats = self
                .prefixes
                .iter()
                .map(|(first, prefix)| (prefix.heat_at(now), *first));
            if let Some((_, coldest)) = heats.min_by(|(a, _), (b, _)| a.total_cmp(b)) {
                self.prefixes.remove(&coldest);
            }
        }
        let prefix = Prefix {
            tenant: tenant.to_owned(),
            requests: 1,
            chain: chain.to_vec(),
            shared_blocks: chain.len(),
            heat: 1.0,
            updated: now,
        };
        self.prefixes.insert(*first, prefix);
    }

    /// The `count` hottest ones, hottest first, with their heat as it is now.
    pub fn hottest(&self, count: usize, now: Instant) -> Vec<Prefix> {
        let mut all: Vec<(f64, &Prefix)> = self
            .prefixes
            .values()
            .map(|prefix| (prefix.heat_at(now), prefix))
            .collect();
        // The chain decides between equals, so that what is shown does not jump.
        all.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| x.chain[0].0.cmp(&y.chain[0].0)));
        let hottest = all.into_iter().take(count);
        hottest
            .map(|(heat, prefix)| Prefix {
                heat,
                ..prefix.clone()
            })
            .collect()
    }
}

impl Prefix {
    fn heat_at(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.updated);
        self.heat * (-passed.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
    }
}

fn common(a: &[BlockHash], b: &[BlockHash]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(first: u8, rest: &[u8]) -> Vec<BlockHash> {
        let numbers = std::iter::once(&first).chain(rest);
        numbers.map(|number| BlockHash([*number; 16])).collect()
    }

    #[test]
    fn prompts_with_one_beginning_are_one_prefix_and_share_what_they_share() {
        let now = Instant::now();
        let mut heat = Heat::default();
        heat.asked("", &chain(1, &[2, 3, 4]), now);
        heat.asked("", &chain(1, &[2, 3, 4, 5]), now);
        heat.asked("", &chain(1, &[2, 9]), now);
        heat.asked("acme", &chain(7, &[]), now);
        heat.asked("", &[], now);
        let hottest = heat.hottest(10, now);
        assert_eq!(hottest.len(), 2);
        assert_eq!((hottest[0].requests, hottest[0].shared_blocks), (3, 2));
        assert_eq!(hottest[0].chain.len(), 3);
        assert_eq!(
            (hottest[1].tenant.as_str(), hottest[1].shared_blocks),
            ("acme", 1)
        );
    }

    #[test]
    fn what_was_asked_for_long_ago_is_colder() {
        let start = Instant::now();
        let mut heat = Heat::default();
        heat.asked("", &chain(1, &[]), start);
        heat.asked("", &chain(1, &[]), start);
        let later = start + HALF_LIFE * 2;
        heat.asked("", &chain(2, &[]), later);
        let hottest = heat.hottest(10, later);
        assert_eq!(hottest[0].chain, chain(2, &[]));
        assert!((hottest[1].heat - 0.5).abs() < 1e-9, "{}", hottest[1].heat);
    }

    #[test]
    fn the_coldest_prefix_makes_room_for_a_new_one() {
        let start = Instant::now();
        let mut heat = Heat::default();
        for number in 0..=255 {
            let at = start + Duration::from_secs(u64::from(number));
            heat.asked("", &chain(number, &[]), at);
        }
        let now = start + Duration::from_secs(300);
        let mut other = chain(0, &[1]);
        other[0].0[15] = 9;
        heat.asked("", &other, now);
        let all = heat.hottest(usize::MAX, now);
        assert_eq!((all.len(), &all[0].chain), (PREFIXES_MAX, &other));
        assert!(all.iter().all(|prefix| prefix.chain != chain(0, &[])));
    }
}
