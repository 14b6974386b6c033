//! The indexes of dynamo-kv-router: its tree for one thread, and its two concurrent ones with the one thread that applies events.

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use dynamo_kv_router::indexer::{SyncIndexer, WorkerTask};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData,
    LocalBlockHash, OverlapScores, RouterEvent,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};
use tokio::sync::oneshot;

use crate::Subject;
use crate::load::{Chain, Part};

/// Its default.
const JUMP: usize = 32;

pub struct Radix(RadixTree);

pub struct Concurrent<T> {
    index: Arc<T>,
    tasks: flume::Sender<WorkerTask>,
    /// What the thread will read, until it runs.
    waiting: Option<flume::Receiver<WorkerTask>>,
}

pub fn concurrent() -> Concurrent<ConcurrentRadixTreeCompressed> {
    Concurrent::new(ConcurrentRadixTreeCompressed::new())
}

pub fn positional() -> Concurrent<PositionalIndexer> {
    Concurrent::new(PositionalIndexer::new(JUMP))
}

fn event(part: &Part) -> RouterEvent {
    let blocks = part
        .blocks
        .iter()
        .map(|(local, sequence)| KvCacheStoredBlockData {
            block_hash: ExternalSequenceBlockHash(*sequence),
            tokens_hash: *local,
            mm_extra_info: None,
        });
    let data = KvCacheEventData::Stored(KvCacheStoreData {
        parent_hash: part.parent.map(ExternalSequenceBlockHash),
        start_position: None,
        blocks: blocks.collect(),
    });
    let event = KvCacheEvent {
        event_id: 0,
        data,
        dp_rank: 0,
    };
    RouterEvent::new(part.worker as u64, event)
}

fn sum(scores: OverlapScores) -> usize {
    black_box(&scores)
        .scores
        .values()
        .map(|score| *score as usize)
        .sum()
}

impl Radix {
    pub fn new() -> Self {
        Self(RadixTree::new())
    }
}

impl Subject for Radix {
    type Query = Vec<LocalBlockHash>;

    fn query(chain: &Chain) -> Self::Query {
        chain.local.clone()
    }

    fn store(&mut self, parts: &[Part]) -> f64 {
        let events: Vec<_> = parts.iter().map(event).collect();
        let start = Instant::now();
        for event in events {
            self.0.apply_event(event).expect("applied");
        }
        start.elapsed().as_secs_f64()
    }

    fn store_streaming(&mut self, parts: &[Part]) {
        for part in parts {
            self.0.apply_event(event(part)).expect("applied");
        }
    }

    /// It wants the query for itself: a copy is a part of asking.
    fn find(&self, query: &Self::Query) -> usize {
        sum(self.0.find_matches(query.clone(), false))
    }

    fn remove(&mut self, worker: usize) {
        self.0.remove_worker(worker as u64);
    }
}

impl<T: SyncIndexer> Concurrent<T> {
    fn new(index: T) -> Self {
        let (tasks, waiting) = flume::unbounded();
        Self {
            index: Arc::new(index),
            tasks,
            waiting: Some(waiting),
        }
    }

    fn run(&mut self) {
        if let Some(tasks) = self.waiting.take() {
            let index = Arc::clone(&self.index);
            thread::spawn(move || index.worker(tasks, None));
        }
    }

    fn send(&self, task: WorkerTask) {
        assert!(self.tasks.send(task).is_ok(), "its thread ended");
    }
}

impl<T: SyncIndexer> Subject for Concurrent<T> {
    type Query = Vec<LocalBlockHash>;

    fn query(chain: &Chain) -> Self::Query {
        chain.local.clone()
    }

    /// What is stored first waits for the thread, so that sending costs nothing.
    fn store(&mut self, parts: &[Part]) -> f64 {
        let events: Vec<_> = parts.iter().map(event).collect();
        let (resp, done) = oneshot::channel();
        let mut resp = Some(resp);
        let count = events.len();
        let is_first = self.waiting.is_some();
        let mut start = Instant::now();
        for (number, event) in events.into_iter().enumerate() {
            self.send(match (number + 1 == count).then(|| resp.take()).flatten() {
                Some(resp) => WorkerTask::EventWithAck { event, resp },
                None => WorkerTask::Event(event),
            });
        }
        if is_first {
            start = Instant::now();
        }
        self.run();
        assert!(done.blocking_recv().expect("answered"), "not applied");
        start.elapsed().as_secs_f64()
    }

    fn store_streaming(&mut self, parts: &[Part]) {
        self.run();
        for parts in parts.chunks(64) {
            self.store(parts);
        }
    }

    fn find(&self, query: &Self::Query) -> usize {
        sum(self.index.find_matches(query, false))
    }

    fn remove(&mut self, worker: usize) {
        let (resp, done) = oneshot::channel();
        self.send(WorkerTask::RemoveWorker {
            worker_id: worker as u64,
            sweep_tree: true,
            resp,
        });
        done.blocking_recv().expect("answered");
    }
}
