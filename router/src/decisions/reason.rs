//! The reason for a choice, as a sentence.

use types::Millis;

use super::Decision;
use crate::placement::{Candidate, Objection};

/// Differences of a term below this are no reason for anything.
const TERM_MIN: Millis = Millis(0.05);

/// Why the first candidate of `decision` was chosen.
pub fn reason(decision: &Decision) -> String {
    let choice = decision.choice();
    let why = match decision.policy {
        "perigee" => least_score(decision),
        "kv_centric" | "local_cache_aware" => {
            "prefill node with the least time to first token but for the handoff, decode node with the least gap between tokens"
                .to_owned()
        }
        "least_loaded" => {
            "prefill node with the shortest queue, decode node with the least gap between tokens".to_owned()
        }
        "dynamo" => "prefill node with the fewest blocks to compute, decode node with the most free ones".to_owned(),
        "round_robin" => "its nodes' turn, whatever their load".to_owned(),
        "random" => "drawn at random".to_owned(),
        other => format!("the choice of the policy {other}"),
    };
    match choice.objection {
        None => why,
        Some(objection) => format!(
            "{why}; although it {}, as nothing better is left",
            against(objection)
        ),
    }
}

fn least_score(decision: &Decision) -> String {
    let choice = decision.choice();
    let Some(next) = decision.candidates.get(1) else {
        return format!("the only candidate: {}", choice.score);
    };
    let (name, ahead) = (pair(next), Millis(next.score.0 - choice.score.0));
    if next.objection > choice.objection {
        let objection = next.objection.map_or("is worse", against);
        let first = match choice.objection {
            None => "the only candidate with nothing against it",
            Some(_) => "the candidate with the least against it",
        };
        return format!("{first}: {}; {name} {objection}", choice.score);
    }
    if ahead.0.abs() <= decision.tie.0 {
        return format!(
            "least score but for {}: {}, as good as {name}; the hash of the prompt's first block decides",
            decision.tie, choice.score
        );
    }
    let why = difference(choice, next).map_or_else(String::new, |why| format!(" ({why})"));
    format!("least score: {}, {ahead} less than {name}{why}", choice.score)
}

/// The term in which the choice is furthest ahead of `next`.
fn difference(choice: &Candidate, next: &Candidate) -> Option<String> {
    let (a, b) = (&choice.prediction, &next.prediction);
    let terms = [
        ("queue", a.queue, b.queue),
        ("promote", a.promote, b.promote),
        ("fetch", a.fetch, b.fetch),
        ("compute", a.compute, b.compute),
        ("handoff", a.handoff, b.handoff),
        (
            "delay of others",
            choice.interference_charge,
            next.interference_charge,
        ),
        ("gap between tokens", choice.gap_charge, next.gap_charge),
    ];
    let ahead = |(_, a, b): &(&str, Millis, Millis)| b.0 - a.0;
    let most = terms.into_iter().max_by(|x, y| ahead(x).total_cmp(&ahead(y)))?;
    let (name, ours, theirs) = most;
    if ahead(&most) < TERM_MIN.0 {
        return None;
    }
    let saved = next.new_tokens.saturating_sub(choice.new_tokens);
    Some(match name {
        "compute" if saved > 0 && a.fetch.0 > 0.0 => {
            format!(
                "fetch {} instead of computing {} tokens",
                a.fetch,
                thousands(saved)
            )
        }
        "compute" if saved > 0 => format!("holds {} more tokens of the prompt", thousands(saved)),
        name => format!("{name} {ours} instead of {theirs}"),
    })
}

/// `prefill-1 → decode-0`, or `decode-0 alone`.
fn pair(candidate: &Candidate) -> String {
    match &candidate.prefill {
        Some(prefill) => format!("{prefill} → {}", candidate.decode),
        None => format!("{} alone", candidate.decode),
    }
}

fn against(objection: Objection) -> &'static str {
    match objection {
        Objection::MissesTbt => "misses the limit on gaps between tokens",
        Objection::MissesTtft => "misses the limit on the time to first token",
        Objection::ShortOfBlocks => "is short of free blocks",
        Objection::LocalPrefillTooLong => "would prefill too many tokens on a decode node",
    }
}

fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests;
