//! What the transport counts: `perigee_transfer_…`, read from it when the page is.

use std::fmt;
use std::sync::{Arc, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use transfer::{StatsSnapshot, Transport};
use types::ErrorCode;

const BYTES: &str = "perigee_transfer_bytes";
const BATCHES: &str = "perigee_transfer_batches";
const FAILURES: &str = "perigee_transfer_failures";
const REFUSALS: &str = "perigee_transfer_refusals";
const IN_FLIGHT: &str = "perigee_transfers_in_flight";
const OPENED: &str = "perigee_transfer_connections_opened";
const ACCEPTED: &str = "perigee_transfer_connections_accepted";
const REJECTED: &str = "perigee_transfer_connections_rejected";
const SERVED: &str = "perigee_transfer_connections_served";
const VIOLATIONS: &str = "perigee_transfer_protocol_violations";

/// Shows the transport's counts on the page, for as long as it lives.
pub(crate) fn register(metrics: &node::Metrics, transport: &Arc<dyn Transport>) {
    let names = [
        BYTES, BATCHES, FAILURES, REFUSALS, IN_FLIGHT, OPENED, ACCEPTED, REJECTED, SERVED, VIOLATIONS,
    ];
    let transport = Arc::downgrade(transport);
    metrics.collect(&names, Box::new(Transfers { transport }));
}

/// Weak: metrics outlive what they count, and must not keep a transport from closing.
struct Transfers {
    transport: Weak<dyn Transport>,
}

impl fmt::Debug for Transfers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transfers")
    }
}

impl Collector for Transfers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(transport) = self.transport.upgrade() else {
            return Ok(());
        };
        encode(&mut encoder, transport.name(), &transport.stats())
    }
}

/// `base` is the transport that moves what UCX does not.
fn encode(encoder: &mut DescriptorEncoder<'_>, base: &'static str, stats: &StatsSnapshot) -> fmt::Result {
    let directions = [
        ("written", stats.written_bytes, stats.ucx_written_bytes),
        ("read", stats.read_bytes, stats.ucx_read_bytes),
        ("received", stats.received_bytes, stats.ucx_received_bytes),
        ("served", stats.served_bytes, stats.ucx_served_bytes),
    ];
    // Counters are read one by one, so that a part may be ahead of its whole for a moment.
    let rows = directions.iter().flat_map(|(direction, all, ucx)| {
        let row = move |transport, bytes| ([("transport", transport), ("direction", *direction)], bytes);
        [row(base, all.saturating_sub(*ucx)), row("ucx", *ucx)]
    });
    counters(
        encoder,
        BYTES,
        "Bytes of transfers, by what moved them and which way",
        rows,
    )?;
    let rows = [
        (
            [("transport", base)],
            stats.batches.saturating_sub(stats.ucx_batches),
        ),
        ([("transport", "ucx")], stats.ucx_batches),
    ];
    counters(
        encoder,
        BATCHES,
        "Transfers that this node began and that succeeded",
        rows.into_iter(),
    )?;
    let rows = ErrorCode::ALL.map(|code| ([("code", code.as_str())], stats.batch_errors_of(code)));
    counters(
        encoder,
        FAILURES,
        "Transfers that this node began and that failed",
        rows.into_iter(),
    )?;
    let rows = ErrorCode::ALL.map(|code| ([("code", code.as_str())], stats.serve_errors_of(code)));
    counters(
        encoder,
        REFUSALS,
        "Peers' requests that were refused or broke off",
        rows.into_iter(),
    )?;
    gauge(
        encoder,
        IN_FLIGHT,
        "Transfers in progress",
        stats.batches_in_flight,
    )?;
    for (name, help, value) in [
        (OPENED, "Connections opened to peers", stats.connections_opened),
        (
            ACCEPTED,
            "Connections accepted from peers",
            stats.connections_accepted,
        ),
        (
            REJECTED,
            "Connections closed at once because there were too many",
            stats.connections_rejected,
        ),
        (
            VIOLATIONS,
            "Connections closed because of what came over them",
            stats.protocol_violations,
        ),
    ] {
        let counter = ConstCounter::new(value);
        counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
    }
    gauge(
        encoder,
        SERVED,
        "Connections from peers that are open",
        stats.connections_served,
    )
}

fn counters<const LABELS: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl Iterator<Item = ([(&'static str, &'static str); LABELS], u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in rows {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

#[cfg(test)]
mod tests {
    use transfer::MemNetwork;
    use transfer::mem::Faults;
    use types::Epoch;

    use super::*;

    /// Shows a fixed snapshot.
    #[derive(Debug)]
    struct Fixed(StatsSnapshot);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            encode(&mut encoder, "tcp", &self.0)
        }
    }

    #[test]
    fn what_ucx_moved_is_told_apart() {
        let mut stats = StatsSnapshot {
            written_bytes: 100,
            ucx_written_bytes: 60,
            served_bytes: 7,
            batches: 3,
            ucx_batches: 2,
            batches_in_flight: 4,
            connections_opened: 5,
            connections_served: 6,
            ..StatsSnapshot::default()
        };
        stats.batch_errors[ErrorCode::ALL
            .iter()
            .position(|code| *code == ErrorCode::Timeout)
            .unwrap()] = 9;
        let page = node::Metrics::new();
        page.collect(&[BYTES], Box::new(Fixed(stats)));
        let text = page.encode();
        for line in [
            "perigee_transfer_bytes_total{transport=\"tcp\",direction=\"written\"} 40",
            "perigee_transfer_bytes_total{transport=\"ucx\",direction=\"written\"} 60",
            "perigee_transfer_bytes_total{transport=\"tcp\",direction=\"served\"} 7",
            "perigee_transfer_batches_total{transport=\"tcp\"} 1",
            "perigee_transfer_batches_total{transport=\"ucx\"} 2",
            "perigee_transfer_failures_total{code=\"timeout\"} 9",
            "perigee_transfer_failures_total{code=\"corrupt\"} 0",
            "perigee_transfers_in_flight 4",
            "perigee_transfer_connections_opened_total 5",
            "perigee_transfer_connections_served 6",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is missing in\n{text}"
            );
        }
    }

    #[test]
    fn metrics_do_not_keep_a_transport_alive() {
        let network = MemNetwork::new(0, Faults::default());
        let transport: Arc<dyn Transport> = network.join("a", Epoch(1));
        let page = node::Metrics::new();
        register(&page, &transport);
        assert!(
            page.encode()
                .contains("perigee_transfer_bytes_total{transport=\"mem\"")
        );
        let watch = Arc::downgrade(&transport);
        drop((transport, network));
        assert!(watch.upgrade().is_none());
        assert!(!page.encode().contains("perigee_transfer"));
    }
}
