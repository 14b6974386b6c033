//! `perigee node log-level`: what a node logs, changed for a while without a restart.

use client::{LogChange, LogLevel};
use serde_json::json;
use types::NodeId;

use super::{connect, find, members};
use crate::arguments::LogLevelArgs;
use crate::output::{Format, View};
use crate::reach::Router;

/// Changes what is to be changed, and prints what the node logs then.
pub(super) async fn run(flags: LogLevelArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let LogLevelArgs {
        node,
        filter,
        lasts,
        revert,
    } = flags;
    let members = members(router).await?;
    let record = &find(&members, &node)?.record;
    let change = match filter {
        _ if revert => LogChange::Revert,
        Some(filter) => LogChange::Set(filter, Some(lasts.get())),
        None => LogChange::Stay,
    };
    let level = connect(router, record)?.log_level(change).await?;
    format.print(&view(&record.id, &level))
}

fn view(id: &NodeId, level: &LogLevel) -> View {
    let document = json!({
        "node": id,
        "filter": level.filter,
        "configured": level.configured,
        "reverts_in_ms": level.reverts_in.map(|left| left.as_millis() as u64),
    });
    View::line(document, text(id, level)).named([id])
}

fn text(id: &NodeId, level: &LogLevel) -> String {
    match level.reverts_in {
        None => format!("{id} logs {}, its own setting", level.filter),
        Some(left) => {
            // Whole seconds, and never the 0 that would say that it is over.
            let left = std::time::Duration::from_secs(left.as_secs_f64().ceil() as u64);
            format!(
                "{id} logs {} for {}, then {} again",
                level.filter,
                humantime::format_duration(left),
                level.configured
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::output::golden;

    #[test]
    fn what_a_node_logs_is_told_with_what_comes_after() {
        let id = NodeId::new("decode-0");
        let mut level = LogLevel {
            filter: "debug".into(),
            configured: "info".into(),
            reverts_in: Some(Duration::from_millis(599_400)),
        };
        assert_eq!(text(&id, &level), "decode-0 logs debug for 10m, then info again");
        golden::check("node-log-level", &view(&id, &level));
        level.reverts_in = None;
        assert_eq!(text(&id, &level), "decode-0 logs debug, its own setting");
    }
}
