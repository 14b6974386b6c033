//! Decisions for people.

use std::fmt::Write;

use client::{Decision, PlacementCandidate};
use proto::v1;

use crate::output::{self, Columns, or_dash};
use crate::requests::painted;

/// Candidates that are shown unless all are asked for: they fit a screen.
const SHOWN: usize = 12;

/// A decision: what it was about, its candidates, and the reason.
pub(super) fn explanation(decision: &Decision, all: bool) -> String {
    let shown = match all {
        true => decision.candidates.len(),
        false => decision.candidates.len().min(SHOWN),
    };
    let mut table = output::table(&[
        "", "PREFILL", "DECODE", "SOURCE", "QUEUE", "PROMOTE", "FETCH", "COMPUTE", "HANDOFF", "TTFT", "TBT",
        "SCORE", "NOTE",
    ]);
    for (index, candidate) in decision.candidates[..shown].iter().enumerate() {
        table.add_row(row(index == 0, candidate));
    }
    let mut text = headline(decision);
    for line in table.lines() {
        push(&mut text, line.trim_end());
    }
    push(&mut text, &format!("reason: {}", decision.reason));
    if let Some(foreseen) = &decision.admission {
        push(&mut text, &format!("admission: {}", admission(foreseen)));
    }
    let more = decision.candidates.len() - shown;
    if more > 0 {
        push(&mut text, &format!("{more} more candidates: --all shows them"));
    }
    if decision.candidates_left_out > 0 {
        let left_out = decision.candidates_left_out;
        push(
            &mut text,
            &format!("{left_out} candidates with less promise were not kept"),
        );
    }
    for excluded in &decision.excluded {
        let reason = excluded.reason.replace('_', " ");
        push(&mut text, &format!("not weighed: {}, {reason}", excluded.node));
    }
    if decision.excluded_left_out > 0 {
        let left_out = decision.excluded_left_out;
        push(&mut text, &format!("not weighed: {left_out} more nodes"));
    }
    text
}

/// One line per decision.
pub(super) fn of_decisions(decisions: &[Decision], wide: bool) -> String {
    let columns = [
        ("REQUEST", false),
        ("TENANT", false),
        ("PROMPT", false),
        ("PREFILL", false),
        ("DECODE", false),
        ("NEW", false),
        ("PREDICTED", false),
        ("TTFT", false),
        ("STATE", false),
        ("POLICY", true),
        ("CANDIDATES", true),
        ("DECIDED IN", true),
        ("REASON", false),
    ];
    let mut table = Columns::new(wide, &columns);
    for decision in decisions {
        let choice = &decision.candidates[0];
        let outcome = decision.outcome.clone().unwrap_or_default();
        table.row([
            or_dash(&decision.request_id),
            or_dash(&decision.tenant),
            decision.prompt_tokens.to_string(),
            prefill(choice),
            choice.decode_node.clone(),
            choice.new_tokens.to_string(),
            ms(choice.ttft_ms),
            ms(outcome.ttft_ms),
            or_dash(&painted(&outcome.state)),
            decision.policy.clone(),
            weighed(decision).to_string(),
            format!("{:.2} ms", decision.decision_ms),
            decision.reason.clone(),
        ]);
    }
    table.text()
}

fn weighed(decision: &Decision) -> u64 {
    decision.candidates.len() as u64 + decision.candidates_left_out
}

fn headline(decision: &Decision) -> String {
    let mut text = match decision.request_id.as_str() {
        "" => "prompt".to_owned(),
        id => format!("request {id}"),
    };
    let mut add = |part: String| write!(text, "{part}").expect("a string takes everything");
    add(format!(" of {} tokens", decision.prompt_tokens));
    if !decision.tenant.is_empty() {
        add(format!(" of tenant {}", decision.tenant));
    }
    let weighed = weighed(decision);
    add(format!(
        ", policy {}: {weighed} candidates weighed in {:.2} ms",
        decision.policy, decision.decision_ms
    ));
    if let Some(outcome) = &decision.outcome {
        add(format!("; {}", outcome.state));
        if outcome.ttft_ms > 0.0 {
            add(format!(", first token after {} ms", ms(outcome.ttft_ms)));
        }
    }
    text.push_str("; times in ms\n");
    text
}

fn admission(foreseen: &v1::ForeseenAdmission) -> String {
    if let Some(rejection) = &foreseen.rejection {
        let retry_after_ms = rejection.retry_after_ms.unwrap_or_default();
        return format!(
            "turned away, {}; retry after {retry_after_ms} ms",
            rejection.message
        );
    }
    let first = format!("first token after {} ms", ms(foreseen.ttft_ms));
    match foreseen.wait_ms {
        0.0 => format!("at once, {first}"),
        wait => format!("waits {} ms for its place, {first}", ms(wait)),
    }
}

fn row(chosen: bool, candidate: &PlacementCandidate) -> Vec<String> {
    vec![
        if chosen { "*" } else { "" }.to_owned(),
        prefill(candidate),
        candidate.decode_node.clone(),
        candidate.sources.first().map_or_else(
            || "-".to_owned(),
            |source| format!("{} ({} blocks)", source.node, source.blocks),
        ),
        ms(candidate.queue_ms),
        ms(candidate.promote_ms),
        ms(candidate.fetch_ms),
        ms(candidate.compute_ms),
        ms(candidate.handoff_ms),
        ms(candidate.ttft_ms),
        ms(candidate.tbt_ms),
        ms(candidate.score_ms),
        note(candidate),
    ]
}

/// What the numbers beside it do not say.
fn note(candidate: &PlacementCandidate) -> String {
    let mut notes = vec![format!("{} new", candidate.new_tokens)];
    if candidate.interference_charge_ms > 0.0 {
        notes.push(format!(
            "delays others: +{}",
            ms(candidate.interference_charge_ms)
        ));
    }
    if !candidate.objection.is_empty() {
        notes.push(candidate.objection.replace('_', " "));
    }
    notes.join(", ")
}

fn prefill(candidate: &PlacementCandidate) -> String {
    match candidate.prefill_node.as_str() {
        "" => "local".to_owned(),
        id => id.to_owned(),
    }
}

fn ms(value: f64) -> String {
    if value == 0.0 {
        "-".to_owned()
    } else {
        format!("{value:.1}")
    }
}

fn push(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

#[cfg(test)]
mod tests;
