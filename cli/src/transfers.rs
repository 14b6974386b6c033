//! `perigee transfer`: how KV moves between nodes, and how fast.

use std::time::Duration;

use client::{TransferDirection, TransferLink, TransferMeasurement, TransferTest};
use serde_json::{Value, json};
use types::{Error, ErrorCode, NodeRecord};

use crate::arguments::{self, TransferTestArgs};
use crate::nodes::{self, Described};
use crate::output::{self, Columns, Format, Tone, View, Watch, or_dash, paint};
use crate::reach::Router;

/// Prints each ordered pair of nodes that have pools, and what each node could use.
pub(crate) async fn list(watch: Watch, router: &Router, format: Format) -> anyhow::Result<()> {
    watch.show(format, async || look(router).await).await
}

/// Asks every node that has a pool for its transfers.
pub(crate) async fn look(router: &Router) -> anyhow::Result<View> {
    let described = nodes::describe(router, &members(router).await?).await;
    for node in &described {
        if let Err(error) = &node.said {
            eprintln!("perigee: {} does not answer: {error}", node.record.id);
        }
    }
    Ok(list_view(&described))
}

fn list_view(described: &[Described]) -> View {
    View::new(list_json(described), |wide| {
        let movers = mover_table(described);
        let separator = if movers.is_empty() { "" } else { "\n" };
        format!("{}{separator}{movers}", pair_table(described, wide))
    })
}

fn pair_table(described: &[Described], wide: bool) -> String {
    let columns = [
        ("FROM", false),
        ("TO", false),
        ("USES", false),
        ("LANES", false),
        ("CONNECTIONS", false),
        ("WRITTEN", false),
        ("READ", false),
        ("FAILURES", false),
        ("WHY NOT BETTER", false),
        ("ENDPOINT", true),
    ];
    let mut table = Columns::new(wide, &columns);
    for pair in pairs(described) {
        let mut row = vec![pair.from.id.to_string(), pair.to.id.to_string()];
        match pair.link {
            Some(link) => row.extend([
                link.mover.clone(),
                or_dash(&link.lanes.join(",")),
                link.connections.to_string(),
                output::bytes(link.written_bytes),
                output::bytes(link.read_bytes),
                link.failures.to_string(),
                or_dash(&link.obstacle),
            ]),
            None => row.extend((0..7).map(|_| "-".to_owned())),
        }
        row.push(pair.to.transfer_endpoint.clone());
        table.row(row);
    }
    table.text()
}

/// Nothing where no node says what it could use.
fn mover_table(described: &[Described]) -> String {
    let mut table = output::table(&["NODE", "CAN USE", "WITH"]);
    for node in described {
        for mover in node.said.iter().flat_map(|said| &said.movers) {
            let name = match mover.usable {
                true => paint(Tone::Good, &mover.name),
                false => paint(Tone::Warning, &format!("not {}", mover.name)),
            };
            table.add_row([node.record.id.to_string(), name, or_dash(&mover.detail)]);
        }
    }
    match table.is_empty() {
        true => String::new(),
        false => output::table_text(&table),
    }
}

/// Measures between two nodes and prints one row per size and direction.
pub(crate) async fn test(arguments: TransferTestArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let members = members(router).await?;
    let (from, to) = (find(&members, &arguments.from)?, find(&members, &arguments.to)?);
    let duration: Duration = arguments.duration.into();
    if duration.is_zero() || arguments.bytes.0 == 0 {
        return Err(Error::invalid("duration", "--duration and --bytes must be more than 0").into());
    }
    let test = TransferTest {
        peer_grpc_endpoint: to.grpc_endpoint.clone(),
        bytes_max: arguments.bytes.0,
        duration,
        direction: match arguments.direction {
            arguments::TransferDirection::Both => TransferDirection::Unspecified,
            arguments::TransferDirection::Write => TransferDirection::Write,
            arguments::TransferDirection::Read => TransferDirection::Read,
        },
    };
    let mut stream = nodes::transfer(router, from)?.test(&test).await?;
    let bar = output::step_bar(&format!("{} -> {}", from.id, to.id));
    let mut measured: Vec<TransferMeasurement> = Vec::new();
    while let Some(measurement) = stream.next().await? {
        bar.set_length(measurement.steps.into());
        bar.set_position(measurement.step.into());
        measured.push(measurement);
    }
    bar.finish_and_clear();
    let Some(last) = measured.last() else {
        let message = format!(
            "neither a block of {} nor of {} could be borrowed",
            from.id, to.id
        );
        return Err(Error::new(ErrorCode::Overloaded, message).into());
    };
    let complete = last.step == last.steps;
    format.print(&test_view(from, to, complete, &measured))?;
    if !complete {
        eprintln!(
            "perigee: larger transfers were left out: the pools lend no more than an eighth of their blocks"
        );
    }
    Ok(())
}

fn test_view(from: &NodeRecord, to: &NodeRecord, complete: bool, measured: &[TransferMeasurement]) -> View {
    let document = json!({
        "from": from.id,
        "to": to.id,
        "complete": complete,
        "measurements": measured.iter().map(measurement_json).collect::<Vec<_>>(),
    });
    View::new(document, |_| {
        let mut table = output::table(&["SIZE", "DIRECTION", "VIA", "BANDWIDTH", "P50", "P99", "TRANSFERS"]);
        for measurement in measured {
            table.add_row([
                output::bytes(measurement.bytes),
                direction(measurement).to_owned(),
                measurement.mover.clone(),
                format!("{}/s", output::bytes(measurement.bytes_per_second as u64)),
                micros(measurement.latency_p50_us),
                micros(measurement.latency_p99_us),
                measurement.transfers.to_string(),
            ]);
        }
        let table = output::table_text(&table);
        format!("{table}all bytes verified between {} and {}\n", from.id, to.id)
    })
}

/// Two nodes, one way.
struct Pair<'a> {
    from: &'a NodeRecord,
    to: &'a NodeRecord,
    /// `None` where nothing was moved between them yet, or `from` does not answer.
    link: Option<&'a TransferLink>,
}

fn pairs(described: &[Described]) -> Vec<Pair<'_>> {
    let others = |from: usize| described.iter().enumerate().filter(move |(to, _)| *to != from);
    let ordered = described.iter().enumerate().flat_map(|(index, from)| {
        others(index).map(move |(_, to)| {
            let links = from.said.as_ref().map_or(&[][..], |said| &said.links);
            Pair {
                from: &from.record,
                to: &to.record,
                link: links
                    .iter()
                    .find(|link| link.endpoint == to.record.transfer_endpoint),
            }
        })
    });
    ordered.collect()
}

fn list_json(described: &[Described]) -> Value {
    let pairs = pairs(described).into_iter().map(|pair| {
        let link = pair.link.map(|link| {
            json!({
                "uses": link.mover,
                "lanes": link.lanes,
                "obstacle": link.obstacle,
                "connections": link.connections,
                "written_bytes": link.written_bytes,
                "read_bytes": link.read_bytes,
                "failures": link.failures,
            })
        });
        json!({ "from": pair.from.id, "to": pair.to.id, "link": link })
    });
    let nodes = described.iter().map(|node| {
        let said = node.said.as_ref().ok();
        let movers = said.map(|said| {
            let movers = said.movers.iter();
            let movers = movers
                .map(|mover| json!({ "name": mover.name, "usable": mover.usable, "detail": mover.detail }));
            movers.collect::<Vec<_>>()
        });
        json!({
            "id": node.record.id,
            "endpoint": node.record.transfer_endpoint,
            "movers": movers,
            "host": said.map(|said| &said.host),
            "error": node.said.as_ref().err().map(ToString::to_string),
        })
    });
    json!({ "pairs": pairs.collect::<Vec<_>>(), "nodes": nodes.collect::<Vec<_>>() })
}

fn measurement_json(measurement: &TransferMeasurement) -> Value {
    json!({
        "bytes": measurement.bytes,
        "direction": direction(measurement),
        "uses": measurement.mover,
        "transfers": measurement.transfers,
        "bytes_per_second": measurement.bytes_per_second,
        "latency_p50_us": measurement.latency_p50_us,
        "latency_p99_us": measurement.latency_p99_us,
    })
}

fn direction(measurement: &TransferMeasurement) -> &'static str {
    match measurement.direction() {
        TransferDirection::Write => "write",
        TransferDirection::Read => "read",
        TransferDirection::Unspecified => "-",
    }
}

async fn members(router: &Router) -> anyhow::Result<Vec<NodeRecord>> {
    let status = router.inference()?.cluster_status().await?;
    let records = status.nodes.into_iter().map(|node| node.record);
    Ok(records.collect())
}

fn find<'a>(members: &'a [NodeRecord], id: &str) -> Result<&'a NodeRecord, Error> {
    let mut with_pools = members.iter().filter(|record| nodes::has_pool(record));
    with_pools
        .clone()
        .find(|record| record.id.as_str() == id)
        .ok_or_else(|| {
            let known: Vec<&str> = with_pools.by_ref().map(|record| record.id.as_str()).collect();
            Error::new(
                ErrorCode::NotFound,
                format!(
                    "no node with a pool is named {id}; there are: {}",
                    known.join(", ")
                ),
            )
        })
}

fn micros(value: f64) -> String {
    match value {
        value if value < 1e3 => format!("{value:.0} µs"),
        value if value < 1e6 => format!("{:.1} ms", value / 1e3),
        value => format!("{:.1} s", value / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use client::TransferDescription;
    use types::{Epoch, HostFacts, NodeId, Role};

    use super::*;
    use crate::output::golden;

    fn described(id: &str, links: &[&str]) -> Described {
        let record = NodeRecord {
            id: NodeId::new(id),
            epoch: Epoch(1),
            role: Role::Store,
            grpc_endpoint: format!("{id}:1"),
            http_endpoint: format!("{id}:2"),
            transfer_endpoint: format!("tcp://{id}:3"),
            model: "tiny".into(),
            kv_space: None,
            capacity_blocks: 1,
            context_tokens_max: 0,
        };
        let links = links.iter().map(|to| TransferLink {
            endpoint: format!("tcp://{to}:3"),
            mover: "tcp".into(),
            ..TransferLink::default()
        });
        let said = TransferDescription {
            endpoint: record.transfer_endpoint.clone(),
            movers: vec![client::TransferMover {
                name: "ucx".into(),
                usable: id == "a",
                detail: "UCX 1.13.1".into(),
            }],
            links: links.collect(),
            host: HostFacts::default(),
        };
        Described {
            record,
            said: Ok(said),
        }
    }

    #[test]
    fn every_ordered_pair_is_a_row_with_the_link_of_its_sender() {
        let mut silent = described("c", &[]);
        silent.said = Err(Error::unavailable("gone"));
        let nodes = [described("a", &["b", "x"]), described("b", &[]), silent];
        let rows: Vec<(String, bool)> = pairs(&nodes)
            .iter()
            .map(|pair| (format!("{}{}", pair.from.id, pair.to.id), pair.link.is_some()))
            .collect();
        let expected = [
            ("ab", true),
            ("ac", false),
            ("ba", false),
            ("bc", false),
            ("ca", false),
            ("cb", false),
        ];
        assert_eq!(rows, expected.map(|(pair, linked)| (pair.to_owned(), linked)));
        golden::check("transfer-list", &list_view(&nodes));
        let json = list_json(&nodes);
        assert_eq!(json["pairs"][0]["link"]["uses"], "tcp");
        assert_eq!(json["pairs"][1]["link"], Value::Null);
        assert_eq!(json["nodes"][2]["movers"], Value::Null);
        assert!(json["nodes"][2]["error"].as_str().expect("text").contains("gone"));
    }

    #[test]
    fn a_measurement_is_a_row_with_its_units() {
        let measured = [TransferMeasurement {
            bytes: 4096,
            direction: TransferDirection::Write.into(),
            mover: "tcp".into(),
            transfers: 1200,
            bytes_per_second: 1.5e9,
            latency_p50_us: 35.0,
            latency_p99_us: 1250.0,
            ..TransferMeasurement::default()
        }];
        let (from, to) = (described("a", &[]).record, described("b", &[]).record);
        golden::check("transfer-test", &test_view(&from, &to, true, &measured));
    }

    #[test]
    fn an_unknown_node_is_answered_with_those_there_are() {
        let members = [described("a", &[]).record, described("b", &[]).record];
        assert_eq!(find(&members, "b").expect("there").id.as_str(), "b");
        let error = find(&members, "d").expect_err("not there");
        assert_eq!(
            (error.code, error.message.ends_with("there are: a, b")),
            (ErrorCode::NotFound, true)
        );
    }
}
