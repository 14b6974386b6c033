//! Tokenizers out of Hugging Face's `tokenizer.json`.

use std::collections::HashMap;

use serde_json::Value;
use types::Token;

use super::{
    PIECE_BYTES_MAX, Tokenizer, TokenizerError,
    bytes::{Spelling, TokenBytes},
};

/// Builds the tokenizer. `bos` and `eos` are contents of tokens.
pub(super) fn build(json: &[u8], bos: Option<&str>, eos: Option<&str>) -> Result<Tokenizer, TokenizerError> {
    let document: Value = serde_json::from_slice(json)
        .map_err(|error| TokenizerError::Invalid(format!("tokenizer.json is not JSON: {error}")))?;
    let spelling = spelling(&document)?;
    check_merges(&document["model"], spelling)?;
    let mut tokenizer: tokenizers::Tokenizer = serde_json::from_value(document)
        .map_err(|error| TokenizerError::Invalid(format!("tokenizer.json is not a tokenizer: {error}")))?;
    // A file may carry the settings of a training run, which would cut prompts short without a word.
    tokenizer
        .with_truncation(None)
        .map_err(|error| TokenizerError::Invalid(error.to_string()))?;
    tokenizer.with_padding(None);

    let mut pieces: Vec<(Token, String)> = tokenizer
        .get_vocab(true)
        .into_iter()
        .map(|(piece, token)| (token, piece))
        .collect();
    pieces.sort_unstable();
    pieces.dedup_by_key(|(token, _)| *token);
    let added = tokenizer.get_added_tokens_decoder();
    let mut bytes = TokenBytes::default();
    for (token, piece) in pieces {
        bytes.fill(token)?;
        match added.get(&token) {
            Some(added) => bytes.push(added.content.as_bytes(), added.special),
            None => bytes.push(&spelling.bytes(&piece), false),
        }
    }
    let id = |name: &str, content: Option<&str>| -> Result<Option<Token>, TokenizerError> {
        let Some(content) = content else { return Ok(None) };
        tokenizer.token_to_id(content).map(Some).ok_or_else(|| {
            TokenizerError::Invalid(format!("the {name} token {content:?} is not in the vocabulary"))
        })
    };
    let (bos, eos) = (id("bos", bos)?, id("eos", eos)?);
    let begins = tokenizer
        .encode_fast("a", true)
        .map_err(|error| TokenizerError::Invalid(format!("the tokenizer cannot encode: {error}")))?;
    let add_bos = bos.is_some() && begins.get_ids().first().copied() == bos;
    Tokenizer::new(tokenizer, bytes, bos, eos, add_bos)
}

/// Only kinds whose tokens have fixed bytes can be decoded one by one.
fn spelling(document: &Value) -> Result<Spelling, TokenizerError> {
    let unsupported = |what: &'static str, name: &Value, supported: &str| TokenizerError::Unsupported {
        what,
        name: name.as_str().map_or_else(|| name.to_string(), str::to_owned),
        supported: supported.to_owned(),
    };
    let model = &document["model"];
    // Old files leave the type out.
    let kind = &model["type"];
    if !(kind == "BPE" || kind.is_null() && model["merges"].is_array()) {
        return Err(unsupported("the tokenizer model", kind, "BPE"));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|text| !text.is_empty()) {
            return Err(unsupported(key, &model[key], "none"));
        }
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
        return Err(unsupported("a dropout of", &model["dropout"], "none"));
    }
    let decoder = &document["decoder"];
    let single = std::slice::from_ref(decoder);
    let decoders = decoder["decoders"].as_array().map_or(single, Vec::as_slice);
    if decoders.iter().any(|decoder| decoder["type"] == "ByteLevel") {
        return Ok(Spelling::ByteLevel);
    }
    let sentence_piece =
        |decoder: &Value| decoder["type"] == "ByteFallback" || decoder["type"] == "Metaspace";
    if model["byte_fallback"] == true && decoders.iter().any(sentence_piece) {
        return Ok(Spelling::SentencePiece);
    }
    Err(unsupported(
        "the decoder",
        &decoder["type"],
        "ByteLevel, or ByteFallback with a model that uses it",
    ))
}

/// The library trusts its merges and would panic on one whose union is longer than every piece.
fn check_merges(model: &Value, spelling: Spelling) -> Result<(), TokenizerError> {
    let invalid = |message: String| Err(TokenizerError::Invalid(message));
    let Some(vocabulary) = model["vocab"].as_object() else {
        return invalid("tokenizer.json has no model.vocab".into());
    };
    if let Some(piece) = vocabulary.keys().find(|piece| piece.len() > PIECE_BYTES_MAX) {
        return invalid(format!(
            "a piece has {} bytes, more than {PIECE_BYTES_MAX}",
            piece.len()
        ));
    }
    // A map of its own, because the object of the document is ordered and slower.
    let known: HashMap<&str, ()> = vocabulary.keys().map(|piece| (piece.as_str(), ())).collect();
    spelling.check_coverage(|piece| known.contains_key(piece))?;
    if let Some(unknown) = model["unk_token"]
        .as_str()
        .filter(|unknown| !known.contains_key(unknown))
    {
        return invalid(format!("the unk_token {unknown:?} is not in the vocabulary"));
    }
    let Some(merges) = model["merges"].as_array() else {
        return invalid("tokenizer.json has no model.merges".into());
    };
    for (rank, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => None,
        };
        let Some((left, right)) = pair else {
            return invalid(format!("merge {rank} is {merge} instead of two pieces"));
        };
        let union = [left, right].concat();
        if let Some(unknown) = [left, right, &union]
            .into_iter()
            .find(|piece| !known.contains_key(piece))
        {
            return invalid(format!(
                "merge {rank} needs {unknown:?}, which is not in the vocabulary"
            ));
        }
    }
    Ok(())
}
