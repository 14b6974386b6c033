//! What is written, and what is asked for.

use super::*;

const TTL: Duration = Duration::from_secs(60);

fn grid() -> Grid {
    Grid::new(BlockHash([7; 16]), 512)
}

fn chain(seed: u32, blocks: u32) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..blocks).map(|i| seed * 100_000 + i).collect();
    grid().root().chain(&tokens, 1)
}

fn history(uses_min: u32) -> History {
    History::new(grid(), uses_min, TTL)
}

fn names(history: &mut History) -> Vec<BlockHash> {
    std::iter::from_fn(|| history.take_next())
        .map(|next| next.name())
        .collect()
}

#[test]
fn a_segment_is_written_once_enough_requests_had_it_and_its_ancestors_first() {
    let mut history = history(3);
    let chain = chain(1, 40);
    history.reused(&chain);
    assert_eq!(names(&mut history), []);
    // The third request shares only the first segment.
    history.reused(&chain[..20]);
    assert_eq!(names(&mut history), [chain[15]]);
    history.reused(&chain);
    assert_eq!(
        names(&mut history),
        [chain[31]],
        "the first one is on its way already"
    );
}

#[test]
fn a_candidate_names_the_segment_before_it() {
    let mut history = history(2);
    let chain = chain(1, 32);
    history.reused(&chain);
    let first = history.take_next().unwrap();
    assert_eq!((first.before, first.blocks.as_slice()), (None, &chain[..16]));
    let second = history.take_next().unwrap();
    assert_eq!(
        (second.before, second.blocks.as_slice()),
        (Some(chain[15]), &chain[16..])
    );
    history.wrote(first.name());
    assert!(history.is_stored(&chain[15]) && !history.is_stored(&chain[31]));
}

#[test]
fn what_is_pinned_is_written_at_once() {
    let mut history = history(100);
    let chain = chain(1, 16);
    history.wanted(&chain);
    assert_eq!(names(&mut history), [chain[15]]);
}

#[test]
fn what_is_in_the_bucket_is_not_written_again_and_what_failed_is_tried_at_its_next_use() {
    let mut history = history(2);
    let chain = chain(1, 16);
    history.reused(&chain);
    let candidate = history.take_next().unwrap();
    history.reused(&chain);
    assert_eq!(history.take_next(), None, "it is being written");
    history.gave_up(&candidate);
    assert_eq!(history.take_next(), None);
    history.reused(&chain);
    assert_eq!(history.take_next(), Some(candidate));
    history.wrote(chain[15]);
    history.reused(&chain);
    assert_eq!(history.take_next(), None);
    // Somebody has cleared the bucket.
    history.is_absent(chain[15], Instant::now());
    history.reused(&chain);
    assert_eq!(names(&mut history), [chain[15]]);
}

#[test]
fn a_segment_that_is_not_there_is_asked_for_again_after_a_while() {
    let mut history = history(2);
    let (name, now) = (chain(1, 16)[15], Instant::now());
    assert!(history.may_be_stored(&name, now));
    history.is_absent(name, now);
    assert!(!history.may_be_stored(&name, now + TTL / 2));
    assert!(history.may_be_stored(&name, now + TTL));
    history.is_absent(name, now);
    history.wrote(name);
    assert!(history.may_be_stored(&name, now), "this node has just written it");
}

#[test]
fn a_damaged_object_is_avoided_and_replaced() {
    let mut history = history(2);
    let (chain, now) = (chain(1, 16), Instant::now());
    history.wrote(chain[15]);
    history.is_damaged(chain[15], now);
    assert!(!history.may_be_stored(&chain[15], now));
    history.reused(&chain);
    let candidate = history.take_next().unwrap();
    assert!(candidate.replaces);
    history.gave_up(&candidate);
    history.reused(&chain);
    assert!(history.take_next().unwrap().replaces, "still no good");
}

#[test]
fn memory_and_queue_are_bounded() {
    let mut history = history(2);
    for seed in 0..QUEUED_MAX as u32 + 10 {
        history.reused(&chain(seed, 16));
    }
    assert_eq!(names(&mut history).len(), QUEUED_MAX);
    let mut recent: Recent<usize> = Recent::default();
    let name = |i: usize| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&i.to_le_bytes());
        BlockHash(bytes)
    };
    for i in 0..2 * REMEMBERED_MAX {
        recent.insert(name(i), i);
        // A name that comes and goes takes one place.
        recent.insert(name(usize::MAX), i);
        recent.remove(&name(usize::MAX));
    }
    assert!(recent.values.len() <= REMEMBERED_MAX && recent.order.len() <= REMEMBERED_MAX);
    assert_eq!(
        recent.get(&name(2 * REMEMBERED_MAX - 1)),
        Some(&(2 * REMEMBERED_MAX - 1))
    );
    assert_eq!(recent.get(&name(0)), None);
}
