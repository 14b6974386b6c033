//! Prompts of a given number of tokens, as functions of a seed. Pure.

use kv_store::replay::workloads::Random;
use types::BlockHash;

/// Words that byte-pair vocabularies have as one token with the space before them.
const WORDS: [&str; 128] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "community",
    "name",
    "president",
    "team",
    "minute",
    "idea",
    "body",
    "information",
    "back",
    "parent",
    "face",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
    "party",
    "result",
    "change",
    "morning",
    "reason",
    "research",
    "girl",
    "guy",
    "moment",
    "air",
    "teacher",
    "force",
    "education",
    "foot",
    "boy",
    "age",
    "policy",
    "music",
    "market",
    "sense",
    "nation",
    "plan",
    "college",
    "interest",
    "death",
    "course",
    "experience",
    "effect",
    "use",
    "class",
    "control",
    "field",
    "development",
    "role",
    "effort",
    "rate",
    "heart",
    "drug",
    "show",
    "leader",
    "light",
    "voice",
    "wife",
];

/// Keeps the seeds of what all prompts share apart from those of single ones.
const SHARED: u64 = 0x5348_4152_4544;

/// A prompt of `tokens` tokens, the first `shared` of which are the same for all numbers of a seed.
pub(super) fn synthetic(seed: u64, number: u64, tokens: u64, shared: u64) -> String {
    let shared = shared.min(tokens);
    let mut text = String::new();
    words(&mut text, &mut Random::new(seed ^ SHARED), shared);
    words(&mut text, &mut stream(seed, number), tokens - shared);
    text
}

/// A prompt of `tokens` tokens in `blocks` of `block_tokens` tokens each but for the last: equal blocks have equal words, so that prompts share
/// their prefixes as the trace says.
pub(super) fn of_blocks(blocks: &[BlockHash], block_tokens: u64, tokens: u64) -> String {
    let (mut text, mut left) = (String::new(), tokens);
    for block in blocks {
        let taken = left.min(block_tokens);
        words(&mut text, &mut Random::new(seed_of(*block)), taken);
        left -= taken;
    }
    text
}

/// Hashes are uniform in all their bytes, so any eight of them tell blocks apart.
fn seed_of(block: BlockHash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = block.0;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// Randomness for one request, whatever others draw.
pub(super) fn stream(seed: u64, number: u64) -> Random {
    let mut seeds = Random::new(seed);
    Random::new(seeds.next() ^ number)
}

fn words(text: &mut String, random: &mut Random, count: u64) {
    for _ in 0..count {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(WORDS[random.below(WORDS.len() as u64) as usize]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn count(text: &str) -> usize {
        text.split(' ').count()
    }

    #[test]
    fn words_differ() {
        assert_eq!(WORDS.iter().collect::<BTreeSet<_>>().len(), WORDS.len());
    }

    #[test]
    fn prompts_have_their_length_and_share_their_prefix_alone() {
        let (one, other) = (synthetic(7, 0, 40, 16), synthetic(7, 1, 40, 16));
        assert_eq!((count(&one), count(&other)), (40, 40));
        let prefix = |text: &str| text.split(' ').take(16).collect::<Vec<_>>().join(" ");
        assert_eq!(prefix(&one), prefix(&other));
        assert_ne!(one, other);
        assert_eq!(one, synthetic(7, 0, 40, 16));
        assert_ne!(prefix(&one), prefix(&synthetic(8, 0, 40, 16)));
        assert_eq!(
            count(&synthetic(7, 0, 4, 16)),
            4,
            "a short prompt is a part of the prefix"
        );
    }

    #[test]
    fn equal_blocks_have_equal_words() {
        let block = |number: u8| BlockHash([number; 16]);
        let one = of_blocks(&[block(0), block(1)], 16, 20);
        let other = of_blocks(&[block(0), block(2)], 16, 32);
        assert_eq!((count(&one), count(&other)), (20, 32));
        let first = |text: &str| text.split(' ').take(16).collect::<Vec<_>>().join(" ");
        assert_eq!(first(&one), first(&other));
        assert_ne!(one.split(' ').nth(16), None);
        assert_ne!(
            one[first(&one).len()..],
            other[first(&other).len()..][..one.len() - first(&one).len()]
        );
    }
}
