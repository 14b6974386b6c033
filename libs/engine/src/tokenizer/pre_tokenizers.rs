//! How a text is cut before pairs are merged, by the name in `tokenizer.ggml.pre`.
//!
//! The expressions are the ones that the models were trained with, as their `tokenizer.json` files and llama.cpp
//! (`llama-vocab.cpp`) have them. A model under the wrong one still produces text, only worse, so an unknown name
//! is refused.

use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::TokenizerError;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's cuts for files that do not say: one after the other.
const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// A way of cutting, and what the vocabularies that use it do besides.
pub(super) struct PreTokenizer {
    pub(super) cuts: PreTokenizerWrapper,
    /// A cut that is a token by itself is taken whole, without merging.
    pub(super) ignore_merges: bool,
    /// Whether a prompt begins with the begin-of-sequence token if the file does not say.
    pub(super) add_bos: bool,
}

/// Names with the same meaning, and the meaning.
const NAMES: [(&[&str], Kind); 8] = [
    (
        &["smollm", "starcoder", "refact", "codeshell", "command-r"],
        Kind::DigitsThenGpt2,
    ),
    (&["llama-bpe", "llama3", "llama-v3"], Kind::Llama3),
    // OLMo 2 and Phi-4.
    (&["dbrx", "smaug-bpe"], Kind::Dbrx),
    (&["qwen2", "deepseek-r1-qwen"], Kind::Qwen2),
    // Mistral's byte-level vocabularies.
    (&["tekken"], Kind::Tekken),
    // Phi-4-mini.
    (&["gpt-4o"], Kind::Gpt4o),
    (&["gpt-2", "olmo"], Kind::Gpt2),
    (&["default"], Kind::Default),
];

#[derive(Clone, Copy)]
enum Kind {
    DigitsThenGpt2,
    Llama3,
    Dbrx,
    Qwen2,
    Tekken,
    Gpt4o,
    Gpt2,
    Default,
}

/// The cuts that `name` stands for; a file without a name means `default`.
pub(super) fn by_name(name: Option<&str>) -> Result<PreTokenizer, TokenizerError> {
    let name = name.unwrap_or("default");
    let kind = NAMES
        .iter()
        .find(|(names, _)| names.contains(&name))
        .map(|(_, kind)| *kind);
    let plain = |cuts: Vec<PreTokenizerWrapper>| PreTokenizer {
        cuts: PreTokenizerWrapper::Sequence(Sequence::new(cuts)),
        ignore_merges: false,
        add_bos: false,
    };
    let bytes = |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, use_regex));
    match kind {
        Some(Kind::DigitsThenGpt2) => Ok(plain(vec![
            PreTokenizerWrapper::Digits(Digits::new(true)),
            bytes(true),
        ])),
        Some(Kind::Llama3) => Ok(PreTokenizer {
            ignore_merges: true,
            add_bos: true,
            ..plain(vec![cut(LLAMA3), bytes(false)])
        }),
        Some(Kind::Dbrx) => Ok(plain(vec![cut(LLAMA3), bytes(false)])),
        Some(Kind::Qwen2) => Ok(plain(vec![cut(QWEN2), bytes(false)])),
        Some(Kind::Tekken) => Ok(PreTokenizer {
            ignore_merges: true,
            ..plain(vec![cut(TEKKEN), bytes(false)])
        }),
        Some(Kind::Gpt4o) => Ok(plain(vec![cut(GPT4O), bytes(false)])),
        Some(Kind::Gpt2) => Ok(plain(vec![bytes(true)])),
        Some(Kind::Default) => Ok(plain(
            DEFAULT.map(cut).into_iter().chain([bytes(false)]).collect(),
        )),
        None => Err(TokenizerError::Unsupported {
            what: "the pre-tokenizer",
            name: name.to_owned(),
            supported: NAMES
                .iter()
                .flat_map(|(names, _)| names.iter().copied())
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

fn cut(expression: &str) -> PreTokenizerWrapper {
    let pattern = SplitPattern::Regex(expression.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    PreTokenizerWrapper::Split(split.expect("the expressions of this file are valid"))
}
