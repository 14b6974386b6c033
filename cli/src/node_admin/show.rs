//! `perigee node show`: all that a node says of itself, and what the router knows of it.

use std::time::Duration;

use client::{NodeInfo, NodeStatus};
use comfy_table::Table;
use serde_json::json;
use types::{Error, ErrorCode, LoadReport, Role};

use super::drain::left;
use super::{connect, find, members};
use crate::output::{self, Format};
use crate::reach::Router;
use crate::status::{self, rate};

/// A report comes at once from a node that lives.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Prints one node.
pub(super) async fn run(id: &str, router: &Router, format: Format) -> anyhow::Result<()> {
    let members = members(router).await?;
    let known = find(&members, id)?;
    let asked = ask(router, known).await;
    if format == Format::Json {
        let (info, load) = asked
            .as_ref()
            .map_or((None, None), |(info, load)| (Some(info), Some(load)));
        return output::print_json(&json!({
            "record": info.map_or(&known.record, |info| &info.record),
            "version": info.map(|info| &info.version),
            "state": state(known, load),
            "load": load,
            "indexed_blocks": known.indexed_blocks,
            "error": asked.as_ref().err().map(ToString::to_string),
        }));
    }
    let (said, error) = match asked {
        Ok(said) => (Some(said), None),
        Err(error) => (None, Some(error)),
    };
    output::print_table(&table(known, said.as_ref()))?;
    // What the router knows is shown in either case.
    error.map_or(Ok(()), |error| Err(error.into()))
}

async fn ask(router: &Router, known: &NodeStatus) -> Result<(NodeInfo, LoadReport), Error> {
    let node = connect(router, &known.record)?;
    let info = node.info().await?;
    let mut reports = node.watch_load(Duration::ZERO).await?;
    let report = tokio::time::timeout(REPORT_TIMEOUT, reports.next()).await;
    let report = report.map_err(|_| Error::new(ErrorCode::Timeout, "the node sends no report"))??;
    let ends = || Error::unavailable(format!("{} ends", known.record.id));
    Ok((info, report.ok_or_else(ends)?))
}

/// A router is not watched by the router that answers, but says itself whether it drains.
fn state(known: &NodeStatus, load: Option<&LoadReport>) -> &'static str {
    match load {
        Some(load) if !load.takes_requests() => load.state(),
        Some(_) | None => status::state(known),
    }
}

fn table(known: &NodeStatus, said: Option<&(NodeInfo, LoadReport)>) -> Table {
    let record = said.map_or(&known.record, |(info, _)| &info.record);
    let mut table = output::table(&["NODE", record.id.as_str()]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("role", record.role.to_string());
    row("state", state(known, said.map(|(_, load)| load)).to_owned());
    if let Some((info, _)) = said {
        row("version", info.version.clone());
    }
    row("epoch", record.epoch.to_string());
    row("grpc", record.grpc_endpoint.clone());
    row("http", record.http_endpoint.clone());
    row("model", record.model.clone());
    if record.role != Role::Router {
        row("transfer", record.transfer_endpoint.clone());
        if let Some(space) = &record.kv_space {
            row("block tokens", space.layout.block_tokens.to_string());
        }
        row("cached blocks", known.indexed_blocks.to_string());
    }
    let Some((_, load)) = said else {
        return table;
    };
    row("running", load.running_sequences.to_string());
    row("queued", load.queued_requests.to_string());
    if record.role != Role::Router {
        let used = record
            .capacity_blocks
            .saturating_sub(load.free_blocks + load.evictable_blocks);
        row("kv used", format!("{used}/{} blocks", record.capacity_blocks));
        row(
            "prefill",
            rate(load.prefill_ms_per_token, |ms| {
                format!("{:.0} tok/s", 1000.0 / ms)
            }),
        );
        row("step", rate(load.decode_step_ms, |ms| format!("{ms:.1} ms")));
    }
    if let Some(drain) = load.drain {
        row(
            "drain",
            if drain.done {
                "done: it may be stopped".to_owned()
            } else {
                left(drain)
            },
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use types::DrainProgress;

    use super::super::tests::node;
    use super::*;

    #[test]
    fn a_node_is_shown_with_how_far_its_drain_is() {
        let known = node("decode-0", Role::Decode);
        let load = LoadReport {
            running_sequences: 3,
            free_blocks: 80,
            evictable_blocks: 12,
            decode_step_ms: 12.25,
            draining: true,
            drain: Some(DrainProgress {
                requests: 3,
                blocks: 12,
                done: false,
            }),
            ..LoadReport::default()
        };
        let info = NodeInfo {
            record: known.record.clone(),
            version: "1.2.3".into(),
            unix_time_ms: None,
        };
        let text = output::table_text(&table(&known, Some(&(info, load))));
        let expected = "
 NODE           decode-0
 role           decode
 state          draining
 version        1.2.3
 epoch          7
 grpc           decode-0:1
 http           decode-0:2
 model          tiny
 transfer       tcp://decode-0:3
 cached blocks  40
 running        3
 queued         0
 kv used        8/100 blocks
 prefill        -
 step           12.2 ms
 drain          3 requests and 12 blocks left
";
        assert_eq!(format!("\n{text}"), expected);
        let silent = output::table_text(&table(&known, None));
        assert!(
            silent.contains("state          ready") && !silent.contains("running"),
            "{silent}"
        );
    }
}
