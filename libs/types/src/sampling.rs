//! What a client may ask of the choice of tokens.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Token};

/// Top log-probabilities that a request may ask for, as in the OpenAI API.
pub const TOP_LOGPROBS_MAX: u8 = 20;
/// Stop strings per request. OpenAI allows 4; agents need some more.
pub const STOP_STRINGS_MAX: usize = 16;
/// Length of one stop string, which bounds the text that is held back while it might match.
pub const STOP_STRING_BYTES_MAX: usize = 256;
/// Entries of a logit bias, as in the OpenAI API.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// How the next token is drawn. The defaults are greedy and unpenalised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. 0 to 2.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens that together reach this probability. In (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one. In [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of every token in prompt or output; 1 is off (CTRL,
    /// arXiv 1909.05858). In (0, 2].
    pub repetition_penalty: f32,
    /// Subtracted once from every token in the output. -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted for every occurrence in the output. -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens. -100 to 100 each.
    pub logit_bias: BTreeMap<Token, f32>,
    /// The draw at a position depends on this and the position alone.
    pub seed: u64,
    /// Most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// Texts that end the output and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the output, beside the model's own.
    pub stop_tokens: Vec<Token>,
    /// Goes on after the model's end-of-sequence token. For benchmarks.
    pub ignore_eos: bool,
    /// Whether each token's log-probability is wanted, and with how many alternatives.
    pub logprobs: Option<u8>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            max_tokens: 256,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Checks every range. `vocabulary` is the model's number of tokens.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorCode::Invalid`], naming the parameter by its name in the OpenAI API.
    pub fn validate(&self, vocabulary: usize) -> Result<(), Error> {
        let range = |name: &str, value: f32, low: f32, high: f32| {
            if value.is_finite() && (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::invalid(
                    name,
                    format!("{name} is {value}, but must be between {low} and {high}"),
                ))
            }
        };
        range("temperature", self.temperature, 0.0, 2.0)?;
        range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range(
            "repetition_penalty",
            self.repetition_penalty,
            f32::MIN_POSITIVE,
            2.0,
        )?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        at_most("logit_bias", self.logit_bias.len(), LOGIT_BIAS_MAX)?;
        at_most("stop", self.stop.len(), STOP_STRINGS_MAX)?;
        at_most("stop_token_ids", self.stop_tokens.len(), STOP_STRINGS_MAX)?;
        at_most(
            "top_logprobs",
            usize::from(self.logprobs.unwrap_or(0)),
            usize::from(TOP_LOGPROBS_MAX),
        )?;
        for (token, bias) in &self.logit_bias {
            range("logit_bias", *bias, -100.0, 100.0)?;
            if *token as usize >= vocabulary {
                return Err(Error::invalid(
                    "logit_bias",
                    format!("logit_bias names token {token}, but the model has {vocabulary}"),
                ));
            }
        }
        for stop in &self.stop {
            if stop.is_empty() {
                return Err(Error::invalid("stop", "a stop string must not be empty"));
            }
            at_most("stop", stop.len(), STOP_STRING_BYTES_MAX)?;
        }
        if self.max_tokens == 0 {
            return Err(Error::invalid(
                "max_tokens",
                "max_tokens is 0, but must be at least 1",
            ));
        }
        Ok(())
    }
}

fn at_most(name: &str, value: usize, limit: usize) -> Result<(), Error> {
    if value <= limit {
        return Ok(());
    }
    Err(Error::invalid(
        name,
        format!("{name} has {value}, but at most {limit} are allowed"),
    ))
}

/// Why a request ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model's end-of-sequence token, a stop token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

impl FinishReason {
    /// The name in the OpenAI API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A drawn token's natural log-probability before temperature and filters, with alternatives, most likely first.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The drawn token's.
    pub logprob: f32,
    /// The most likely tokens of that position.
    pub top: Vec<(Token, f32)>,
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("temperature", SamplingParams { temperature: f32::NAN, ..Default::default() })]
    #[case("temperature", SamplingParams { temperature: -0.1, ..Default::default() })]
    #[case("top_p", SamplingParams { top_p: 0.0, ..Default::default() })]
    #[case("min_p", SamplingParams { min_p: 1.5, ..Default::default() })]
    #[case("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..Default::default() })]
    #[case("presence_penalty", SamplingParams { presence_penalty: 3.0, ..Default::default() })]
    #[case("max_tokens", SamplingParams { max_tokens: 0, ..Default::default() })]
    #[case("stop", SamplingParams { stop: vec![String::new()], ..Default::default() })]
    #[case("logit_bias", SamplingParams { logit_bias: [(100, 1.0)].into(), ..Default::default() })]
    #[case("top_logprobs", SamplingParams { logprobs: Some(21), ..Default::default() })]
    fn a_bad_parameter_is_named(#[case] param: &str, #[case] params: SamplingParams) {
        let error = params.validate(100).expect_err("must be refused");
        assert_eq!(error.param.as_deref(), Some(param));
    }

    #[test]
    fn defaults_are_valid() {
        SamplingParams::default().validate(1).expect("valid");
    }
}
