//! Tokenizers out of GGUF metadata (`tokenizer.ggml.*`).
//!
//! Two kinds: `gpt2`, byte-level pairs with merges, and `llama`, SentencePiece's pairs with scores. The latter has no
//! merges: it joins the neighbours whose union has the highest score. Every way to put a piece together from two pieces
//! becomes a merge here, ranked by the piece's score, which is how `transformers` converts these models.

use std::collections::HashMap;

use tokenizers::{
    AddedToken, NormalizerWrapper,
    models::bpe::{BPE, Vocab},
    normalizers::{Prepend, Replace, Sequence},
};
use types::Token;

use super::{
    PIECE_BYTES_MAX, Tokenizer, TokenizerError, VOCABULARY_MAX,
    bytes::{Spelling, TokenBytes},
    pre_tokenizers,
};

/// What the file says.
#[derive(Debug, Default)]
pub(crate) struct Pieces<'a> {
    /// `tokenizer.ggml.model`.
    pub(crate) model: &'a str,
    /// `tokenizer.ggml.pre`.
    pub(crate) pre: Option<&'a str>,
    /// The pieces; a token is an index.
    pub(crate) tokens: Vec<&'a str>,
    /// One of [`Kind`] for each.
    pub(crate) types: Option<Vec<i64>>,
    /// Pairs with a space between them, first to be merged first.
    pub(crate) merges: Option<Vec<&'a str>>,
    /// One for each piece.
    pub(crate) scores: Option<Vec<f32>>,
    pub(crate) bos: Option<Token>,
    pub(crate) eos: Option<Token>,
    pub(crate) unknown: Option<Token>,
    pub(crate) add_bos: Option<bool>,
    pub(crate) add_space_prefix: Option<bool>,
}

/// `llama_token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Builds the tokenizer.
pub(super) fn build(pieces: &Pieces<'_>) -> Result<Tokenizer, TokenizerError> {
    let kinds = kinds(pieces)?;
    let spelling = match pieces.model {
        "gpt2" => Spelling::ByteLevel,
        "llama" => Spelling::SentencePiece,
        other => {
            return Err(TokenizerError::Unsupported {
                what: "the tokenizer model",
                name: other.to_owned(),
                supported: "gpt2, llama".into(),
            });
        }
    };
    let mut vocabulary: HashMap<&str, Token> = HashMap::with_capacity(pieces.tokens.len());
    for (token, piece) in pieces.tokens.iter().enumerate() {
        // Of equal pieces the first is the one that text becomes.
        vocabulary.entry(piece).or_insert(token as Token);
    }
    spelling.check_coverage(|piece| vocabulary.contains_key(piece))?;
    let (mut tokenizer, add_bos_default) = match spelling {
        Spelling::ByteLevel => byte_level(pieces, &vocabulary)?,
        Spelling::SentencePiece => (sentence_piece(pieces, &vocabulary, &kinds)?, true),
    };
    add_tokens(&mut tokenizer, pieces, &kinds)?;
    let mut bytes = TokenBytes::default();
    for (piece, kind) in pieces.tokens.iter().zip(&kinds) {
        match kind {
            Kind::Control | Kind::Unknown => bytes.push(piece.as_bytes(), true),
            Kind::UserDefined if spelling == Spelling::ByteLevel => bytes.push(piece.as_bytes(), false),
            Kind::UserDefined | Kind::Normal | Kind::Unused | Kind::Byte => {
                bytes.push(&spelling.bytes(piece), false);
            }
        }
    }
    let add_bos = pieces.add_bos.unwrap_or(add_bos_default);
    Tokenizer::new(tokenizer, bytes, pieces.bos, pieces.eos, add_bos)
}

fn kinds(pieces: &Pieces<'_>) -> Result<Vec<Kind>, TokenizerError> {
    let count = pieces.tokens.len();
    if !(1..=VOCABULARY_MAX).contains(&count) {
        let message = format!("there are {count} tokens, but must be 1 to {VOCABULARY_MAX}");
        return Err(TokenizerError::Invalid(message));
    }
    if let Some((token, piece)) = pieces
        .tokens
        .iter()
        .enumerate()
        .find(|(_, piece)| piece.len() > PIECE_BYTES_MAX)
    {
        let message = format!(
            "token {token} has {} bytes, more than {PIECE_BYTES_MAX}",
            piece.len()
        );
        return Err(TokenizerError::Invalid(message));
    }
    let Some(types) = &pieces.types else {
        return Ok(vec![Kind::Normal; count]);
    };
    if types.len() != count {
        let message = format!("there are {count} tokens, but {} token types", types.len());
        return Err(TokenizerError::Invalid(message));
    }
    let kind = |(token, number): (usize, &i64)| match number {
        1 => Ok(Kind::Normal),
        2 => Ok(Kind::Unknown),
        3 => Ok(Kind::Control),
        4 => Ok(Kind::UserDefined),
        5 => Ok(Kind::Unused),
        6 => Ok(Kind::Byte),
        other => Err(TokenizerError::Invalid(format!(
            "token {token} has the unknown type {other}"
        ))),
    };
    types.iter().enumerate().map(kind).collect()
}

fn byte_level(
    pieces: &Pieces<'_>,
    vocabulary: &HashMap<&str, Token>,
) -> Result<(tokenizers::Tokenizer, bool), TokenizerError> {
    let pre = pre_tokenizers::by_name(pieces.pre)?;
    let lines = pieces
        .merges
        .as_ref()
        .ok_or_else(|| TokenizerError::Invalid("tokenizer.ggml.merges is missing".into()))?;
    let mut merges = Vec::with_capacity(lines.len());
    for (rank, line) in lines.iter().enumerate() {
        // A piece never holds a space: the alphabet has another character for it.
        let (left, right) = line.split_once(' ').ok_or_else(|| {
            TokenizerError::Invalid(format!("merge {rank} is {line:?} instead of two pieces"))
        })?;
        // The library trusts its merges and would panic on one whose union is longer than every piece.
        let union = [left, right].concat();
        if let Some(unknown) = [left, right, &union]
            .into_iter()
            .find(|piece| !vocabulary.contains_key(piece))
        {
            let message =
                format!("merge {rank}, {line:?}, needs {unknown:?}, which is not in the vocabulary");
            return Err(TokenizerError::Invalid(message));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BPE::builder()
        .vocab_and_merges(owned(vocabulary), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(library_error)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(pre.cuts));
    Ok((tokenizer, pre.add_bos))
}

fn sentence_piece(
    pieces: &Pieces<'_>,
    vocabulary: &HashMap<&str, Token>,
    kinds: &[Kind],
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let scores = pieces
        .scores
        .as_ref()
        .ok_or_else(|| TokenizerError::Invalid("tokenizer.ggml.scores is missing".into()))?;
    if scores.len() != pieces.tokens.len() {
        let message = format!(
            "there are {} tokens, but {} scores",
            pieces.tokens.len(),
            scores.len()
        );
        return Err(TokenizerError::Invalid(message));
    }
    let mut builder = BPE::builder()
        .vocab_and_merges(
            owned(vocabulary),
            merges_by_score(pieces, vocabulary, kinds, scores)?,
        )
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = pieces.unknown.and_then(|token| pieces.tokens.get(token as usize)) {
        builder = builder.unk_token((*unknown).to_owned());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(builder.build().map_err(library_error)?);
    let space = Replace::new(" ", "\u{2581}").map_err(library_error)?;
    let mut steps = vec![NormalizerWrapper::Replace(space)];
    if pieces.add_space_prefix.unwrap_or(true) {
        steps.insert(0, NormalizerWrapper::Prepend(Prepend::new("\u{2581}".to_owned())));
    }
    let normalizer = NormalizerWrapper::Sequence(Sequence::new(steps));
    tokenizer
        .with_normalizer(Some(normalizer))
        .map_err(library_error)?;
    Ok(tokenizer)
}

/// Every split of every piece into two pieces, best union first.
fn merges_by_score(
    pieces: &Pieces<'_>,
    vocabulary: &HashMap<&str, Token>,
    kinds: &[Kind],
    scores: &[f32],
) -> Result<Vec<(String, String)>, TokenizerError> {
    let part = |piece: &str| -> Option<Token> {
        vocabulary
            .get(piece)
            .copied()
            .filter(|token| kinds[*token as usize] == Kind::Normal)
    };
    let mut unions: Vec<(f32, Vec<(Token, Token)>)> = Vec::new();
    for ((piece, kind), score) in pieces.tokens.iter().zip(kinds).zip(scores) {
        if *kind != Kind::Normal {
            continue;
        }
        let mut splits: Vec<(Token, Token)> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| part(&piece[..at]).zip(part(&piece[at..])))
            .collect();
        if splits.is_empty() {
            continue;
        }
        if !score.is_finite() {
            return Err(TokenizerError::Invalid(format!(
                "the piece {piece:?} has the score {score}"
            )));
        }
        splits.sort_unstable();
        unions.push((*score, splits));
    }
    unions.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    // Between equal scores SentencePiece takes the leftmost pair, which ranks of merges cannot say.
    if let Some(pair) = unions.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let message = format!(
            "several pieces have the score {}, so that merging is ambiguous",
            pair[0].0
        );
        return Err(TokenizerError::Invalid(message));
    }
    let piece = |token: Token| pieces.tokens[token as usize].to_owned();
    let merges = unions.into_iter().flat_map(|(_, splits)| splits);
    Ok(merges.map(|(left, right)| (piece(left), piece(right))).collect())
}

/// Tells the library which tokens are found in a text before it is cut.
fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    pieces: &Pieces<'_>,
    kinds: &[Kind],
) -> Result<(), TokenizerError> {
    let of_kind = |wanted: fn(Kind) -> bool, special: bool| {
        let pieces = pieces
            .tokens
            .iter()
            .zip(kinds)
            .filter(move |(piece, kind)| wanted(**kind) && !piece.is_empty());
        pieces.map(move |(piece, _)| AddedToken::from(*piece, special).normalized(false))
    };
    let special: Vec<AddedToken> =
        of_kind(|kind| matches!(kind, Kind::Control | Kind::Unknown), true).collect();
    let user: Vec<AddedToken> = of_kind(|kind| kind == Kind::UserDefined, false).collect();
    tokenizer.add_special_tokens(special).map_err(library_error)?;
    tokenizer.add_tokens(user).map_err(library_error)?;
    Ok(())
}

fn owned(vocabulary: &HashMap<&str, Token>) -> Vocab {
    vocabulary
        .iter()
        .map(|(piece, token)| ((*piece).to_owned(), *token))
        .collect()
}

fn library_error(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Invalid(error.to_string())
}
