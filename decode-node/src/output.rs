//! What the client sees of a sequence's tokens: text, and when it ends.
//!
//! Invariant: what a token adds to the text depends on the tokens before it alone, and is told together with it. So
//! a node that resumes a request from the tokens that were delivered knows exactly what text was delivered, and what
//! was held back.
//!
//! Rules, as in the OpenAI API and vLLM:
//! - The model's end-of-sequence token, a stop token and the token that completes a stop string all end the output with
//!   [`FinishReason::Stop`]. Each counts as a completion token. Neither their text nor anything behind the beginning of a
//!   stop string is output.
//! - `max_tokens` and the end of the context end it with [`FinishReason::Length`].
//!
//! Pure. Elsewhere: bytes to characters and the search for stop strings (`engine::detokenizer`).

use engine::{Detokenizer, StopMatcher, Tokenizer};
use types::{Error, FinishReason, SamplingParams, Token};

/// What one token adds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Text that is certain now; often empty.
    pub text: String,
    /// Set if this was the last token.
    pub finish: Option<FinishReason>,
}

/// The output of one sequence so far.
#[derive(Debug, Clone)]
pub struct Output {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Tokens that end the output.
    ends: Vec<Token>,
    generated: usize,
    generated_max: usize,
    finish: Option<FinishReason>,
}

impl Output {
    /// No token yet. `eos` are the model's own ends; prompt and output together have at most `context_tokens` tokens.
    pub fn new(
        tokenizer: &Tokenizer,
        eos: &[Token],
        params: &SamplingParams,
        prompt_tokens: usize,
        context_tokens: usize,
    ) -> Self {
        let mut ends = params.stop_tokens.clone();
        if !params.ignore_eos {
            ends.extend_from_slice(eos);
        }
        Self {
            detokenizer: Detokenizer::new(tokenizer, true),
            stops: StopMatcher::new(&params.stop),
            ends,
            generated: 0,
            generated_max: (params.max_tokens as usize).min(context_tokens.saturating_sub(prompt_tokens)),
            finish: None,
        }
    }

    /// Takes tokens that another node delivered, with their text.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`] if the output ended before the last one: no node can have delivered these.
    pub fn resume(&mut self, tokens: &[Token]) -> Result<(), Error> {
        for token in tokens {
            if self.finish.is_some() {
                return Err(Error::invalid(
                    "resumed",
                    format!(
                        "resumed has {} tokens, but the output ends after {}",
                        tokens.len(),
                        self.generated
                    ),
                ));
            }
            // Its text was delivered with it.
            self.push(*token);
        }
        Ok(())
    }

    /// Takes the next token. Not to be called after the last one.
    pub fn push(&mut self, token: Token) -> Piece {
        self.generated += 1;
        if self.ends.contains(&token) {
            return self.end("", FinishReason::Stop);
        }
        let text = self.detokenizer.push(token);
        if self.generated >= self.generated_max {
            return self.end(&text, FinishReason::Length);
        }
        let outcome = self.stops.push(&text);
        self.finish = outcome.matched.then_some(FinishReason::Stop);
        Piece {
            text: outcome.emit,
            finish: self.finish,
        }
    }

    /// Lets go of what was held back. That may still complete a stop string.
    fn end(&mut self, text: &str, reason: FinishReason) -> Piece {
        let mut outcome = self.stops.push(text);
        if !outcome.matched {
            let rest = self.stops.push(&self.detokenizer.finish());
            outcome.emit.push_str(&rest.emit);
            outcome.matched = rest.matched;
        }
        let finish = if outcome.matched {
            FinishReason::Stop
        } else {
            outcome.emit.push_str(&self.stops.finish());
            reason
        };
        self.finish = Some(finish);
        Piece {
            text: outcome.emit,
            finish: self.finish,
        }
    }

    /// Tokens so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Tokens that may still come.
    pub fn remaining(&self) -> usize {
        match self.finish {
            Some(_) => 0,
            None => self.generated_max - self.generated,
        }
    }

    /// Why it ended, if it has.
    pub fn finish(&self) -> Option<FinishReason> {
        self.finish
    }
}

#[cfg(test)]
mod tests;
