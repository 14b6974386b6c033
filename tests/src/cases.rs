//! Random requests, reproducible from a seed.

use proto::v1;
use types::Token;

/// SplitMix64: enough for test cases, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream that depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.draw() % (high - low + 1)
    }

    /// One of `choices`.
    pub fn choose<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[usize::try_from(self.draw() % choices.len() as u64).expect("small")]
    }

    /// True in one of `n` draws.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.draw().is_multiple_of(n)
    }
}

/// One request of the comparison between a cluster and a single engine.
#[derive(Debug, Clone)]
pub struct Case {
    /// The prompt.
    pub prompt: Vec<Token>,
    /// How to sample.
    pub sampling: types::SamplingParams,
}

impl Case {
    /// A random case. Prompts share prefixes with one another (`documents`), so that caches of every length are hit.
    pub fn random(random: &mut Random, documents: &[Vec<Token>], vocabulary: u32, tokens_max: u32) -> Self {
        let document = random.choose(documents);
        // Short, middling and long prompts are equally likely, so that few cases take most of the time.
        let limit = *random.choose(&[40, 300, document.len() as u64]);
        let length = usize::try_from(random.between(1, limit.min(document.len() as u64))).expect("small");
        let shared = usize::try_from(random.between(0, length as u64)).expect("small");
        let mut prompt = document[..shared].to_vec();
        while prompt.len() < length {
            prompt.push(token(random, vocabulary));
        }
        if random.one_in(4) {
            prompt = document[..length].to_vec();
        }
        let greedy = random.one_in(3);
        let sampling = types::SamplingParams {
            temperature: if greedy {
                0.0
            } else {
                *random.choose(&[0.3, 0.8, 1.0, 1.7])
            },
            top_k: *random.choose(&[0, 0, 5, 40]),
            top_p: *random.choose(&[1.0, 0.9, 0.5]),
            min_p: *random.choose(&[0.0, 0.0, 0.05]),
            repetition_penalty: *random.choose(&[1.0, 1.0, 1.2]),
            presence_penalty: *random.choose(&[0.0, 0.0, 0.7]),
            frequency_penalty: *random.choose(&[0.0, 0.0, 0.4]),
            seed: random.draw(),
            max_tokens: u32::try_from(random.between(1, u64::from(tokens_max))).expect("small"),
            ignore_eos: random.one_in(2),
            ..types::SamplingParams::default()
        };
        Self { prompt, sampling }
    }

    /// The request on the wire.
    pub fn request(&self) -> v1::GenerateRequest {
        crate::request(&self.prompt, proto::convert::sampling_to_wire(&self.sampling))
    }
}

/// A token that is no special one in the fixture's vocabulary.
pub fn token(random: &mut Random, vocabulary: u32) -> Token {
    u32::try_from(random.between(0, u64::from(vocabulary.min(256)) - 1)).expect("small")
}
