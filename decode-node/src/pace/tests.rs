use proptest::prelude::*;

use super::*;

fn work(prompt_tokens: f64, decodes: bool) -> Work {
    Work {
        prompt_tokens,
        token_kilocontext: 0.0,
        decodes,
    }
}

/// Steps of 10 ms, and 0.5 ms more for each prompt token.
fn measured() -> Pace {
    let mut pace = Pace::default();
    for _ in 0..50 {
        pace.observe(&work(0.0, true), Millis(10.0));
        pace.observe(&work(100.0, false), Millis(50.0));
    }
    pace
}

#[test]
fn a_limit_leaves_prompts_what_decoding_does_not_take() {
    let pace = measured();
    assert_eq!(pace.prompt_tokens(Millis(60.0), 0, 256), 100);
    assert_eq!(pace.prompt_tokens(Millis(1e6), 0, 256), 256);
    for impossible in [0.0, 5.0, 10.0] {
        assert_eq!(pace.prompt_tokens(Millis(impossible), 0, 256), PROMPT_TOKENS_MIN);
    }
    assert_eq!(
        pace.prompt_tokens(Millis(5.0), 0, 3),
        3,
        "no step is larger than it may be"
    );
    assert_eq!(
        Pace::default().prompt_tokens(Millis(5.0), 0, 256),
        256,
        "nothing is known yet"
    );
}

#[test]
fn tokens_far_into_a_prompt_are_fewer_at_a_time() {
    let mut pace = measured();
    for step in 0..200 {
        let kilocontext = f64::from(step % 8);
        let deep = Work {
            prompt_tokens: 100.0,
            token_kilocontext: 100.0 * kilocontext,
            decodes: false,
        };
        pace.observe(&deep, Millis(100.0 * (0.5 + 0.1 * kilocontext)));
    }
    let (near, far) = (
        pace.prompt_tokens(Millis(60.0), 0, 256),
        pace.prompt_tokens(Millis(60.0), 5000, 256),
    );
    assert!((95..=105).contains(&near), "{near}");
    assert!((47..=53).contains(&far), "{far}");
}

proptest! {
    /// Whatever noise there is, one step in a hundred exceeds the limit, give or take what a few thousand steps can tell.
    #[test]
    fn one_step_in_a_hundred_takes_longer_than_its_limit(noise in 0.0..1.0_f64, seed in any::<u64>()) {
        let mut pace = measured();
        let mut state = seed | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        let limit = Millis(60.0);
        let (mut steps, mut missed) = (0, 0);
        for step in 0..6000 {
            let tokens = pace.prompt_tokens(limit, 0, 256);
            let took = (10.0 + 0.5 * tokens as f64) * (1.0 + noise * uniform().powi(4));
            pace.observe(&work(tokens as f64, true), Millis(took));
            pace.observe(&work(0.0, true), Millis(10.0));
            if step >= 1000 && tokens > PROMPT_TOKENS_MIN {
                steps += 1;
                missed += usize::from(took > limit.0);
            }
        }
        prop_assert!(missed as f64 <= 0.03 * f64::from(steps) + 3.0, "{missed} of {steps}");
    }

    #[test]
    fn the_margin_stays_within_bounds_whatever_is_measured(times in prop::collection::vec(any::<f64>(), 0..200)) {
        let mut pace = measured();
        for time in times {
            pace.observe(&work(10.0, true), Millis(time));
            prop_assert!((1.0..=MARGIN_MAX).contains(&pace.margin));
            let tokens = pace.prompt_tokens(Millis(100.0), 0, 256);
            prop_assert!((PROMPT_TOKENS_MIN..=256).contains(&tokens));
        }
    }
}
