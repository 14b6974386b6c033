use std::sync::OnceLock;

use engine::Precision;
use engine::fixture::{TinyModel, write_tiny_gguf};
use proptest::prelude::*;
use rstest::rstest;

use super::*;

const PROMPT_TOKENS: usize = 10;
const CONTEXT_TOKENS: usize = 200;
/// A token of the fixture that ends the output.
const EOS: Token = 2;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        write_tiny_gguf(&path, &TinyModel::default()).unwrap();
        let model = engine::Model::load(&path, Precision::Exact).unwrap();
        assert!(model.config().eos_tokens.contains(&EOS));
        model.tokenizer().clone()
    })
}

fn output(params: &SamplingParams) -> Output {
    Output::new(tokenizer(), &[EOS], params, PROMPT_TOKENS, CONTEXT_TOKENS)
}

fn stops(stop: &[&str]) -> SamplingParams {
    SamplingParams {
        stop: stop.iter().map(|stop| (*stop).to_owned()).collect(),
        ..Default::default()
    }
}

/// Pushes tokens until the end, and returns the text, how many were taken, and the reason.
fn push_all(output: &mut Output, tokens: &[Token]) -> (String, usize, Option<FinishReason>) {
    let mut text = String::new();
    for (index, token) in tokens.iter().enumerate() {
        let piece = output.push(*token);
        text.push_str(&piece.text);
        if piece.finish.is_some() {
            return (text, index + 1, piece.finish);
        }
    }
    (text, tokens.len(), None)
}

#[rstest]
#[case::end_of_sequence("one two", None, &[EOS], "one two")]
#[case::stop_string("one STOP two", Some("STOP"), &[], "one ")]
#[case::stop_string_beats_what_follows("one STOP", Some("STOP"), &[EOS], "one ")]
#[case::beginning_of_a_stop_string_is_text_after_all("one STO", Some("STOP"), &[EOS], "one STO")]
fn stopping_gives_the_text_before_it(
    #[case] text: &str,
    #[case] stop: Option<&str>,
    #[case] more: &[Token],
    #[case] expected: &str,
) {
    let mut output = output(&stops(stop.as_slice()));
    let mut tokens = tokenizer().encode(text, false);
    tokens.extend(more);
    let (text, taken, finish) = push_all(&mut output, &tokens);
    assert_eq!((text.as_str(), finish), (expected, Some(FinishReason::Stop)));
    assert_eq!(output.generated(), taken);
    assert_eq!((output.finish(), output.remaining()), (finish, 0));
}

#[test]
fn a_stop_token_ends_without_its_text() {
    let tokens = tokenizer().encode("a b!", false);
    let last = *tokens.last().unwrap();
    let mut output = output(&SamplingParams {
        stop_tokens: vec![last],
        ..Default::default()
    });
    assert_eq!(
        push_all(&mut output, &tokens),
        ("a b".to_owned(), tokens.len(), Some(FinishReason::Stop))
    );
}

#[test]
fn an_ignored_end_of_sequence_goes_on_without_text() {
    let mut output = output(&SamplingParams {
        ignore_eos: true,
        ..Default::default()
    });
    let mut tokens = tokenizer().encode("a", false);
    tokens.push(EOS);
    tokens.extend(tokenizer().encode("b", false));
    assert_eq!(push_all(&mut output, &tokens), ("ab".to_owned(), 3, None));
}

#[test]
fn the_last_token_allowed_lets_go_of_what_was_held_back() {
    let tokens = tokenizer().encode("one STO", false);
    let max_tokens = u32::try_from(tokens.len()).unwrap();
    let mut output = output(&SamplingParams {
        max_tokens,
        ..stops(&["STOP"])
    });
    assert_eq!(
        push_all(&mut output, &tokens),
        ("one STO".to_owned(), tokens.len(), Some(FinishReason::Length))
    );
}

#[test]
fn a_character_that_is_never_completed_is_replaced() {
    let bytes = tokenizer().encode("é", false);
    assert_eq!(bytes.len(), 2, "the fixture has a token per byte of it");
    let mut output = output(&SamplingParams {
        max_tokens: 1,
        ..Default::default()
    });
    assert_eq!(
        push_all(&mut output, &bytes[..1]),
        ("\u{fffd}".to_owned(), 1, Some(FinishReason::Length))
    );
}

#[test]
fn the_end_of_the_context_ends_the_output() {
    let mut output = Output::new(
        tokenizer(),
        &[EOS],
        &SamplingParams::default(),
        PROMPT_TOKENS,
        PROMPT_TOKENS + 3,
    );
    let token = tokenizer().encode("a", false)[0];
    assert_eq!(output.remaining(), 3);
    assert_eq!(
        push_all(&mut output, &[token; 5]),
        ("aaa".to_owned(), 3, Some(FinishReason::Length))
    );
}

#[test]
fn tokens_beyond_the_end_cannot_have_been_delivered() {
    let error = output(&SamplingParams::default()).resume(&[EOS, 5]).unwrap_err();
    assert_eq!(error.code, types::ErrorCode::Invalid);
    assert_eq!(error.param.as_deref(), Some("resumed"));
}

proptest! {
    /// The text of the first node for the first tokens, then that of the second node, is the text of one node.
    #[test]
    fn a_resumed_output_continues_the_text_without_loss_or_repetition(
        tokens in prop::collection::vec(3..300_u32, 0..60),
        more in "[aeé日 thn]{0,12}",
        at in any::<prop::sample::Index>(),
        stop in prop::sample::subsequence(vec!["the", "en", "é", "日n", "an a"], 0..4),
        max_tokens in 1..70_u32,
    ) {
        let mut tokens = tokens;
        tokens.extend(tokenizer().encode(&more, false));
        let params = SamplingParams { max_tokens, ..stops(&stop) };
        let mut whole = output(&params);
        let (text, taken, finish) = push_all(&mut whole, &tokens);
        let tokens = &tokens[..taken];
        let (before, after) = tokens.split_at(at.index(taken + 1));
        let (delivered, _, _) = push_all(&mut output(&params), before);
        let mut resumed = output(&params);
        resumed.resume(before).expect("these were delivered");
        prop_assert_eq!(resumed.generated(), before.len());
        let (rest, _, _) = push_all(&mut resumed, after);
        prop_assert_eq!(delivered + &rest, text);
        prop_assert_eq!(resumed.finish(), finish);
        prop_assert_eq!(resumed.remaining(), whole.remaining());
    }
}
