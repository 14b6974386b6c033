//! The threads that wait for a disk.
//!
//! Invariant: what a job uses (slots, blocks of the pool) is owned by the job until the system call has returned, also where
//! nobody waits for it any more; so memory is never used otherwise while a late byte can arrive.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of threads with a bounded queue. They end when it is dropped, after the jobs that they have.
#[derive(Debug)]
pub(super) struct Workers {
    jobs: mpsc::SyncSender<Job>,
}

impl Workers {
    /// Starts `threads` threads, for at most `queue_max` jobs that wait or run.
    pub(super) fn start(threads: usize, queue_max: usize) -> io::Result<Self> {
        let (jobs, queue) = mpsc::sync_channel::<Job>(queue_max.max(1));
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads.max(1) {
            let queue = queue.clone();
            let thread = thread::Builder::new().name("kv-disk".to_owned());
            thread.spawn(move || {
                loop {
                    // Waiting in turn: the one that holds the lock is the next to work.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else {
                        return;
                    };
                    job();
                }
            })?;
        }
        Ok(Self { jobs })
    }

    /// Queues a job. `false`, and the job is dropped, where the queue is full: callers hold permits, so it is not.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.jobs.try_send(Box::new(job)).is_ok()
    }
}
