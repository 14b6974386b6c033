//! Text to tokens and back.
//!
//! Byte-pair encoding as the model's own file describes it: from GGUF metadata (`gguf.rs`) or from a Hugging Face
//! `tokenizer.json` (`json.rs`), both run by the `tokenizers` crate. Decoding is ours: every token has fixed bytes, and
//! a text is their concatenation, so that streaming ([`crate::detokenizer`]) and decoding at once cannot disagree.
//!
//! Invariant: encoding never fails, and the bytes of the tokens are the bytes of the text, after the space that SentencePiece
//! models put in front, where there is one. Bytes that a vocabulary lacks are left out, as by llama.cpp and
//! `transformers`: SmolLM2's, for one, has no token for some control characters and for the planes of Unicode from 4 on.

mod bytes;
mod gguf;
mod json;
mod pre_tokenizers;

use std::sync::{Arc, OnceLock};

use types::Token;

use self::bytes::TokenBytes;
pub(crate) use self::{bytes::byte_character, gguf::Pieces};

/// A bound on the ids in a vocabulary, far above the largest (Gemma's 2^18).
const VOCABULARY_MAX: usize = 1 << 20;
/// Longest piece that can be merged. Real ones end near 100; hostile ones would make loading quadratic.
const PIECE_BYTES_MAX: usize = 1 << 10;

/// Why a vocabulary cannot be used, or a text not be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// A kind of model or of pre-tokenisation that would be computed wrongly.
    #[error("{what} {name:?} is not supported; supported are {supported}")]
    Unsupported {
        /// What it is the name of.
        what: &'static str,
        /// As the file names it.
        name: String,
        /// Those that would do.
        supported: String,
    },
    /// The vocabulary contradicts itself or lacks something.
    #[error("{0}")]
    Invalid(String),
}

/// A model's tokenizer. Clones share everything.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Takes the names of special tokens in a text for the tokens.
    parsing: tokenizers::Tokenizer,
    /// Takes them for text. The library has it as a setting of the tokenizer, so this is a copy, made when it is first used.
    literal: OnceLock<tokenizers::Tokenizer>,
    bytes: TokenBytes,
    bos: Option<Token>,
    eos: Option<Token>,
    add_bos: bool,
    adds_space: bool,
}

impl Tokenizer {
    /// From the metadata of a GGUF file.
    pub(crate) fn from_pieces(pieces: &Pieces<'_>) -> Result<Self, TokenizerError> {
        gguf::build(pieces)
    }

    /// From the bytes of a `tokenizer.json`, with the contents of the special tokens that its sister files name.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`] when it is not byte-pair encoding, or is inconsistent.
    pub fn from_json(json: &[u8], bos: Option<&str>, eos: Option<&str>) -> Result<Self, TokenizerError> {
        json::build(json, bos, eos)
    }

    fn new(
        parsing: tokenizers::Tokenizer,
        bytes: TokenBytes,
        bos: Option<Token>,
        eos: Option<Token>,
        add_bos: bool,
    ) -> Result<Self, TokenizerError> {
        for (name, token) in [("bos", bos), ("eos", eos)] {
            if let Some(token) = token.filter(|token| *token as usize >= bytes.len()) {
                let message = format!(
                    "the {name} token is {token}, but there are {} tokens",
                    bytes.len()
                );
                return Err(TokenizerError::Invalid(message));
            }
        }
        let mut inner = Inner {
            parsing,
            literal: OnceLock::new(),
            bytes,
            bos,
            eos,
            add_bos,
            adds_space: false,
        };
        let probe = encode(&inner.parsing, "a");
        inner.adds_space = probe
            .first()
            .is_some_and(|token| inner.bytes.of(*token).starts_with(b" "));
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The tokens of `text`. No begin-of-sequence token is added: see [`Tokenizer::add_bos`].
    ///
    /// With `parse_special` the names of special tokens in the text, such as `<|im_end|>`, become these tokens: right for
    /// rendered chat templates. Without, they are ordinary text: right for what users wrote.
    pub fn encode(&self, text: &str, parse_special: bool) -> Vec<Token> {
        if parse_special {
            return encode(&self.inner.parsing, text);
        }
        let literal = self.inner.literal.get_or_init(|| {
            let mut literal = self.inner.parsing.clone();
            literal.set_encode_special_tokens(true);
            literal
        });
        encode(literal, text)
    }

    /// The text of `tokens`; what is not valid UTF-8 becomes U+FFFD. It is the inverse of [`Tokenizer::encode`]: the space
    /// that encoding puts in front is taken away. Tokens outside of the vocabulary have no text.
    pub fn decode(&self, tokens: &[Token], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for token in tokens {
            if !(skip_special && self.is_special(*token)) {
                bytes.extend_from_slice(self.token_bytes(*token));
            }
        }
        let text = if self.inner.adds_space {
            bytes.strip_prefix(b" ").unwrap_or(&bytes)
        } else {
            &bytes
        };
        String::from_utf8_lossy(text).into_owned()
    }

    /// The bytes that a token stands for, wherever it stands; often not UTF-8 by themselves.
    pub fn token_bytes(&self, token: Token) -> &[u8] {
        self.inner.bytes.of(token)
    }

    /// Whether a token steers the model instead of being text.
    pub fn is_special(&self, token: Token) -> bool {
        self.inner.bytes.is_special(token)
    }

    /// Number of tokens; ids are below it.
    pub fn vocabulary(&self) -> usize {
        self.inner.bytes.len()
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<Token> {
        self.inner.bos
    }

    /// The token that ends a sequence. The model's configuration may name more.
    pub fn eos(&self) -> Option<Token> {
        self.inner.eos
    }

    /// Whether a prompt begins with [`Tokenizer::bos`]. A chat template writes it by itself.
    pub fn add_bos(&self) -> bool {
        self.inner.add_bos && self.inner.bos.is_some()
    }

    /// The token with this exact piece as the vocabulary spells it.
    pub fn id_of(&self, piece: &str) -> Option<Token> {
        self.inner.parsing.token_to_id(piece)
    }

    /// A token as the vocabulary spells it.
    pub fn piece(&self, token: Token) -> Option<String> {
        self.inner.parsing.id_to_token(token)
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<Token> {
    // The library's only failure is an unknown-token that is not in the vocabulary, which both constructors rule out.
    let encoding = tokenizer
        .encode_fast(text, false)
        .expect("byte-pair encoding does not fail");
    encoding.get_ids().to_vec()
}

#[cfg(test)]
mod tests;
