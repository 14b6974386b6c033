//! Streaming text out of tokens.
//!
//! A token's bytes may end within a character, and a text may end within what might become a stop string. Both are held
//! back here until they are decided, so that what was sent never has to be taken back.
//!
//! Pure: no I/O, no clock.

use std::collections::VecDeque;

use types::Token;

use crate::tokenizer::Tokenizer;

/// Turns tokens into text one at a time.
///
/// The pieces together are exactly `String::from_utf8_lossy` of all tokens' bytes: it continues a text, so unlike
/// [`Tokenizer::decode`] it takes no leading space away.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The beginning of a character: at most 3 bytes between calls.
    incomplete: Vec<u8>,
}

impl Detokenizer {
    /// Nothing pushed yet. With `skip_special`, special tokens have no text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            skip_special,
            incomplete: Vec::new(),
        }
    }

    /// The text that `token` completes; often empty.
    pub fn push(&mut self, token: Token) -> String {
        if !(self.skip_special && self.tokenizer.is_special(token)) {
            self.incomplete
                .extend_from_slice(self.tokenizer.token_bytes(token));
        }
        take_complete(&mut self.incomplete)
    }

    /// The text of what can no longer be completed.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.incomplete)).into_owned()
    }
}

/// Takes all but an incomplete character at the end, with U+FFFD for what is no UTF-8.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).expect("checked up to here"));
                rest = after;
                let Some(invalid) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[invalid..];
            }
        }
    }
    let kept = rest.len();
    bytes.drain(..bytes.len() - kept);
    text
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is certainly output.
    pub emit: String,
    /// A stop string was completed; it and everything after it is not output.
    pub matched: bool,
}

/// Looks for stop strings in text that comes in pieces.
///
/// Output ends before the stop string that is complete first, that is the one with the earliest end; of several
/// that end there, before the longest. Less than the longest stop string is held back, which
/// [`types::sampling::STOP_STRING_BYTES_MAX`] bounds.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    held: VecDeque<u8>,
    matched: bool,
}

/// One stop string in a Knuth-Morris-Pratt automaton.
#[derive(Debug, Clone)]
struct Stop {
    text: Vec<u8>,
    /// Length of the longest proper prefix that is also a suffix, of each prefix of `text`.
    borders: Vec<usize>,
    /// How much of `text` the input ends with.
    length: usize,
}

impl StopMatcher {
    /// Looks for any of `stops`. Empty ones are never found.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops = stops
            .iter()
            .map(|stop| stop.as_ref())
            .filter(|stop| !stop.is_empty());
        Self {
            stops: stops.map(Stop::new).collect(),
            held: VecDeque::new(),
            matched: false,
        }
    }

    /// Takes the next text. After a match everything is swallowed.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.matched {
            return StopOutcome {
                emit: String::new(),
                matched: true,
            };
        }
        if self.stops.is_empty() {
            return StopOutcome {
                emit: text.to_owned(),
                matched: false,
            };
        }
        for byte in text.bytes() {
            self.held.push_back(byte);
            let found = self.stops.iter_mut().filter_map(|stop| stop.advance(byte)).max();
            if let Some(length) = found {
                self.matched = true;
                let emit = self.take(self.held.len() - length);
                self.held.clear();
                return StopOutcome { emit, matched: true };
            }
        }
        // Any of the stops may still turn out to have begun, so the longest beginning decides.
        let undecided = self.stops.iter().map(|stop| stop.length).max().unwrap_or(0);
        StopOutcome {
            emit: self.take(self.held.len() - undecided),
            matched: false,
        }
    }

    /// The text that was held back for nothing: the output is over and no stop string was completed.
    pub fn finish(&mut self) -> String {
        for stop in &mut self.stops {
            stop.length = 0;
        }
        self.take(self.held.len())
    }

    /// Takes the first bytes of what is held. They end where a stop string begins or where the text ends, so they
    /// are whole characters.
    fn take(&mut self, bytes: usize) -> String {
        let bytes: Vec<u8> = self.held.drain(..bytes).collect();
        String::from_utf8(bytes).expect("text is cut between characters")
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        let text = text.as_bytes().to_vec();
        let mut borders = vec![0; text.len()];
        let mut length = 0;
        for at in 1..text.len() {
            while length > 0 && text[at] != text[length] {
                length = borders[length - 1];
            }
            if text[at] == text[length] {
                length += 1;
            }
            borders[at] = length;
        }
        Self {
            text,
            borders,
            length: 0,
        }
    }

    /// Takes one byte; the length of the stop string if that completed it.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        while self.length > 0 && self.text[self.length] != byte {
            self.length = self.borders[self.length - 1];
        }
        if self.text[self.length] == byte {
            self.length += 1;
        }
        if self.length < self.text.len() {
            return None;
        }
        self.length = 0;
        Some(self.text.len())
    }
}

#[cfg(test)]
mod tests;
