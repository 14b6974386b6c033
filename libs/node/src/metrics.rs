//! The process's metrics, in the Prometheus text format.
//!
//! Names are `perigee_<role>_…`, end in their unit (`_seconds`, `_bytes`), and are listed in `docs/metrics.md`. Labels take
//! values from closed sets only: never a request, a tenant or a text.

use std::any::{Any, TypeId};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// Upper bounds for waits that a person feels, such as the time to the first token. Close to what vLLM uses, so
/// that dashboards can be compared.
pub const LATENCY_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0,
];

/// Upper bounds for single steps: an engine step, a gap between tokens, an RPC in the cluster.
pub const STEP_SECONDS: &[f64] = &[
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
];

/// The set of metrics of one process. Clones share it.
#[derive(Clone, Default)]
pub struct Metrics {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    registry: Registry,
    names: BTreeSet<String>,
    /// What [`Metrics::once`] has registered.
    groups: HashMap<TypeId, Box<dyn Any + Send>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("names", &self.names()).finish()
    }
}

impl Metrics {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `metric` under `name` and gives it back, to be kept by whoever measures. The format itself appends
    /// `_total` to a counter's name and a full stop to `help`.
    ///
    /// # Panics
    ///
    /// If the name is taken: two metrics of one name would make the whole page unreadable to Prometheus.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        let mut shared = self.lock();
        assert!(
            shared.names.insert(name.to_owned()),
            "metric {name} is registered twice"
        );
        shared.registry.register(name, help, metric.clone());
        metric
    }

    /// The group of metrics that `register` adds, or those of an earlier call: a service that starts again in the same process counts
    /// on, since a counter that falls is read as a restart.
    pub fn once<T: Clone + Send + 'static>(&self, register: impl FnOnce(&Self) -> T) -> T {
        let id = TypeId::of::<T>();
        let known = |shared: &Shared| {
            shared
                .groups
                .get(&id)
                .and_then(|group| group.downcast_ref::<T>().cloned())
        };
        if let Some(group) = known(&self.lock()) {
            return group;
        }
        let group = register(self);
        self.lock().groups.insert(id, Box::new(group.clone()));
        group
    }

    /// Adds a histogram with the upper bounds `buckets`, such as [`LATENCY_SECONDS`].
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(name, help, Histogram::new(buckets.iter().copied()))
    }

    /// Adds metrics that are counted elsewhere: `collector` is asked for them whenever the page is read, so it must
    /// neither block nor wait. `names` are those it shows.
    ///
    /// # Panics
    ///
    /// As [`Metrics::register`].
    pub fn collect(&self, names: &[&str], collector: Box<dyn Collector>) {
        let mut shared = self.lock();
        for name in names {
            assert!(
                shared.names.insert((*name).to_owned()),
                "metric {name} is registered twice"
            );
        }
        shared.registry.register_collector(collector);
    }

    /// The names that were registered, in order.
    pub fn names(&self) -> Vec<String> {
        let shared = self.lock();
        shared.names.iter().cloned().collect()
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let shared = self.lock();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &shared.registry)
            .expect("writing to a string cannot fail");
        text
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn a_group_that_is_asked_for_again_counts_on() {
        #[derive(Clone)]
        struct Group(Counter<u64>);
        let metrics = Metrics::new();
        let group = || {
            metrics
                .once(|metrics| Group(metrics.register("perigee_decode_steps", "Steps", Counter::default())))
        };
        group().0.inc_by(2);
        group().0.inc_by(3);
        assert_eq!(group().0.get(), 5);
        assert_eq!(metrics.names(), ["perigee_decode_steps"]);
    }

    #[test]
    fn what_is_measured_is_shown() {
        let metrics = Metrics::new();
        let tokens = metrics.register(
            "perigee_decode_tokens",
            "Tokens generated",
            Counter::<u64>::default(),
        );
        let step = metrics.histogram("perigee_decode_step_seconds", "One step", STEP_SECONDS);
        tokens.inc_by(7);
        step.observe(0.0125);
        let text = metrics.clone().encode();
        assert!(text.contains("perigee_decode_tokens_total 7\n"), "{text}");
        assert!(
            text.contains("perigee_decode_step_seconds_bucket{le=\"0.01\"} 0\n"),
            "{text}"
        );
        assert!(
            text.contains("perigee_decode_step_seconds_bucket{le=\"0.015\"} 1\n"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    #[should_panic(expected = "registered twice")]
    fn a_name_is_taken_once() {
        let metrics = Metrics::new();
        metrics.register("perigee_x", "X", Counter::<u64>::default());
        metrics.register("perigee_x", "X", Counter::<u64>::default());
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [LATENCY_SECONDS, STEP_SECONDS] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
