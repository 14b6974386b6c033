//! `perigee request`: requests that run and the last ones, and where their time went.

mod waterfall;

use std::num::NonZeroU32;

use clap::Subcommand;
use client::{PlacementTimeline, RequestTimeline, Requests, TimelineSpan};
use comfy_table::Table;
use serde_json::{Value, json};
use types::{ErrorCode, RequestId};

use crate::output::{self, Columns, Format, Tone, View, Watch, or_dash, paint};
use crate::reach::Router;

/// `perigee request`.
#[derive(Debug, Subcommand)]
pub(crate) enum RequestCommand {
    /// List the requests that run, then those that ended
    List {
        /// Only those that run.
        #[arg(long)]
        running: bool,
        /// Most requests to list.
        #[arg(long, default_value = "20", value_name = "COUNT")]
        count: NonZeroU32,
        #[command(flatten)]
        watch: Watch,
    },
    /// Show what is known of a request
    Show {
        /// Its id, as `x-request-id` and `request list` tell it.
        id: String,
        #[command(flatten)]
        watch: Watch,
    },
    /// Show where a request's time went, as a waterfall
    Trace {
        /// Its id.
        id: String,
        /// Columns of the bars.
        #[arg(long, default_value_t = waterfall::COLUMNS, value_name = "COLUMNS",
            value_parser = clap::value_parser!(u16).range(10..=400))]
        width: u16,
    },
    /// End a request that runs; its client is told that an operator cancelled it
    Cancel {
        /// Its id.
        id: String,
    },
}

/// Runs one of the commands.
pub(crate) async fn run(command: RequestCommand, router: &Router, format: Format) -> anyhow::Result<()> {
    let requests = Requests::new(router.channel()?);
    match command {
        RequestCommand::List {
            running,
            count,
            watch,
        } => {
            let look = async || Ok(list_view(&requests.list(running, Some(count.get())).await?));
            watch.show(format, look).await
        }
        RequestCommand::Show { id, watch } => {
            let id = read_id(&id)?;
            let text = |request: &RequestTimeline| output::table_text(&of_request(request));
            let look = async || Ok(show_view(&requests.show(id).await?, text));
            watch.show(format, look).await
        }
        RequestCommand::Trace { id, width } => {
            let found = requests.show(read_id(&id)?).await?;
            format.print(&show_view(&found, |request| waterfall::text(request, width)))
        }
        RequestCommand::Cancel { id } => {
            let id = read_id(&id)?;
            let count = requests.cancel(id).await?;
            format.print(&cancelled(id, count))
        }
    }
}

fn cancelled(id: RequestId, count: u32) -> View {
    let document = json!({ "request_id": id.to_string(), "cancelled": count });
    View::line(document, format!("request {id} is cancelled")).named([id])
}

/// An id as it is shown, or as a UUID.
fn read_id(text: &str) -> Result<RequestId, types::Error> {
    proto::convert::request_id(&text.replace('-', ""))
}

/// Requests, one per line.
pub(crate) fn list_view(requests: &[RequestTimeline]) -> View {
    let documents: Vec<Value> = requests.iter().map(|request| to_json(request, false)).collect();
    let view = View::new(json!({ "requests": documents }), |wide| {
        of_requests(requests, wide)
    });
    view.named(requests.iter().map(|request| &request.request_id))
}

/// All of one request: newest first, which is the only one unless clients name requests alike.
fn show_view(requests: &[RequestTimeline], text: impl Fn(&RequestTimeline) -> String) -> View {
    let views = requests.iter().map(|request| {
        let view = View::new(to_json(request, true), |_| text(request));
        view.named([&request.request_id])
    });
    View::several(views.collect())
}

/// One line per request.
fn of_requests(requests: &[RequestTimeline], wide: bool) -> String {
    let columns = [
        ("REQUEST", false),
        ("STATE", false),
        ("AGE", false),
        ("TENANT", false),
        ("PROMPT", false),
        ("CACHED", false),
        ("OUTPUT", false),
        ("TTFT", false),
        ("TBT", false),
        ("PREFILL", false),
        ("DECODE", false),
        ("PRIORITY", true),
        ("ARRIVED", true),
        ("TRACE", true),
        ("ERROR", true),
    ];
    let mut table = Columns::new(wide, &columns);
    for request in requests {
        let placement = request.placements.last().cloned().unwrap_or_default();
        let placed = !request.placements.is_empty();
        table.row([
            request.request_id.clone(),
            painted(&request.state),
            time(request.age_ms),
            or_dash(&request.tenant),
            count(request.prompt_tokens),
            count(request.cached_tokens),
            format!("{}/{}", request.output_tokens, request.output_tokens_max),
            time(request.ttft_ms),
            time(request.tbt_mean_ms),
            if placed {
                prefill(&placement)
            } else {
                "-".to_owned()
            },
            or_dash(&placement.decode_node),
            or_dash(&request.priority),
            arrived(request.arrived_unix_ms),
            or_dash(&request.trace_id),
            or_dash(&request.error),
        ]);
    }
    table.text()
}

/// A request's state in its colour: how it ended, or where it is on its way.
pub(crate) fn painted(state: &str) -> String {
    match (state, ErrorCode::parse(state)) {
        ("finished", _) => paint(Tone::Good, state),
        // Its client left, or may try again.
        ("cancelled", _) | (_, Some(ErrorCode::Overloaded)) => paint(Tone::Warning, state),
        (_, Some(_)) => paint(Tone::Bad, state),
        (_, None) => state.to_owned(),
    }
}

/// All but the parts of the way.
fn of_request(request: &RequestTimeline) -> Table {
    let mut table = output::table(&["REQUEST", request.request_id.as_str()]);
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            table.add_row([name.to_owned(), value]);
        }
    };
    row("state", painted(&request.state));
    row("error", request.error.clone());
    row("arrived", arrived(request.arrived_unix_ms));
    row("age", time(request.age_ms));
    row("trace", request.trace_id.clone());
    row("tenant", request.tenant.clone());
    row("priority", request.priority.clone());
    row(
        "prompt",
        format!(
            "{} tokens, {} from a cache",
            request.prompt_tokens, request.cached_tokens
        ),
    );
    row(
        "output",
        format!(
            "{} of at most {} tokens",
            request.output_tokens, request.output_tokens_max
        ),
    );
    row("first token", against(request.ttft_ms, request.ttft_slo_ms));
    row("between tokens", against(request.tbt_mean_ms, request.tbt_slo_ms));
    for (index, placement) in request.placements.iter().enumerate() {
        let name = match request.placements.len() {
            1 => "placement".to_owned(),
            _ => format!("placement {}", index + 1),
        };
        row(&name, of_placement(placement));
    }
    table
}

fn of_placement(placement: &PlacementTimeline) -> String {
    let nodes = match placement.prefill_node.as_str() {
        "" => format!("{} alone", placement.decode_node),
        prefill => format!("{prefill} → {}", placement.decode_node),
    };
    let mut text = format!("{nodes}, {}", placement.state);
    if placement.ttft_ms > 0.0 {
        text += &format!(
            ", first token after {} (predicted {})",
            time(placement.ttft_ms),
            time(placement.ttft_predicted_ms)
        );
    }
    if placement.fetched_bytes > 0 {
        text += &format!(", fetched {}", output::bytes(placement.fetched_bytes));
    }
    if placement.handoff_bytes > 0 {
        text += &format!(
            ", handed over {} by {} ({} hidden, {} exposed)",
            output::bytes(placement.handoff_bytes),
            placement.transport,
            time(placement.handoff_hidden_ms),
            time(placement.handoff_exposed_ms)
        );
    }
    text
}

fn prefill(placement: &PlacementTimeline) -> String {
    match placement.prefill_node.as_str() {
        "" => "local".to_owned(),
        id => id.to_owned(),
    }
}

/// A time and its limit.
fn against(ms: f64, limit_ms: f64) -> String {
    match limit_ms > 0.0 {
        true => format!("{} of at most {}", time(ms), time(limit_ms)),
        false => time(ms),
    }
}

/// `1.25 ms`, `3.1 s`, `2m 05s`; nothing is a dash.
pub(crate) fn time(ms: f64) -> String {
    match ms {
        ms if ms <= 0.0 => "-".to_owned(),
        ms if ms < 9.995 => format!("{ms:.2} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 59_950.0 => format!("{:.1} s", ms / 1e3),
        ms => {
            let seconds = (ms / 1e3).round() as u64;
            format!("{}m {:02}s", seconds / 60, seconds % 60)
        }
    }
}

fn arrived(unix_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(unix_ms);
    humantime::format_rfc3339_millis(at).to_string()
}

fn count(value: u64) -> String {
    if value == 0 {
        "-".to_owned()
    } else {
        value.to_string()
    }
}

fn to_json(request: &RequestTimeline, whole: bool) -> Value {
    let some = |value: f64| (value > 0.0).then_some(value);
    let mut object = json!({
        "request_id": request.request_id,
        "arrived_unix_ms": request.arrived_unix_ms,
        "state": request.state,
        "age_ms": request.age_ms,
        "error": (!request.error.is_empty()).then_some(&request.error),
        "trace_id": request.trace_id,
        "tenant": request.tenant,
        "priority": request.priority,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_tokens,
        "output_tokens_max": request.output_tokens_max,
        "ttft_ms": some(request.ttft_ms),
        "tbt_mean_ms": some(request.tbt_mean_ms),
        "ttft_slo_ms": some(request.ttft_slo_ms),
        "tbt_slo_ms": some(request.tbt_slo_ms),
        "placements": request.placements.iter().map(placement_json).collect::<Vec<_>>(),
    });
    if whole {
        object["spans"] = request.spans.iter().map(span_json).collect();
    }
    object
}

fn placement_json(placement: &PlacementTimeline) -> Value {
    json!({
        "prefill_node": (!placement.prefill_node.is_empty()).then_some(&placement.prefill_node),
        "decode_node": placement.decode_node,
        "state": placement.state,
        "ttft_predicted_ms": placement.ttft_predicted_ms,
        "ttft_ms": (placement.ttft_ms > 0.0).then_some(placement.ttft_ms),
        "fetched_bytes": placement.fetched_bytes,
        "handoff_bytes": placement.handoff_bytes,
        "handoff_hidden_ms": placement.handoff_hidden_ms,
        "handoff_exposed_ms": placement.handoff_exposed_ms,
        "transport": placement.transport,
    })
}

fn span_json(span: &TimelineSpan) -> Value {
    json!({
        "name": span.name,
        "node": (!span.node.is_empty()).then_some(&span.node),
        "depth": span.depth,
        "start_ms": span.start_ms,
        "duration_ms": span.duration_ms,
        "running": span.running,
        "bytes": span.bytes,
        "detail": span.detail,
    })
}

#[cfg(test)]
mod tests;
