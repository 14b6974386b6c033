//! Requests without a pause, each of which must end as if nothing had happened.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use proto::v1::inference_client::InferenceClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use types::Token;

use crate::cases::Case;
use crate::{PATIENCE, generate};

/// Between two looks at what has ended.
const POLL: Duration = Duration::from_millis(5);

/// Requests a node must have a part in before it counts as used.
const REQUESTS_MIN: usize = 6;

/// What one engine alone answers to each.
///
/// # Panics
///
/// The model cannot be loaded.
pub fn expected(model: &Path, cases: &[Case]) -> Vec<Vec<Token>> {
    let model = engine::Model::load(model, engine::Precision::Fast).expect("load");
    let mut monolith = engine::monolith::Monolith::new(model, 32, 2048, NonZeroUsize::MIN).expect("engine");
    cases
        .iter()
        .map(|case| monolith.generate(&case.prompt, &case.sampling).expect("generate"))
        .collect()
}

/// Requests with their answers, and what came of them.
pub struct Load {
    /// Routers that share nothing. A client goes on to the next one where one takes no connection.
    routers: Vec<String>,
    /// What is asked.
    pub cases: Vec<Case>,
    /// The tokens of each, by one engine alone.
    pub expected: Vec<Vec<Token>>,
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

/// What came of requests.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Requests that ended, all of them well.
    pub ended: usize,
    /// Requests that were placed again, since a node was gone.
    pub placed_again: usize,
    /// Requests that each node had a part in.
    pub by: BTreeMap<String, usize>,
}

impl Seen {
    /// Requests that `node` had a part in.
    pub fn of(&self, node: &str) -> usize {
        self.by.get(node).copied().unwrap_or_default()
    }
}

impl Load {
    /// Requests to the routers at these addresses.
    ///
    /// # Panics
    ///
    /// The model cannot be loaded.
    pub fn new(model: &Path, routers: &[&str], cases: Vec<Case>) -> Arc<Self> {
        let expected = expected(model, &cases);
        Arc::new(Self {
            routers: routers.iter().map(|&router| router.to_owned()).collect(),
            cases,
            expected,
            stop: AtomicBool::new(false),
            seen: Mutex::default(),
        })
    }

    /// So many clients, each with one request at a time. One of them ends before it is told to only where a request failed.
    fn clients(self: &Arc<Self>, clients: usize) -> JoinSet<()> {
        let mut running = JoinSet::new();
        for first in 0..clients {
            let load = Arc::clone(self);
            running.spawn(async move { load.run(first * 5).await });
        }
        running
    }

    /// Does `work` under the load of so many clients.
    ///
    /// # Panics
    ///
    /// A request failed, or had a token that it should not have.
    pub async fn during<T>(self: &Arc<Self>, clients: usize, work: impl Future<Output = T>) -> T {
        let mut running = self.clients(clients);
        let result = tokio::select! {
            result = work => result,
            failed = running.join_next() => panic!("{failed:?}"),
        };
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = running.join_next().await {
            client.expect("every request ended, and every token is right");
        }
        result
    }

    /// Waits until the node had a part in some more requests.
    ///
    /// # Panics
    ///
    /// It is not used for too long.
    pub async fn uses(&self, id: &str) {
        let enough = self.seen().of(id) + REQUESTS_MIN;
        self.until(&format!("{id} is not used"), |seen| seen.of(id) >= enough)
            .await;
    }

    /// Waits until so many more requests have ended.
    ///
    /// # Panics
    ///
    /// None ends for too long.
    pub async fn goes_on(&self, requests: usize) {
        let enough = self.seen().ended + requests;
        self.until("no request ends any more", |seen| seen.ended >= enough)
            .await;
    }

    /// What came of the requests so far.
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no panic")
    }

    async fn until(&self, otherwise: &str, reached: impl Fn(&Seen) -> bool) {
        let start = Instant::now();
        while !reached(&self.seen()) {
            assert!(start.elapsed() < PATIENCE, "{otherwise}: {:?}", self.seen());
            tokio::time::sleep(POLL).await;
        }
    }

    async fn run(&self, first: usize) {
        let mut routers = self.routers.iter().cycle().skip(first);
        let mut client = self.connect(&mut routers).await;
        for index in (0..self.cases.len()).cycle().skip(first) {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let generated = loop {
                match generate(&mut client, self.cases[index].request()).await {
                    // Nothing of the request went out: this is what clients and services mend by themselves.
                    Err(status) if self.routers.len() > 1 && never_sent(&status) => {
                        client = self.connect(&mut routers).await;
                    }
                    ended => break ended,
                }
            };
            let generated = generated.unwrap_or_else(|status| panic!("case {index} failed: {status:?}"));
            assert_eq!(generated.tokens, self.expected[index], "case {index}");
            let report = generated.report();
            let mut seen = self.seen();
            seen.ended += 1;
            seen.placed_again += usize::from(report.placements > 1);
            for node in [&report.prefill_node, &report.decode_node] {
                *seen.by.entry(node.clone()).or_default() += 1;
            }
        }
    }

    async fn connect(&self, routers: &mut impl Iterator<Item = &String>) -> InferenceClient<Channel> {
        let start = Instant::now();
        loop {
            let router = routers.next().expect("they come again and again");
            let channel = Channel::from_shared(router.clone()).expect("url");
            match channel.connect().await {
                Ok(channel) => return InferenceClient::new(channel),
                Err(error) => assert!(start.elapsed() < PATIENCE, "no router takes connections: {error}"),
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Whether the connection was refused, or closed in order before the request was written.
fn never_sent(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error
            .downcast_ref::<hyper::Error>()
            .is_some_and(hyper::Error::is_canceled)
        {
            return true;
        }
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            return error.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        cause = error.source();
    }
    false
}
