//! The engine against the reference: `exact` gives its logits and tokens, `fast` stays close.

mod support;

use std::num::NonZeroUsize;

use engine::monolith::Monolith;
use engine::{LogitsWanted, Precision};
use support::{Golden, goldens, real_model, workspace};
use types::Token;

const BLOCK_TOKENS: usize = 32;
const CONTEXT: usize = 1100;
const THREADS: NonZeroUsize = NonZeroUsize::new(2).expect("not zero");

fn monolith(precision: Precision) -> Monolith {
    Monolith::new(real_model(precision), BLOCK_TOKENS, CONTEXT, THREADS).expect("a monolith")
}

/// The first of the greatest.
fn argmax(logits: &[f32]) -> Token {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as Token
}

#[test]
fn exact_gives_the_reference_logits_and_every_greedy_token() {
    let mut monolith = monolith(Precision::Exact);
    for golden in goldens() {
        let logits = monolith
            .logits(&golden.ids, 0, LogitsWanted::Last)
            .expect("logits");
        for (token, expected) in &golden.top5 {
            let found = logits[*token];
            let name = &golden.name;
            assert!(
                (found - expected).abs() <= 1e-2,
                "{name}: token {token} is {found}, not {expected}"
            );
        }
        let params = types::SamplingParams {
            temperature: 0.0,
            max_tokens: golden.greedy.len() as u32,
            ignore_eos: true,
            ..Default::default()
        };
        let generated = monolith.generate(&golden.ids, &params).expect("tokens");
        assert_eq!(generated, golden.greedy, "{}", golden.name);
    }
}

/// Logits after the prompt and after each greedy token but the last, `[step][vocabulary]`.
fn teacher_forced(monolith: &mut Monolith, golden: &Golden) -> Vec<Vec<f32>> {
    let (last, prompt) = golden.ids.split_last().expect("a prompt");
    monolith.logits(prompt, 0, LogitsWanted::None).expect("prefill");
    let forced: Vec<Token> = [last]
        .into_iter()
        .chain(&golden.greedy[..golden.greedy.len() - 1])
        .copied()
        .collect();
    let logits = monolith
        .logits(&forced, prompt.len(), LogitsWanted::All)
        .expect("logits");
    logits
        .chunks_exact(logits.len() / forced.len())
        .map(<[f32]>::to_vec)
        .collect()
}

#[test]
fn fast_stays_within_half_a_logit_and_agrees_where_the_reference_is_sure() {
    let (mut exact, mut fast) = (monolith(Precision::Exact), monolith(Precision::Fast));
    for golden in goldens() {
        let (exact, fast) = (
            teacher_forced(&mut exact, &golden),
            teacher_forced(&mut fast, &golden),
        );
        let name = &golden.name;
        for (token, expected) in &golden.top5 {
            let found = fast[0][*token];
            assert!(
                (found - expected).abs() <= 0.5,
                "{name}: token {token} is {found}, not {expected}"
            );
        }
        for (step, (exact, fast)) in exact.iter().zip(&fast).enumerate() {
            if golden.margins[step] > 0.3 {
                assert_eq!(argmax(fast), golden.greedy[step], "{name}, step {step}");
            }
            let mut order: Vec<usize> = (0..exact.len()).collect();
            order.select_nth_unstable_by(5, |a, b| exact[*b].total_cmp(&exact[*a]));
            for token in &order[..5] {
                let difference = (exact[*token] - fast[*token]).abs();
                assert!(
                    difference <= 0.5,
                    "{name}, step {step}: token {token} is off by {difference}"
                );
            }
            let squares: f64 = exact
                .iter()
                .zip(fast)
                .map(|(a, b)| f64::from(a - b).powi(2))
                .sum();
            // Over all tokens, the unlikely ones included, whose logits are the least certain.
            let deviation = (squares / exact.len() as f64).sqrt();
            assert!(
                deviation <= 0.5,
                "{name}, step {step}: logits deviate by {deviation}"
            );
        }
    }
}

/// Mean of `-ln p(next token)` over windows of the text.
fn mean_surprise(precision: Precision) -> f64 {
    const WINDOW: usize = 1024;
    const WINDOWS: usize = 4;
    let text = std::fs::read_to_string(workspace("tests/golden/eighty_days.txt")).expect("text");
    let tokens = real_model(precision).tokenizer().encode(&text, false);
    let mut monolith = monolith(precision);
    let (mut surprise, mut count) = (0.0, 0);
    for window in tokens.chunks_exact(WINDOW).take(WINDOWS) {
        for start in (0..WINDOW - 1).step_by(128) {
            let rows = &window[start..(start + 128).min(WINDOW - 1)];
            let logits = monolith.logits(rows, start, LogitsWanted::All).expect("logits");
            for (row, logits) in logits.chunks_exact(logits.len() / rows.len()).enumerate() {
                let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = logits.iter().map(|logit| f64::from(logit - greatest).exp()).sum();
                let target = logits[window[start + row + 1] as usize];
                surprise += total.ln() - f64::from(target - greatest);
                count += 1;
            }
        }
    }
    assert_eq!(count, WINDOWS * (WINDOW - 1), "the text is long enough");
    surprise / f64::from(count as u32)
}

#[test]
fn fast_has_the_perplexity_of_exact_within_one_percent() {
    let (exact, fast) = (
        mean_surprise(Precision::Exact).exp(),
        mean_surprise(Precision::Fast).exp(),
    );
    println!("perplexity {exact:.4} exact, {fast:.4} fast");
    assert!(
        (fast / exact - 1.0).abs() < 0.01,
        "perplexity {fast} instead of {exact}"
    );
}
