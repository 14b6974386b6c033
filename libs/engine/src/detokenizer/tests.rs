use proptest::prelude::*;

use super::*;
use crate::fixture::{TinyModel, write_tiny_gguf};

fn tokenizer() -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    write_tiny_gguf(
        &path,
        &TinyModel {
            layers: 1,
            ..TinyModel::default()
        },
    )
    .unwrap();
    crate::ModelFile::open(&path).unwrap().tokenizer().unwrap()
}

proptest! {
    /// Tokens of single bytes make every kind of broken UTF-8.
    #[test]
    fn pieces_make_the_text_of_all_tokens(
        tokens in prop::collection::vec(0u32..330, 0..60),
        skip_special in any::<bool>(),
    ) {
        static TOKENIZER: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(tokenizer);
        let mut detokenizer = Detokenizer::new(&TOKENIZER, skip_special);
        let mut text = String::new();
        for token in &tokens {
            text += &detokenizer.push(*token);
            prop_assert!(detokenizer.incomplete.len() < 4);
        }
        text += &detokenizer.finish();
        prop_assert_eq!(text, TOKENIZER.decode(&tokens, skip_special));
        prop_assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn bytes_are_cut_as_lossy_decoding_would(bytes in prop::collection::vec(any::<u8>(), 0..40), cut in 1usize..5) {
        let (mut held, mut text) = (Vec::new(), String::new());
        for part in bytes.chunks(cut) {
            held.extend_from_slice(part);
            text += &take_complete(&mut held);
        }
        text += &String::from_utf8_lossy(&held);
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn stops_are_found_as_in_the_whole_text(
        parts in prop::collection::vec("[abé]{0,4}", 0..12),
        stops in prop::collection::vec("[abé]{1,4}", 0..4),
    ) {
        let mut matcher = StopMatcher::new(&stops);
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let (mut output, mut matched) = (String::new(), false);
        for part in &parts {
            let outcome = matcher.push(part);
            output += &outcome.emit;
            prop_assert!(matcher.held.len() < longest.max(1));
            if outcome.matched {
                matched = true;
                break;
            }
        }
        if !matched {
            output += &matcher.finish();
        }
        let whole = parts.concat();
        // Ends of occurrences, the earliest first; of those, the longest stop string.
        let found = (0..=whole.len())
            .filter(|end| whole.is_char_boundary(*end))
            .find_map(|end| stops.iter().filter(|stop| whole[..end].ends_with(*stop)).map(|stop| end - stop.len()).min());
        prop_assert_eq!(matched, found.is_some());
        prop_assert_eq!(output, &whole[..found.unwrap_or(whole.len())]);
    }
}

#[test]
fn text_that_may_begin_a_stop_is_held_back() {
    let mut matcher = StopMatcher::new(&["\n\nUser:", "END"]);
    let emitted = |text: &str| StopOutcome {
        emit: text.into(),
        matched: false,
    };
    assert_eq!(matcher.push("Hello\n"), emitted("Hello"));
    assert_eq!(matcher.push("\nUs"), emitted(""));
    assert_eq!(matcher.push("ual E"), emitted("\n\nUsual "));
    assert_eq!(matcher.push("N"), emitted(""));
    assert_eq!(
        matcher.push("D and more"),
        StopOutcome {
            emit: String::new(),
            matched: true
        }
    );
    assert_eq!(
        matcher.push("even more"),
        StopOutcome {
            emit: String::new(),
            matched: true
        }
    );
    assert_eq!(matcher.finish(), "");
}

#[test]
fn without_stops_nothing_is_held_back() {
    let mut matcher = StopMatcher::new::<&str>(&[]);
    assert_eq!(
        matcher.push("anything"),
        StopOutcome {
            emit: "anything".into(),
            matched: false
        }
    );
}
