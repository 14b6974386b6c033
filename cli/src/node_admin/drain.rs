//! `perigee node drain`: takes a node out of service, and waits until it may be stopped.

use std::time::Duration;

use client::{Node, NodeStatus};
use serde_json::json;
use tokio::time::{Instant, timeout};
use types::{DrainProgress, Error, ErrorCode, LoadReport, NodeId, Role};

use super::{connect, find, members, this_node};
use crate::arguments::DrainArgs;
use crate::output::{Format, View};
use crate::reach::Router;
use crate::status;

/// Between two reports of a node that is waited for.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Between two lines about the progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What a report says of a node that is to drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// There is more to do.
    Left(DrainProgress),
    /// The node may be stopped.
    Drained,
    /// Somebody resumed it.
    Resumed,
}

/// Drains, waits if that is asked for, and prints how far it came.
pub(super) async fn run(flags: &DrainArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let (node, id) = match &flags.target.node {
        Some(id) => {
            let members = members(router).await?;
            let found = find(&members, id)?;
            if !flags.force {
                check_not_last(found, &members)?;
            }
            (connect(router, &found.record)?, found.record.id.clone())
        }
        // Whoever drains it from within is about to end it, so that refusing would only cost its requests their time.
        None => this_node(&flags.target, router).await?,
    };
    node.drain().await?;
    if flags.wait {
        wait(&node, &id, flags.timeout.into()).await?;
    }
    format.print(&view(&id, flags.wait))
}

fn view(id: &NodeId, drained: bool) -> View {
    let (state, line) = match drained {
        true => (
            "drained",
            format!("{id} is drained: nothing runs on it, and its blocks were offered to its peers"),
        ),
        false => (
            "draining",
            format!("{id} drains: perigee node resume {id} lets it take requests again"),
        ),
    };
    View::line(json!({ "node": id, "state": state }), line).named([id])
}

/// Follows the reports until the node is drained.
async fn wait(node: &Node, id: &NodeId, patience: Duration) -> Result<(), Error> {
    let mut last = None;
    let followed = timeout(patience, follow(node, id, &mut last)).await;
    followed.unwrap_or_else(|_| {
        let left = last.map_or_else(|| "it sent no report".to_owned(), left);
        let waited = humantime::format_duration(patience);
        let message = format!("{id} is not drained after {waited}: {left}; it goes on draining");
        Err(Error::new(ErrorCode::Timeout, message))
    })
}

async fn follow(node: &Node, id: &NodeId, last: &mut Option<DrainProgress>) -> Result<(), Error> {
    let mut reports = node.watch_load(REPORT_INTERVAL).await?;
    let mut said: Option<(Instant, DrainProgress)> = None;
    while let Some(report) = reports.next().await? {
        match look(&report) {
            Seen::Drained => return Ok(()),
            Seen::Resumed => {
                let message = format!("{id} takes requests again: somebody resumed it");
                return Err(Error::new(ErrorCode::Conflict, message));
            }
            Seen::Left(progress) => {
                *last = Some(progress);
                let news =
                    said.is_none_or(|(at, before)| at.elapsed() >= PROGRESS_INTERVAL && before != progress);
                if news {
                    eprintln!("perigee: {id}: {}", left(progress));
                    said = Some((Instant::now(), progress));
                }
            }
        }
    }
    Err(Error::unavailable(format!("{id} ended before it was drained")))
}

fn look(report: &LoadReport) -> Seen {
    match report.drain {
        Some(progress) if progress.done => Seen::Drained,
        Some(progress) => Seen::Left(progress),
        // A node of an older version says no more than this.
        None if report.draining => match report.queued_requests + report.running_sequences {
            0 => Seen::Drained,
            requests => Seen::Left(DrainProgress {
                requests,
                ..DrainProgress::default()
            }),
        },
        None => Seen::Resumed,
    }
}

/// `3 requests and 120 blocks left`.
pub(super) fn left(progress: DrainProgress) -> String {
    let DrainProgress {
        requests,
        blocks,
        done: _,
    } = progress;
    let plural = |count: u64| if count == 1 { "" } else { "s" };
    format!(
        "{requests} request{} and {blocks} block{} left",
        plural(requests),
        plural(blocks)
    )
}

/// Without a decode node nothing is served, so the last one is not drained by mistake.
pub(super) fn check_not_last(node: &NodeStatus, members: &[NodeStatus]) -> Result<(), Error> {
    let serves = |other: &NodeStatus| {
        other.record.role == Role::Decode
            && other.record.model == node.record.model
            && status::state(other) == "ready"
    };
    let others = members.iter().filter(|other| other.record.id != node.record.id);
    if !serves(node) || others.into_iter().any(serves) {
        return Ok(());
    }
    let (id, model) = (&node.record.id, &node.record.model);
    Err(Error::new(
        ErrorCode::Conflict,
        format!(
            "{id} is the last decode node that takes requests for {model}: without it none are served (--force does it all the same)"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::node;
    use super::*;
    use crate::output::golden;

    #[test]
    fn a_drain_says_how_far_it_came() {
        let id = NodeId::new("decode-0");
        golden::check("node-drain", &view(&id, false));
        golden::check("node-drain-wait", &view(&id, true));
    }

    #[test]
    fn the_last_ready_decode_node_of_a_model_is_not_drained() {
        let last = |members: &[NodeStatus]| check_not_last(&members[0], members).map_err(|error| error.code);
        let mut members = [
            node("d0", Role::Decode),
            node("d1", Role::Decode),
            node("p0", Role::Prefill),
        ];
        assert_eq!(last(&members), Ok(()));
        members[1].load = Some(LoadReport {
            draining: true,
            ..LoadReport::default()
        });
        assert_eq!(last(&members), Err(ErrorCode::Conflict), "the other one drains");
        members[1] = node("d1", Role::Decode);
        members[1].connected = false;
        assert_eq!(last(&members), Err(ErrorCode::Conflict), "the other one is lost");
        members[1] = node("d1", Role::Decode);
        members[1].record.model = "other".into();
        assert_eq!(
            last(&members),
            Err(ErrorCode::Conflict),
            "the other one serves another model"
        );
        members[0].load = Some(LoadReport {
            draining: true,
            ..LoadReport::default()
        });
        assert_eq!(last(&members), Ok(()), "it drains already");
        members.swap(0, 2);
        assert_eq!(last(&members), Ok(()), "prompts can be computed on decode nodes");
    }

    #[test]
    fn a_node_is_drained_when_it_says_so_or_an_old_one_when_nothing_runs() {
        let progress = |requests, blocks, done| {
            let drain = DrainProgress {
                requests,
                blocks,
                done,
            };
            LoadReport {
                draining: true,
                drain: Some(drain),
                ..LoadReport::default()
            }
        };
        let old = |draining, running_sequences, queued_requests| LoadReport {
            draining,
            running_sequences,
            queued_requests,
            ..LoadReport::default()
        };
        let seen = |report: LoadReport| match look(&report) {
            Seen::Left(progress) => left(progress),
            seen => format!("{seen:?}"),
        };
        assert_eq!(seen(progress(2, 30, false)), "2 requests and 30 blocks left");
        assert_eq!(
            seen(progress(0, 1, false)),
            "0 requests and 1 block left",
            "nothing runs, but blocks are left"
        );
        assert_eq!(seen(progress(0, 0, true)), "Drained");
        assert_eq!(seen(old(true, 1, 2)), "3 requests and 0 blocks left");
        assert_eq!(seen(old(true, 0, 0)), "Drained");
        assert_eq!(seen(old(false, 0, 0)), "Resumed");
    }
}
