//! `perigee node show`: all that a node says of itself, and what the router knows of it.

use std::time::Duration;

use client::{NodeInfo, NodeStatus};
use serde_json::json;
use types::{Error, ErrorCode, LoadReport, Role};

use super::drain::left;
use super::{connect, find, members};
use crate::output::{self, Format, View, Watch};
use crate::reach::Router;
use crate::status::{self, painted, rate};

/// A report comes at once from a node that lives.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node says of itself.
type Said = Result<(NodeInfo, LoadReport), Error>;

/// Prints one node. What the router knows of it is shown also where it does not answer.
pub(super) async fn run(id: &str, watch: Watch, router: &Router, format: Format) -> anyhow::Result<()> {
    let silent = std::cell::Cell::new(None);
    let look = async || {
        let members = members(router).await?;
        let known = find(&members, id)?;
        let said = ask(router, known).await;
        silent.set(said.as_ref().err().cloned());
        Ok(view(known, &said))
    };
    watch.show(format, look).await?;
    // Documents have the error within them.
    match silent
        .take()
        .filter(|_| format.streams_text() && !watch.repeats())
    {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

/// A node by what the router knows and what it says itself.
pub(crate) fn view(known: &NodeStatus, said: &Said) -> View {
    let (info, load) = said
        .as_ref()
        .map_or((None, None), |(info, load)| (Some(info), Some(load)));
    let document = json!({
        "record": info.map_or(&known.record, |info| &info.record),
        "version": info.map(|info| &info.version),
        "state": state(known, load),
        "load": load,
        "indexed_blocks": known.indexed_blocks,
        "error": said.as_ref().err().map(ToString::to_string),
    });
    View::new(document, |_| table(known, said.as_ref().ok())).named([&known.record.id])
}

/// Asks a node for all that it says of itself.
pub(crate) async fn ask(router: &Router, known: &NodeStatus) -> Said {
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

fn table(known: &NodeStatus, said: Option<&(NodeInfo, LoadReport)>) -> String {
    let record = said.map_or(&known.record, |(info, _)| &info.record);
    let mut table = output::table(&["NODE", record.id.as_str()]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("role", record.role.to_string());
    row("state", painted(state(known, said.map(|(_, load)| load))));
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
        return output::table_text(&table);
    };
    row("running", load.running_sequences.to_string());
    row("queued", load.queued_requests.to_string());
    if record.role != Role::Router {
        let used = load.used_blocks(record.capacity_blocks);
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
    output::table_text(&table)
}

#[cfg(test)]
mod tests {
    use types::DrainProgress;

    use super::super::tests::node;
    use super::*;
    use crate::output::golden;

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
        golden::check("node-show", &view(&known, &Ok((info, load))));
        let silent = Err(Error::unavailable("decode-0:1 does not answer"));
        golden::check("node-show-silent", &view(&known, &silent));
    }
}
