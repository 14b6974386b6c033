//! `perigee route`: where the router placed requests, and why.

mod flags;
mod table;

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use client::{Decision, PlacementCandidate, Routing};
use proto::v1;
use proto::v1::explain_request::Input;
use serde_json::{Value, json};
use types::{Error, ErrorCode};

use crate::output::{Format, View};
use crate::reach::Router;
pub(crate) use flags::RouteCommand;
use flags::{ExplainArgs, ListArgs};

/// A prompt larger than this is none.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// Runs one of the commands.
pub(crate) async fn run(command: RouteCommand, router: &Router, format: Format) -> anyhow::Result<()> {
    let routing = Routing::new(router.channel()?);
    match command {
        RouteCommand::Explain(flags) => explain(&flags, &routing, format).await,
        RouteCommand::List(flags) => list(&flags, &routing, format).await,
    }
}

async fn explain(flags: &ExplainArgs, routing: &Routing, format: Format) -> anyhow::Result<()> {
    if flags.live {
        return live(flags, routing, format).await;
    }
    if let Some(prompt) = prompt(flags)? {
        let request = v1::ExplainRequest {
            model: String::new(),
            input: Some(prompt),
            ttft_slo_ms: flags.ttft_slo.unwrap_or(0.0),
            tbt_slo_ms: flags.tbt_slo.unwrap_or(0.0),
            tenant: flags.tenant.clone(),
        };
        return format.print(&explain_view(&routing.explain(request).await?, flags.all));
    }
    let (request, count) = match &flags.request {
        Some(text) => (Some(proto::convert::request_id(text)?), None),
        None => (None, Some(1)),
    };
    let mut decisions = routing.decisions(request, count).await?;
    if decisions.is_empty() {
        let message = "the router has kept no decision: send a request, or give a prompt";
        return Err(Error::new(ErrorCode::NotFound, message).into());
    }
    // In the order in which they were made, as a request's placements are told.
    decisions.reverse();
    let views = decisions.iter().map(|decision| explain_view(decision, flags.all));
    format.print(&View::several(views.collect()))
}

async fn live(flags: &ExplainArgs, routing: &Routing, format: Format) -> anyhow::Result<()> {
    let mut stream = routing.watch().await?;
    while let Some((decision, missed)) = stream.next().await? {
        if missed > 0 {
            eprintln!("perigee: {missed} decisions came too fast to be shown");
        }
        format.print_next(&explain_view(&decision, flags.all))?;
    }
    Ok(())
}

async fn list(flags: &ListArgs, routing: &Routing, format: Format) -> anyhow::Result<()> {
    let look = async || {
        Ok(list_view(
            &routing.decisions(None, Some(flags.count.get())).await?,
        ))
    };
    flags.watch.show(format, look).await
}

/// Decisions, one per line. Prompts that were only explained have no name.
fn list_view(decisions: &[Decision]) -> View {
    let documents: Vec<Value> = decisions.iter().map(decision_json).collect();
    let view = View::new(json!({ "decisions": documents }), |wide| {
        table::of_decisions(decisions, wide)
    });
    let ids = decisions.iter().map(|decision| &decision.request_id);
    view.named(ids.filter(|id| !id.is_empty()))
}

/// A decision with its candidates, all of them where that is asked for or the terminal is wide.
pub(crate) fn explain_view(decision: &Decision, all: bool) -> View {
    View::new(decision_json(decision), |wide| {
        table::explanation(decision, all || wide)
    })
}

/// What the flags name as a prompt.
fn prompt(flags: &ExplainArgs) -> anyhow::Result<Option<Input>> {
    let text = match (&flags.prompt, &flags.prompt_file, &flags.tokens) {
        (_, _, Some(ids)) => return Ok(Some(Input::Tokens(v1::TokenIds { ids: ids.clone() }))),
        (Some(text), _, None) if text == "-" => read(std::io::stdin(), "stdin")?,
        (Some(text), _, None) => text.clone(),
        (None, Some(path), None) => text_of(path)?,
        (None, None, None) => return Ok(None),
    };
    Ok(Some(match flags.chat {
        false => Input::Prompt(text),
        true => Input::Chat(v1::ChatMessages {
            messages: vec![v1::ChatMessage {
                role: "user".into(),
                content: text,
            }],
        }),
    }))
}

fn text_of(path: &Path) -> anyhow::Result<String> {
    let file = std::fs::File::open(path).map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorCode::NotFound,
            _ => ErrorCode::Invalid,
        };
        Error::new(code, format!("{}: {error}", path.display()))
    })?;
    read(file, &path.display().to_string())
}

fn read(from: impl Read, name: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    from.take(TEXT_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| format!("read the prompt from {name}"))?;
    Ok(text)
}

fn decision_json(decision: &Decision) -> Value {
    let excluded = decision.excluded.iter();
    let excluded = excluded.map(|excluded| json!({ "node": excluded.node, "reason": excluded.reason }));
    json!({
        "number": (decision.number > 0).then_some(decision.number),
        "request_id": (!decision.request_id.is_empty()).then_some(&decision.request_id),
        "made_unix_ms": decision.made_unix_ms,
        "tenant": decision.tenant,
        "prompt_tokens": decision.prompt_tokens,
        "policy": decision.policy,
        "chosen": 0,
        "reason": decision.reason,
        "candidates": decision.candidates.iter().map(candidate_json).collect::<Vec<_>>(),
        "candidates_left_out": decision.candidates_left_out,
        "excluded": excluded.collect::<Vec<_>>(),
        "excluded_left_out": decision.excluded_left_out,
        "decision_ms": decision.decision_ms,
        "outcome": decision.outcome.as_ref().map(|outcome| json!({
            "state": outcome.state,
            "ttft_ms": (outcome.ttft_ms > 0.0).then_some(outcome.ttft_ms),
        })),
        "admission": decision.admission.as_ref().map(|foreseen| json!({
            "wait_ms": foreseen.wait_ms,
            "ttft_ms": foreseen.ttft_ms,
            "rejection": foreseen.rejection.as_ref().map(|why| json!({
                "message": why.message,
                "constraint": why.overload.as_ref().map(|overload| &overload.constraint),
                "retry_after_ms": why.retry_after_ms,
            })),
        })),
    })
}

fn candidate_json(candidate: &PlacementCandidate) -> Value {
    let sources = candidate.sources.iter();
    let sources = sources.map(|source| json!({ "node": source.node, "blocks": source.blocks }));
    json!({
        "prefill_node": (!candidate.prefill_node.is_empty()).then_some(&candidate.prefill_node),
        "decode_node": candidate.decode_node,
        "sources": sources.collect::<Vec<_>>(),
        "new_tokens": candidate.new_tokens,
        "decode_blocks": candidate.decode_blocks,
        "queue_ms": candidate.queue_ms,
        "promote_ms": candidate.promote_ms,
        "fetch_ms": candidate.fetch_ms,
        "compute_ms": candidate.compute_ms,
        "handoff_ms": candidate.handoff_ms,
        "ttft_ms": candidate.ttft_ms,
        "tbt_ms": candidate.tbt_ms,
        "interference_charge_ms": candidate.interference_charge_ms,
        "gap_charge_ms": candidate.gap_charge_ms,
        "score_ms": candidate.score_ms,
        "objection": (!candidate.objection.is_empty()).then_some(&candidate.objection),
    })
}
