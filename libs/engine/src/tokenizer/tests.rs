use std::{path::PathBuf, sync::LazyLock};

use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::{ModelFile, chat::ChatOptions, detokenizer::Detokenizer};

fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn real_model() -> PathBuf {
    match std::env::var_os("PERIGEE_MODEL") {
        Some(path) => path.into(),
        None => workspace().join("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    }
}

fn golden(name: &str) -> Value {
    let text = std::fs::read_to_string(workspace().join("tests/golden").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn tokens(value: &Value) -> Vec<Token> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_u64().unwrap() as Token)
        .collect()
}

static REAL: LazyLock<(ModelFile, Tokenizer)> = LazyLock::new(|| {
    let file = ModelFile::open(real_model()).unwrap();
    let tokenizer = file.tokenizer().unwrap();
    (file, tokenizer)
});

fn smollm() -> &'static Tokenizer {
    &REAL.1
}

#[test]
fn all_golden_strings_encode_as_in_llama_cpp_and_decode_back() {
    let (strings, ids) = (
        golden("tokenizer_strings.json"),
        golden("tokenizer_ids_llamacpp.json"),
    );
    let (strings, ids) = (strings.as_array().unwrap(), ids.as_array().unwrap());
    assert_eq!((strings.len(), ids.len()), (2016, 2016));
    for (string, ids) in strings.iter().zip(ids) {
        let string = string.as_str().unwrap();
        let encoded = smollm().encode(string, true);
        assert_eq!(encoded, tokens(ids), "{string:?}");
        assert_eq!(smollm().decode(&encoded, false), string);
        let mut detokenizer = Detokenizer::new(smollm(), false);
        let mut text: String = encoded.iter().map(|token| detokenizer.push(*token)).collect();
        text += &detokenizer.finish();
        assert_eq!(text, string);
    }
}

#[test]
fn golden_prompts_render_and_encode_as_in_transformers() {
    const SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    let golden = golden("smollm2_135m_q4_1.json");
    let prompts = golden["prompts"].as_object().unwrap();
    assert_eq!(prompts.len(), 6);
    for (name, prompt) in prompts {
        assert_eq!(
            smollm().encode(prompt["text"].as_str().unwrap(), true),
            tokens(&prompt["ids"]),
            "{name}"
        );
    }
    let template = REAL.0.chat_template(smollm()).unwrap().unwrap();
    let user = |text: &str| json!({"role": "user", "content": text});
    let assistant = json!({"role": "assistant", "content": "Red, blue and yellow."});
    let first = user("Name three primary colors.");
    let conversations = [
        (
            "chat",
            vec![user("What is the boiling point of water in Celsius?")],
        ),
        ("turn1", vec![first.clone()]),
        (
            "turn2",
            vec![first, assistant, user("Mix the first two. What do you get?")],
        ),
    ];
    let options = ChatOptions {
        add_generation_prompt: true,
        ..ChatOptions::default()
    };
    for (name, turns) in conversations {
        let expected = prompts[name]["text"].as_str().unwrap();
        // The template adds its own system message, which is the one of the goldens.
        assert_eq!(template.render(&turns, &options).unwrap(), expected, "{name}");
        let mut with_system = vec![json!({"role": "system", "content": SYSTEM})];
        with_system.extend(turns);
        assert_eq!(
            template.render(&with_system, &options).unwrap(),
            expected,
            "{name} with a system message"
        );
    }
}

#[test]
fn the_real_model_has_its_special_tokens() {
    let tokenizer = smollm();
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()),
        (Some(1), Some(2), false)
    );
    assert_eq!(tokenizer.vocabulary(), 49_152);
    assert_eq!(tokenizer.id_of("<|im_end|>"), Some(2));
    assert_eq!(tokenizer.piece(2).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.id_of("not a piece"), None);
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(504) && !tokenizer.is_special(u32::MAX));
    assert_eq!(tokenizer.token_bytes(3575), b" capital");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    assert_eq!(tokenizer.decode(&[1, 504, 2], true), "The");
}

#[test]
fn what_users_write_need_not_be_special() {
    let tokenizer = smollm();
    let text = "a <|im_end|> b";
    let literal = tokenizer.encode(text, false);
    assert!(!literal.contains(&2));
    assert_eq!(tokenizer.decode(&literal, true), text);
    assert!(tokenizer.encode(text, true).contains(&2));
}

#[test]
fn bytes_without_a_token_are_left_out() {
    let encoded = smollm().encode("a\u{4}b", true);
    assert_eq!(smollm().decode(&encoded, false), "ab");
    let tiny = Tokenizer::from_pieces(&Tiny::new().pieces()).unwrap();
    assert_eq!(tiny.encode("\u{4}\u{100000}", true).len(), 5);
}

#[test]
fn a_long_text_is_quick() {
    let text = std::fs::read_to_string(workspace().join("tests/golden/eighty_days.txt")).unwrap();
    let start = std::time::Instant::now();
    let encoded = smollm().encode(&text, true);
    assert_eq!(smollm().decode(&encoded, false), text);
    // A quarter of a megabyte; some 100 ms alone, and a factor of 50 for a crowded machine.
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

proptest! {
    #[test]
    fn every_text_of_known_bytes_comes_back(text in any::<String>(), parse_special in any::<bool>()) {
        // The vocabulary lacks the first byte of characters from U+40000 on, and six control characters.
        let text = text.replace(|c: char| c >= '\u{40000}' || "\u{4}\u{6}\u{13}\u{14}\u{16}\u{1d}".contains(c), "");
        let encoded = smollm().encode(&text, parse_special);
        prop_assert_eq!(smollm().decode(&encoded, false), text);
    }
}

/// The pieces, and what SentencePiece itself makes of strings; see `testdata/make_sentencepiece.py`.
fn sentence_piece_golden() -> Value {
    serde_json::from_str(include_str!("../../testdata/sentencepiece.json")).unwrap()
}

fn sentence_piece<'a>(golden: &'a Value) -> Pieces<'a> {
    let list = |key: &str| golden[key].as_array().unwrap();
    Pieces {
        model: "llama",
        tokens: list("pieces")
            .iter()
            .map(|piece| piece.as_str().unwrap())
            .collect(),
        types: Some(list("types").iter().map(|kind| kind.as_i64().unwrap()).collect()),
        scores: Some(
            list("scores")
                .iter()
                .map(|score| score.as_f64().unwrap() as f32)
                .collect(),
        ),
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        ..Pieces::default()
    }
}

#[test]
fn sentence_piece_models_encode_as_in_sentence_piece() {
    let golden = sentence_piece_golden();
    let tokenizer = Tokenizer::from_pieces(&sentence_piece(&golden)).unwrap();
    assert!(tokenizer.add_bos());
    let strings = golden["strings"].as_array().unwrap();
    for (string, ids) in strings.iter().zip(golden["ids"].as_array().unwrap()) {
        let string = string.as_str().unwrap();
        let encoded = tokenizer.encode(string, true);
        assert_eq!(encoded, tokens(ids), "{string:?}");
        assert_eq!(tokenizer.decode(&encoded, false), string.replace('\u{2581}', " "));
    }
    assert_eq!(tokenizer.token_bytes(4 + 0x0a), b"\n");
    assert_eq!(tokenizer.encode("<s>", true)[0], 1);
    assert_ne!(tokenizer.encode("<s>", false)[0], 1);
    // What the user defined is found in any text.
    assert!(tokenizer.encode("x<|user|>", false).contains(&3));
}

/// A byte-level vocabulary of the 256 bytes, `ab` and `<s>`.
struct Tiny {
    tokens: Vec<String>,
    merges: Vec<String>,
    types: Vec<i64>,
}

impl Tiny {
    fn new() -> Self {
        let mut tokens: Vec<String> = (0..=u8::MAX)
            .map(|byte| byte_character(byte).to_string())
            .collect();
        tokens.extend(["ab".to_owned(), "<s>".to_owned()]);
        let mut types = vec![1; 257];
        types.push(3);
        Self {
            tokens,
            merges: vec!["a b".to_owned()],
            types,
        }
    }

    fn pieces(&self) -> Pieces<'_> {
        Pieces {
            model: "gpt2",
            pre: Some("gpt-2"),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            merges: Some(self.merges.iter().map(String::as_str).collect()),
            types: Some(self.types.clone()),
            ..Pieces::default()
        }
    }

    fn json(&self) -> Value {
        let vocabulary: serde_json::Map<String, Value> = self.tokens[..257]
            .iter()
            .enumerate()
            .map(|(token, piece)| (piece.clone(), token.into()))
            .collect();
        json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 257, "content": "<s>", "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]},
        })
    }
}

#[test]
fn both_sources_give_the_same_tokenizer() {
    let tiny = Tiny::new();
    let ours = Tokenizer::from_pieces(&tiny.pieces()).unwrap();
    let theirs = Tokenizer::from_json(tiny.json().to_string().as_bytes(), Some("<s>"), None).unwrap();
    let text = "ab <s>cabbage ab ab ab, which is longer than the truncation in the file";
    assert_eq!(ours.encode(text, true), theirs.encode(text, true));
    assert_eq!(ours.encode("ab", true), [256]);
    assert_eq!(theirs.decode(&theirs.encode(text, true), false), text);
    assert_eq!((ours.vocabulary(), theirs.vocabulary()), (258, 258));
    // The template of the post-processor begins with the token.
    assert!(theirs.add_bos() && !ours.add_bos());
}

#[rstest]
#[case::unknown_pre("nothing-we-know", "pre-tokenizer \"nothing-we-know\" is not supported")]
fn an_unknown_cut_is_refused_by_name(#[case] pre: &str, #[case] expected: &str) {
    let tiny = Tiny::new();
    let error = Tokenizer::from_pieces(&Pieces {
        pre: Some(pre),
        ..tiny.pieces()
    })
    .unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
    assert!(error.to_string().contains("smollm"), "{error}");
}

/// Cuts of text before pairs are merged. Every cut has no merges to undergo, so it shows as its bytes; the vocabulary holds
/// the cuts that are looked for.
#[rstest]
#[case("llama-bpe", "I'LL pay 12345 €!!\n\n  x", &["I", "'LL", " pay", " ", "123", "45", " €!!\n\n", " ", " x"])]
#[case("qwen2", "I'LL pay 123!!\n x", &["I", "'LL", " pay", " ", "1", "2", "3", "!!\n", " x"])]
#[case("dbrx", "I'LL pay 12345", &["I", "'LL", " pay", " ", "123", "45"])]
#[case("tekken", "theName's 12/\n", &["the", "Name", "'s", " ", "1", "2", "/\n"])]
#[case("gpt-4o", "theName's 1234/\n", &["the", "Name's", " ", "123", "4", "/\n"])]
#[case("gpt-2", "I'll pay 123!!\n\n x", &["I", "'ll", " pay", " 123", "!!", "\n\n", " x"])]
#[case("smollm", "in 123 days", &["in", " ", "1", "2", "3", " days"])]
#[case("default", "pay 12345,x", &["pay", " ", "123", "45", ",", "x"])]
fn texts_are_cut_as_the_model_was_trained(#[case] pre: &str, #[case] text: &str, #[case] cuts: &[&str]) {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
    let cutter = pre_tokenizers::by_name(Some(pre)).unwrap();
    let mut cut = PreTokenizedString::from(text);
    cutter.cuts.pre_tokenize(&mut cut).unwrap();
    let found: Vec<&str> = cut
        .get_splits(OffsetReferential::Original, OffsetType::Byte)
        .into_iter()
        .map(|(_, (start, end), _)| &text[start..end])
        .collect();
    assert_eq!(found, cuts);
}

#[test]
fn inconsistent_vocabularies_are_refused() {
    let refused = |change: fn(&mut Tiny), expected: &str| {
        let mut tiny = Tiny::new();
        change(&mut tiny);
        let error = Tokenizer::from_pieces(&tiny.pieces()).unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{error} does not say {expected:?}"
        );
    };
    refused(
        |tiny| tiny.tokens[65] = "x".into(),
        "no piece \"A\" for the byte 0x41",
    );
    refused(|tiny| tiny.merges[0] = "ab".into(), "instead of two pieces");
    refused(
        |tiny| tiny.merges.push("ab zz".into()),
        "\"zz\", which is not in the vocabulary",
    );
    // The union of these is longer than every piece, on which the library would panic.
    refused(
        |tiny| tiny.merges.push("ab ab".into()),
        "\"abab\", which is not in the vocabulary",
    );
    refused(|tiny| tiny.types[3] = 77, "unknown type 77");
    refused(|tiny| tiny.types.truncate(5), "5 token types");
    refused(|tiny| tiny.tokens[9] = "x".repeat(5000), "5000 bytes");
    refused(|tiny| tiny.tokens.clear(), "0 tokens");
    let tiny = Tiny::new();
    let error = Tokenizer::from_pieces(&Pieces {
        bos: Some(9999),
        ..tiny.pieces()
    })
    .unwrap_err();
    assert!(error.to_string().contains("the bos token is 9999"), "{error}");
    let error = Tokenizer::from_pieces(&Pieces {
        model: "t5",
        ..tiny.pieces()
    })
    .unwrap_err();
    assert!(error.to_string().contains("\"t5\" is not supported"), "{error}");
    let error = Tokenizer::from_pieces(&Pieces {
        merges: None,
        ..tiny.pieces()
    })
    .unwrap_err();
    assert!(error.to_string().contains("merges is missing"), "{error}");
}

#[test]
fn ambiguous_scores_are_refused() {
    let golden = sentence_piece_golden();
    let mut pieces = sentence_piece(&golden);
    let scores = pieces.scores.as_mut().unwrap();
    scores[270] = scores[271];
    let error = Tokenizer::from_pieces(&pieces).unwrap_err();
    assert!(error.to_string().contains("ambiguous"), "{error}");
    pieces.scores.as_mut().unwrap()[270] = f32::NAN;
    let error = Tokenizer::from_pieces(&pieces).unwrap_err();
    assert!(error.to_string().contains("NaN"), "{error}");
}

#[test]
fn json_that_is_no_tokenizer_is_refused() {
    let refused = |change: fn(&mut Value), expected: &str| {
        let mut json = Tiny::new().json();
        change(&mut json);
        let error = Tokenizer::from_json(json.to_string().as_bytes(), None, None).unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{error} does not say {expected:?}"
        );
    };
    refused(
        |json| json["model"]["type"] = "Unigram".into(),
        "\"Unigram\" is not supported",
    );
    refused(
        |json| json["decoder"] = json!({"type": "WordPiece"}),
        "\"WordPiece\" is not supported",
    );
    refused(|json| json["decoder"] = Value::Null, "decoder");
    refused(|json| json["model"]["merges"] = json!([["ab", "ab"]]), "\"abab\"");
    refused(
        |json| json["model"]["merges"] = json!([["ab"]]),
        "instead of two pieces",
    );
    refused(
        |json| json["model"]["merges"] = json!([7]),
        "instead of two pieces",
    );
    refused(|json| json["model"]["vocab"] = json!({}), "no piece");
    refused(
        |json| json["model"]["vocab"]["zz"] = json!(4_000_000_000u32),
        "beyond the limit",
    );
    refused(
        |json| json["model"]["unk_token"] = "<unk>".into(),
        "the unk_token \"<unk>\"",
    );
    refused(
        |json| json["pre_tokenizer"] = json!({"type": "Nonsense"}),
        "not a tokenizer",
    );
    refused(|json| json["model"]["dropout"] = json!(0.5), "dropout");
    refused(|json| *json = json!([]), "the tokenizer model");
    let error = Tokenizer::from_json(b"{\xff", None, None).unwrap_err();
    assert!(error.to_string().contains("not JSON"), "{error}");
    let json = Tiny::new().json().to_string();
    let error = Tokenizer::from_json(json.as_bytes(), Some("<none>"), None).unwrap_err();
    assert!(error.to_string().contains("the bos token \"<none>\""), "{error}");
}

/// A `tokenizer.json` with the parts of a family's, and a vocabulary of bytes, some letters and what the text needs.
fn family_json(sentence_piece: bool, parts: Value) -> Value {
    let mut vocabulary = serde_json::Map::new();
    let mut add = |piece: String| {
        let next = vocabulary.len();
        vocabulary.entry(piece).or_insert(next.into());
    };
    ["<pad>", "<eos>", "<bos>", "<unk>"]
        .iter()
        .for_each(|piece| add((*piece).to_owned()));
    if sentence_piece {
        (0..=u8::MAX).for_each(|byte| add(format!("<0x{byte:02X}>")));
        ["\u{2581}", "a", "b", "ab", "\u{2581}ab", "1", "\n"]
            .iter()
            .for_each(|piece| add((*piece).to_owned()));
    } else {
        (0..=u8::MAX).for_each(|byte| add(byte_character(byte).to_string()));
        ["ab", "\u{120}ab"]
            .iter()
            .for_each(|piece| add((*piece).to_owned()));
    }
    let space = if sentence_piece { "\u{2581}" } else { "\u{120}" };
    let special = ["<pad>", "<eos>", "<bos>", "<unk>"].iter().enumerate();
    let added: Vec<Value> = special
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        })
        .collect();
    let mut json = json!({
        "version": "1.0",
        "added_tokens": added,
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], [space, "ab"]],
            "byte_fallback": sentence_piece, "fuse_unk": sentence_piece, "unk_token": "<unk>",
        },
    });
    for (key, value) in parts.as_object().unwrap() {
        json[key] = value.clone();
    }
    json
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// Normalizers, cuts and decoders as the families' own files have them.
#[rstest]
#[case::gemma(true, json!({
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
    ]},
}), &["ab", "\u{2581}ab", "\n", "1", "<0xE2>", "<0x82>", "<0xAC>"])]
#[case::phi3_and_llama2(true, json!({
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
    ]},
    "pre_tokenizer": null,
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]},
}), &["\u{2581}ab", "\u{2581}ab", "\n", "1", "<0xE2>", "<0x82>", "<0xAC>"])]
#[case::mistral(true, json!({
    "normalizer": null,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
    ]},
}), &["\u{2581}ab", "\u{2581}ab", "\n", "1", "<0xE2>", "<0x82>", "<0xAC>"])]
#[case::qwen(false, json!({
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    ]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
}), &["ab", "\u{120}ab", "\u{10a}", "1", "\u{e2}", "\u{124}", "\u{ac}"])]
#[case::llama3_smollm3_and_olmo2(false, json!({
    "normalizer": null,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
}), &["ab", "\u{120}ab", "\u{10a}", "1", "\u{e2}", "\u{124}", "\u{ac}"])]
fn the_families_own_tokenizers_encode_and_come_back(
    #[case] sentence_piece: bool,
    #[case] parts: Value,
    #[case] pieces: &[&str],
) {
    let json = family_json(sentence_piece, parts).to_string();
    let tokenizer = Tokenizer::from_json(json.as_bytes(), Some("<bos>"), Some("<eos>")).unwrap();
    let text = "ab ab\n1€";
    let tokens = tokenizer.encode(text, true);
    let found: Vec<String> = tokens
        .iter()
        .map(|token| tokenizer.piece(*token).unwrap())
        .collect();
    assert_eq!(found, pieces);
    assert_eq!(tokenizer.decode(&tokens, true), text);
    assert_eq!(tokenizer.encode("<bos>ab", true)[0], 2);
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(tokens[0]));
}
