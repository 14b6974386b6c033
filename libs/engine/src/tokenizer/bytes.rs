//! What each token stands for.

use std::{collections::HashMap, sync::LazyLock};

use types::Token;

use super::{TokenizerError, VOCABULARY_MAX};

/// SentencePiece's sign for a space.
const SPACE: char = '\u{2581}';

/// The bytes of every token, one after the other.
#[derive(Debug, Default)]
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
    special: Vec<bool>,
}

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: every byte is a printable character.
    ByteLevel,
    /// SentencePiece's: UTF-8 with a sign for the space, and `<0x0A>` for single bytes.
    SentencePiece,
}

impl TokenBytes {
    /// Adds the next token.
    pub(super) fn push(&mut self, bytes: &[u8], special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.special.push(special);
    }

    /// Adds tokens without text up to `token`.
    pub(super) fn fill(&mut self, token: Token) -> Result<(), TokenizerError> {
        if token as usize >= VOCABULARY_MAX {
            let message = format!("token {token} is beyond the limit of {VOCABULARY_MAX}");
            return Err(TokenizerError::Invalid(message));
        }
        while self.len() < token as usize {
            self.push(&[], false);
        }
        Ok(())
    }

    /// The bytes of a token; none of a token that does not exist.
    pub(super) fn of(&self, token: Token) -> &[u8] {
        let index = token as usize;
        let Some(end) = self.ends.get(index) else {
            return &[];
        };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..*end]
    }

    pub(super) fn is_special(&self, token: Token) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }
}

impl Spelling {
    /// The bytes of a piece of text.
    pub(super) fn bytes(self, piece: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                let mut bytes = Vec::with_capacity(piece.len());
                for character in piece.chars() {
                    match CHARACTER_BYTES.get(&character) {
                        Some(byte) => bytes.push(*byte),
                        // Not of the alphabet: a token that somebody added as it is.
                        None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
                bytes
            }
            Self::SentencePiece => match byte_piece(piece) {
                Some(byte) => vec![byte],
                None => piece.replace(SPACE, " ").into_bytes(),
            },
        }
    }

    /// The piece that stands for one byte alone.
    pub(super) fn byte(self, byte: u8) -> String {
        match self {
            Self::ByteLevel => byte_character(byte).to_string(),
            Self::SentencePiece => format!("<0x{byte:02X}>"),
        }
    }

    /// Makes sure that a vocabulary spells its bytes in this way. Byte-level ones may lack bytes that were not in the text
    /// they were trained on; the printable ones of ASCII always are.
    pub(super) fn check_coverage(self, contains: impl Fn(&str) -> bool) -> Result<(), TokenizerError> {
        let needed = match self {
            Self::ByteLevel => b' '..=b'~',
            Self::SentencePiece => 0..=u8::MAX,
        };
        match needed.into_iter().find(|byte| !contains(&self.byte(*byte))) {
            None => Ok(()),
            Some(byte) => Err(TokenizerError::Invalid(format!(
                "the vocabulary has no piece {:?} for the byte {byte:#04x}",
                self.byte(byte)
            ))),
        }
    }
}

/// The byte of a piece such as `<0x0A>`.
fn byte_piece(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the rest follow from U+0100 on in order.
pub(crate) fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|other| !printable(*other)).count() as u32;
    char::from_u32(0x100 + rank).expect("below the surrogates")
}

static CHARACTER_BYTES: LazyLock<HashMap<char, u8>> =
    LazyLock::new(|| (0..=u8::MAX).map(|byte| (byte_character(byte), byte)).collect());
