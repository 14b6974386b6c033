use super::*;

fn answer(ttft_ms: f64, gaps_ms: &[f32]) -> Answer {
    Answer {
        ttft_ms,
        latency_ms: ttft_ms + f64::from(gaps_ms.iter().sum::<f32>()),
        gaps_ms: gaps_ms.to_vec(),
        prompt_tokens: 10,
        cached_tokens: 5,
        output_tokens: gaps_ms.len() as u64 + 1,
    }
}

fn sample(number: u64, outcome: Result<Answer, Error>) -> Sample {
    Sample {
        number,
        sent: Duration::from_millis(1000 + 100 * number),
        ended: Duration::from_millis(2000 + 500 * number),
        lag: Duration::from_millis(number),
        outcome,
    }
}

fn samples() -> Vec<Sample> {
    vec![
        sample(0, Ok(answer(100.0, &[10.0, 10.0, 40.0]))),
        sample(1, Ok(answer(300.0, &[10.0]))),
        sample(2, Err(Error::overloaded("busy", 5))),
        sample(3, Err(Error::unavailable("gone"))),
        sample(4, Ok(answer(50.0, &[]))),
    ]
}

#[test]
fn figures_are_those_of_the_samples() {
    let report = Report::of(&samples(), Limits::default());
    assert_eq!(
        report.requests,
        Counts {
            sent: 5,
            ok: 3,
            failed: 1,
            rejected: 1
        }
    );
    // From 1 s, when the first was sent, to 4 s, when the last ended.
    assert_eq!((report.duration_s, report.requests_per_s), (3.0, 1.0));
    assert_eq!(
        (report.output_tokens_per_s, report.total_tokens_per_s),
        (7.0 / 3.0, 37.0 / 3.0)
    );
    assert_eq!((report.input_tokens_mean, report.cached_ratio), (10.0, 0.5));
    assert_eq!(
        (report.ttft_ms.mean, report.ttft_ms.p50, report.ttft_ms.max),
        (150.0, 100.0, 300.0)
    );
    assert_eq!((report.tbt_ms.mean, report.tbt_ms.p50), (17.5, 10.0));
    assert_eq!(
        (report.tpot_ms.mean, report.tpot_ms.max),
        (15.0, 20.0),
        "an answer of one token has none"
    );
    assert_eq!(report.latency_ms.max, 310.0);
    assert_eq!((report.goodput, report.gaps_left_out), (None, 0));
    assert_eq!(report.errors["unavailable"].first, "gone");
    assert_eq!(report.lag_ms.max, 4.0);
}

#[test]
fn goodput_counts_what_met_both_limits() {
    let met = |ttft_ms, tbt_ms| {
        let goodput = Report::of(&samples(), Limits { ttft_ms, tbt_ms })
            .goodput
            .expect("there are limits");
        assert_eq!(goodput.attainment, goodput.met as f64 / 5.0);
        assert_eq!(goodput.requests_per_s, goodput.met as f64 / 3.0);
        goodput.met
    };
    assert_eq!(met(Some(100.0), None), 2);
    assert_eq!(
        met(None, Some(30.0)),
        2,
        "the longest tenth of three gaps is one of 40 ms"
    );
    assert_eq!(met(Some(100.0), Some(30.0)), 1);
    assert_eq!(met(Some(300.0), Some(40.0)), 3);
}

#[test]
fn nothing_has_figures_too() {
    let report = Report::of(
        &[],
        Limits {
            ttft_ms: Some(1.0),
            tbt_ms: None,
        },
    );
    assert_eq!(
        (report.duration_s, report.requests_per_s, report.ttft_ms.max),
        (0.0, 0.0, 0.0)
    );
    assert_eq!(report.goodput.map(|goodput| goodput.attainment), Some(0.0));
}

#[test]
fn a_report_is_told_in_lines_and_a_table() {
    let limits = Limits {
        ttft_ms: Some(100.0),
        tbt_ms: Some(30.0),
    };
    let report = Report::of(&samples(), limits);
    let text = format!("\n{}\n{}", report.lines(), output::table_text(&report.times()));
    let expected = "
5 requests in 3.0 s: 3 ok, 1 failed, 1 rejected
1.00 requests/s, 2.3 output tokens/s, 12.3 tokens/s in all
10.0 + 2.3 tokens per request, 50.0 % of the prompts from a cache
0.33 requests/s within limits: 1 of 5 (20.0 %)
1 overloaded: busy
1 unavailable: gone

 MILLISECONDS             MEAN   P50    P90    P95    P99    MAX
 time to first token      150.0  100.0  300.0  300.0  300.0  300.0
 between tokens (TBT)     17.5   10.0   40.0   40.0   40.0   40.0
 per output token (TPOT)  15.0   10.0   20.0   20.0   20.0   20.0
 whole answer             173.3  160.0  310.0  310.0  310.0  310.0
";
    assert_eq!(text, expected);
}

#[test]
fn a_plot_shows_times_and_distributions() {
    let svg = svg("bench", &samples());
    assert_eq!(svg.matches("<polyline").count(), 5);
    assert!(
        svg.contains("TTFT") && svg.contains("TPOT") && !svg.contains("NaN"),
        "{svg}"
    );
}

#[test]
fn samples_are_told_with_their_end() {
    let told: Vec<Value> = samples().iter().map(sample_json).collect();
    assert_eq!(
        (&told[0]["ttft_ms"], &told[0]["tpot_ms"]),
        (&json!(100.0), &json!(20.0))
    );
    assert_eq!(
        (&told[4]["tpot_ms"], &told[3]["error"]["code"]),
        (&Value::Null, &json!("unavailable"))
    );
}
