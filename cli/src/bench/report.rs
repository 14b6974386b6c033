//! The figures of a run. Pure.
//!
//! Percentiles are the simulator's ([`sim::report::Summary`]): nearest rank, so each is a value that occurred.

use std::collections::BTreeMap;
use std::time::Duration;

use comfy_table::Table;
use serde::Serialize;
use serde_json::{Value, json};
use sim::plot::{self, Plot};
use sim::report::{Summary, percentiles, tail_mean};
use types::{Error, ErrorCode};

use super::drive::Sample;
use super::target::Answer;
use crate::output;

/// Gaps that are kept: 32 MiB. Those of later requests are counted only.
const GAPS_MAX: usize = 8 << 20;

/// The figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    pub(super) requests: Counts,
    /// From the first request to the last end.
    pub(super) duration_s: f64,
    pub(super) requests_per_s: f64,
    pub(super) output_tokens_per_s: f64,
    pub(super) total_tokens_per_s: f64,
    /// Of a request, as the server counts.
    pub(super) input_tokens_mean: f64,
    pub(super) output_tokens_mean: f64,
    /// Part of the prompts' tokens that came from a cache.
    pub(super) cached_ratio: f64,
    pub(super) ttft_ms: Summary,
    /// Of all gaps between pieces with content.
    pub(super) tbt_ms: Summary,
    /// Of each request's mean time per token after the first one.
    pub(super) tpot_ms: Summary,
    /// To the last piece with content.
    pub(super) latency_ms: Summary,
    /// How late requests were sent.
    pub(super) lag_ms: Summary,
    /// Gaps beyond those that are kept.
    pub(super) gaps_left_out: u64,
    pub(super) goodput: Option<Goodput>,
    /// Failures and rejections by code.
    pub(super) errors: BTreeMap<&'static str, Failures>,
}

/// How requests ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) sent: u64,
    pub(super) ok: u64,
    pub(super) failed: u64,
    /// Turned away by admission (429).
    pub(super) rejected: u64,
}

/// Failures of one code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Failures {
    pub(super) count: u64,
    /// What the first one said.
    pub(super) first: String,
}

/// Limits on an answer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Limits {
    pub(super) ttft_ms: Option<f64>,
    /// On the mean of a request's longest tenth of gaps.
    pub(super) tbt_ms: Option<f64>,
}

/// What met the limits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Goodput {
    pub(super) limits: Limits,
    pub(super) met: u64,
    /// They as a part of all that were sent.
    pub(super) attainment: f64,
    pub(super) requests_per_s: f64,
}

impl Limits {
    fn met_by(&self, answer: &Answer) -> bool {
        let within = |value: f64, limit: Option<f64>| limit.is_none_or(|limit| value <= limit);
        within(answer.ttft_ms, self.ttft_ms) && within(tail_mean(&mut answer.gaps_ms.clone()), self.tbt_ms)
    }
}

impl Report {
    /// The figures of `samples`.
    pub(super) fn of(samples: &[Sample], limits: Limits) -> Self {
        let answers: Vec<&Answer> = samples
            .iter()
            .filter_map(|sample| sample.outcome.as_ref().ok())
            .collect();
        let (requests, errors) = count(samples);
        let first = samples.iter().map(|sample| sample.sent).min().unwrap_or_default();
        let last = samples
            .iter()
            .map(|sample| sample.ended)
            .max()
            .unwrap_or_default();
        let duration_s = last.saturating_sub(first).as_secs_f64();
        let per_s = |count: u64| count as f64 / duration_s.max(f64::MIN_POSITIVE);
        let sum = |of: fn(&Answer) -> u64| answers.iter().map(|answer| of(answer)).sum::<u64>();
        let (input, output) = (sum(|one| one.prompt_tokens), sum(|one| one.output_tokens));
        let mean = |sum: u64| sum as f64 / answers.len().max(1) as f64;
        let summary =
            |of: fn(&Answer) -> Option<f64>| Summary::of(answers.iter().filter_map(|one| of(one)).collect());
        let gaps = || {
            answers
                .iter()
                .flat_map(|answer| answer.gaps_ms.iter().map(|gap| f64::from(*gap)))
        };
        let gap_count = answers.iter().map(|answer| answer.gaps_ms.len()).sum::<usize>();
        let goodput = (limits != Limits::default()).then(|| {
            let met = answers.iter().filter(|answer| limits.met_by(answer)).count() as u64;
            Goodput {
                limits,
                met,
                attainment: met as f64 / samples.len().max(1) as f64,
                requests_per_s: per_s(met),
            }
        });
        Self {
            requests,
            duration_s,
            requests_per_s: per_s(requests.ok),
            output_tokens_per_s: per_s(output),
            total_tokens_per_s: per_s(input + output),
            input_tokens_mean: mean(input),
            output_tokens_mean: mean(output),
            cached_ratio: sum(|one| one.cached_tokens) as f64 / input.max(1) as f64,
            ttft_ms: summary(|one| Some(one.ttft_ms)),
            tbt_ms: Summary::of(gaps().take(GAPS_MAX).collect()),
            tpot_ms: summary(tpot_ms),
            latency_ms: summary(|one| Some(one.latency_ms)),
            lag_ms: Summary::of(samples.iter().map(|sample| ms(sample.lag)).collect()),
            gaps_left_out: gap_count.saturating_sub(GAPS_MAX) as u64,
            goodput,
            errors,
        }
    }

    /// The distributions.
    pub(super) fn times(&self) -> Table {
        let mut table = output::table(&["MILLISECONDS", "MEAN", "P50", "P90", "P95", "P99", "MAX"]);
        for (name, summary) in [
            ("time to first token", self.ttft_ms),
            ("between tokens (TBT)", self.tbt_ms),
            ("per output token (TPOT)", self.tpot_ms),
            ("whole answer", self.latency_ms),
        ] {
            let Summary {
                mean,
                p50,
                p90,
                p95,
                p99,
                max,
            } = summary;
            let cells = [mean, p50, p90, p95, p99, max].map(|ms| format!("{ms:.1}"));
            table.add_row([name.to_owned()].into_iter().chain(cells));
        }
        table
    }

    /// Everything else, a line each.
    pub(super) fn lines(&self) -> String {
        let Counts {
            sent,
            ok,
            failed,
            rejected,
        } = self.requests;
        let mut text = format!(
            "{sent} requests in {:.1} s: {ok} ok, {failed} failed, {rejected} rejected\n\
             {:.2} requests/s, {:.1} output tokens/s, {:.1} tokens/s in all\n\
             {:.1} + {:.1} tokens per request, {:.1} % of the prompts from a cache\n",
            self.duration_s,
            self.requests_per_s,
            self.output_tokens_per_s,
            self.total_tokens_per_s,
            self.input_tokens_mean,
            self.output_tokens_mean,
            100.0 * self.cached_ratio,
        );
        if let Some(goodput) = &self.goodput {
            text += &format!(
                "{:.2} requests/s within limits: {} of {sent} ({:.1} %)\n",
                goodput.requests_per_s,
                goodput.met,
                100.0 * goodput.attainment
            );
        }
        if self.lag_ms.p99 > 10.0 {
            text += &format!(
                "requests were sent late, by {:.0} ms at p99: this end is too slow\n",
                self.lag_ms.p99
            );
        }
        for (code, failures) in &self.errors {
            text += &format!("{} {code}: {}\n", failures.count, failures.first);
        }
        text
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Of an answer of one token there is none.
fn tpot_ms(answer: &Answer) -> Option<f64> {
    let later = answer.output_tokens.checked_sub(1).filter(|later| *later > 0)?;
    Some((answer.latency_ms - answer.ttft_ms) / later as f64)
}

fn count(samples: &[Sample]) -> (Counts, BTreeMap<&'static str, Failures>) {
    let mut counts = Counts {
        sent: samples.len() as u64,
        ..Counts::default()
    };
    let mut errors = BTreeMap::new();
    for sample in samples {
        let Err(Error { code, message, .. }) = &sample.outcome else {
            counts.ok += 1;
            continue;
        };
        match code {
            ErrorCode::Overloaded => counts.rejected += 1,
            _ => counts.failed += 1,
        }
        let failures = errors.entry(code.as_str()).or_insert_with(|| Failures {
            count: 0,
            first: message.clone(),
        });
        failures.count += 1;
    }
    (counts, errors)
}

/// One request, for the JSON.
pub(super) fn sample_json(sample: &Sample) -> Value {
    let mut value = json!({ "number": sample.number, "sent_ms": ms(sample.sent), "lag_ms": ms(sample.lag) });
    match &sample.outcome {
        Ok(answer) => {
            value["ttft_ms"] = json!(answer.ttft_ms);
            value["tpot_ms"] = json!(tpot_ms(answer));
            value["tbt_tail_ms"] = json!(tail_mean(&mut answer.gaps_ms.clone()));
            value["latency_ms"] = json!(answer.latency_ms);
            value["prompt_tokens"] = json!(answer.prompt_tokens);
            value["cached_tokens"] = json!(answer.cached_tokens);
            value["output_tokens"] = json!(answer.output_tokens);
        }
        Err(error) => value["error"] = json!({ "code": error.code, "message": error.message }),
    }
    value
}

/// Times to first token as they came, and the distributions.
pub(super) fn svg(title: &str, samples: &[Sample]) -> String {
    let answered = || {
        samples
            .iter()
            .filter_map(|sample| Some((sample, sample.outcome.as_ref().ok()?)))
    };
    let mut over_time: Vec<(f64, f64)> = answered()
        .map(|(sample, answer)| (sample.sent.as_secs_f64(), answer.ttft_ms))
        .collect();
    over_time.sort_by(|one, other| one.0.total_cmp(&other.0));
    let distribution = |name: &str, values: Vec<f64>| {
        let percentiles = percentiles(values).into_iter().enumerate();
        let points = percentiles
            .map(|(index, value)| (value, (index + 1) as f64))
            .collect();
        (name.to_owned(), points)
    };
    let gaps = answered().flat_map(|(_, answer)| answer.gaps_ms.iter().map(|gap| f64::from(*gap)));
    let distributions = vec![
        distribution("TTFT", answered().map(|(_, answer)| answer.ttft_ms).collect()),
        distribution("TBT", gaps.take(GAPS_MAX).collect()),
        distribution(
            "TPOT",
            answered().filter_map(|(_, answer)| tpot_ms(answer)).collect(),
        ),
        distribution(
            "whole answer",
            answered().map(|(_, answer)| answer.latency_ms).collect(),
        ),
    ];
    plot::stacked(&[
        Plot {
            title,
            x: "s",
            y: "time to first token, ms",
            logarithmic_x: false,
            lines: vec![("TTFT".to_owned(), over_time)],
        },
        Plot {
            title: "Distributions",
            x: "ms",
            y: "percent",
            logarithmic_x: true,
            lines: distributions,
        },
    ])
}

#[cfg(test)]
mod tests;
