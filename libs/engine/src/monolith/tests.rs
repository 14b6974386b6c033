use super::*;
use crate::Precision;
use crate::fixture::{TinyModel, write_tiny_gguf};

fn monolith(context_tokens: usize) -> Monolith {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tiny.gguf");
    write_tiny_gguf(&path, &TinyModel::default()).expect("a model file");
    let model = Model::load(&path, Precision::Fast).expect("the model loads");
    Monolith::new(model, 16, context_tokens, NonZeroUsize::MIN).expect("a monolith")
}

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        seed: 7,
        max_tokens,
        ignore_eos: true,
        ..Default::default()
    }
}

#[test]
fn generating_is_continuing_what_was_generated() {
    let mut monolith = monolith(200);
    let prompt: Vec<Token> = (0..50).collect();
    let all = monolith.generate(&prompt, &params(30)).expect("tokens");
    assert_eq!(all.len(), 30);
    assert_eq!(monolith.generate(&prompt, &params(30)).expect("tokens"), all);
    // Greedy tokens depend on the tokens before them alone, so a cut prompt continues the same way.
    let greedy = SamplingParams {
        temperature: 0.0,
        ..params(20)
    };
    let whole = monolith.generate(&prompt, &greedy).expect("tokens");
    let longer: Vec<Token> = prompt.iter().chain(&whole[..8]).copied().collect();
    let rest = monolith
        .generate(
            &longer,
            &SamplingParams {
                max_tokens: 12,
                ..greedy
            },
        )
        .expect("tokens");
    assert_eq!(rest, whole[8..]);
}

#[test]
fn generation_stops_at_a_stop_token_and_at_the_end_of_the_memory() {
    let mut monolith = monolith(64);
    let prompt: Vec<Token> = (0..50).collect();
    let free = monolith.generate(&prompt, &params(100)).expect("tokens");
    assert_eq!(free.len(), 14);
    let stop = free[3];
    let first = free.iter().position(|token| *token == stop).expect("it is there");
    let stopped = SamplingParams {
        stop_tokens: vec![stop],
        ..params(100)
    };
    assert_eq!(
        monolith.generate(&prompt, &stopped).expect("tokens"),
        free[..=first]
    );
}

#[test]
fn prompts_that_leave_no_room_are_refused() {
    let mut monolith = monolith(64);
    for prompt in [vec![], vec![1; 64]] {
        let error = monolith
            .generate(&prompt, &params(1))
            .expect_err("must be refused");
        assert_eq!(error.code(), ErrorCode::Invalid);
    }
}
