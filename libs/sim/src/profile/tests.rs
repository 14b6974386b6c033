use super::*;

fn built_in(name: &str) -> Profile {
    Profile::parse(Profile::built_in(name).expect("it comes with the simulator")).expect("valid")
}

#[test]
fn the_papers_profile_gives_the_papers_prefill_times() {
    let profile = built_in("llama-3-70b-8xa800");
    // Figure 14 of the paper, read off the plot: 0.9, 1.9, 4.4, 10.5 and 27.6 s.
    for (kilotokens, seconds) in [(8, 0.9), (16, 1.9), (32, 4.4), (64, 10.5), (128, 27.6)] {
        let ms = profile.prefill_ms(kilotokens * 1024, 0);
        assert!((ms / 1e3 / seconds - 1.0).abs() < 0.04, "{kilotokens}k: {ms} ms");
    }
    assert_eq!(profile.layout(512).token_bytes(), 327_680);
}

#[test]
fn the_routers_formula_is_the_profiles() {
    for name in Profile::built_in_names() {
        let profile = built_in(name);
        let (linear, context) = profile.prefill_rates();
        for (tokens, cached) in [(1u64, 0u64), (8192, 0), (12_000, 8_704), (100_000, 99_999)] {
            let new = (tokens - cached) as f64;
            let router = linear * new + context * new * (cached as f64 + new / 2.0) / 1e3;
            let ours = profile.prefill_ms(tokens, cached);
            assert!(
                (router - ours).abs() < 1e-6 * ours.max(1.0),
                "{router} and {ours}"
            );
        }
    }
}

#[test]
fn rooflines_are_near_what_was_measured() {
    let measured = built_in("llama-3-70b-8xa800");
    let computed = Profile {
        calibrated: Calibrated::default(),
        ..measured.clone()
    };
    let ratio = computed.prefill_ms(8192, 0) / measured.prefill_ms(8192, 0);
    assert!((0.8..1.25).contains(&ratio), "{ratio}");
}

#[test]
fn nonsense_is_refused_with_its_name() {
    let text = Profile::built_in("llama-3-8b-1xa800").expect("built in");
    let no_flops = text.replace("flops = 312e12", "flops = 0.0");
    let error = Profile::parse(&no_flops).expect_err("no operations");
    assert!(error.to_string().starts_with("hardware.flops is 0"), "{error}");
    let too_large = text.replace("parameters = 8.0e9", "parameters = 8.0e12");
    assert!(matches!(
        Profile::parse(&too_large),
        Err(ProfileError::WeightsDoNotFit { .. })
    ));
    assert!(matches!(
        Profile::parse("name = \"x\""),
        Err(ProfileError::Syntax(_))
    ));
}
