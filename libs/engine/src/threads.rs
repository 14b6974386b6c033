//! A small pool of threads for jobs that last microseconds.
//!
//! A job is a number of items, which the calling thread and the workers take one by one. The caller returns when every item
//! is done, and so waits only for workers that took one: where cores are contended, a worker that the system does
//! not run costs nothing but its help.
//!
//! Invariant: a worker looks at a job only after it took one of its items, and the caller does not return before all taken items
//! are done. So what a job borrows outlives every look at it. Whoever waits spins for some microseconds, then sleeps.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Threads that one pool may have.
pub(crate) const THREADS_MAX: usize = 256;

/// Longest spin. A sleep and a wake-up cost about as much.
const SPIN_MAX: Duration = Duration::from_micros(20);

/// Shortest spin, to which workers fall back that keep spinning in vain.
const SPIN_MIN: Duration = Duration::from_micros(1);

/// Looks at the clock are that many spins apart.
const SPINS_PER_CLOCK: u32 = 16;

/// An item of a job panicked. What the job was writing is in an unknown state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a kernel panicked: {0}")]
pub struct JobPanicked(pub String);

/// `(worker, item)`; workers are numbered from 0, the caller is the last.
type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// Threads that help the one that owns them.
pub(crate) struct Threads {
    shared: Arc<State>,
    workers: Vec<JoinHandle<()>>,
}

struct State {
    /// Number of the job in the upper, items not yet taken in the lower half. A worker takes an item by decreasing it,
    /// which fails if the job has changed.
    ticket: AtomicU64,
    /// The current job; set while no item can be taken.
    job: UnsafeCell<Option<*const Job<'static>>>,
    /// Items done.
    done: AtomicUsize,
    /// What the first item that panicked said.
    panicked: Mutex<Option<String>>,
    stopping: AtomicBool,
    /// Workers asleep, or about to be.
    sleepers: AtomicUsize,
    /// The caller is asleep, or about to be.
    caller_sleeps: AtomicBool,
    lock: Mutex<()>,
    wake_workers: Condvar,
    wake_caller: Condvar,
}

// SAFETY: `job` is written only by the caller while no item can be taken, and read only by those who took one; the
// ticket orders these accesses. The job itself is `Sync`.
unsafe impl Sync for State {}
// SAFETY: as above.
unsafe impl Send for State {}

impl Threads {
    /// Starts `threads - 1` workers.
    pub(crate) fn start(threads: NonZeroUsize) -> std::io::Result<Self> {
        let shared = Arc::new(State {
            ticket: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            done: AtomicUsize::new(0),
            panicked: Mutex::new(None),
            stopping: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake_workers: Condvar::new(),
            wake_caller: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::new(),
        };
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = threads.get().min(THREADS_MAX);
        let spin = if threads > cores { SPIN_MIN } else { SPIN_MAX };
        for index in 0..threads - 1 {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new().name(format!("engine-{index}"));
            pool.workers.push(worker.spawn(move || shared.work(index, spin))?);
        }
        Ok(pool)
    }

    /// Threads that take part in a job, the caller among them.
    pub(crate) fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(worker, item)` for every item below `items`; no two calls at once have the same `worker`.
    pub(crate) fn run(&mut self, items: usize, job: &Job<'_>) -> Result<(), JobPanicked> {
        let caller = self.workers.len();
        if items <= 1 || caller == 0 {
            return catch(|| (0..items).for_each(|item| job(caller, item)));
        }
        let items = u32::try_from(items).expect("a job has fewer than 2^32 items");
        self.shared.publish(job, items);
        while let Some(item) = self.shared.take() {
            self.shared.carry_out(caller, item);
        }
        self.shared.wait(items as usize);
        match lock(&self.shared.panicked).take() {
            None => Ok(()),
            Some(message) => Err(JobPanicked(message)),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stopping.store(true, SeqCst);
        drop(lock(&self.shared.lock));
        self.shared.wake_workers.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches what its items throw, so it cannot have panicked.
            let _ = worker.join();
        }
    }
}

impl State {
    fn publish(&self, job: &Job<'_>, items: u32) {
        // SAFETY: only the lifetime changes. `Threads::run` returns after all items are done, and nobody follows the pointer
        // without having taken one.
        let job: *const Job<'static> = unsafe { std::mem::transmute::<&Job<'_>, &Job<'static>>(job) };
        // SAFETY: no item can be taken now, so no worker reads the cell.
        unsafe { *self.job.get() = Some(job) };
        self.done.store(0, SeqCst);
        let number = (self.ticket.load(SeqCst) >> 32).wrapping_add(1);
        self.ticket.store((number << 32) | u64::from(items), SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            // Taking the lock orders this after a worker's last look at the ticket.
            drop(lock(&self.lock));
            self.wake_workers.notify_all();
        }
    }

    /// Takes an item of the current job, if one is left.
    fn take(&self) -> Option<usize> {
        let mut ticket = self.ticket.load(SeqCst);
        loop {
            let left = ticket as u32;
            if left == 0 {
                return None;
            }
            match self
                .ticket
                .compare_exchange_weak(ticket, ticket - 1, SeqCst, SeqCst)
            {
                Ok(_) => return Some(left as usize - 1),
                Err(current) => ticket = current,
            }
        }
    }

    /// Runs an item that was taken.
    fn carry_out(&self, worker: usize, item: usize) {
        // SAFETY: the item is taken and not done, so the caller is still in `run` and its job is alive; the cell is not
        // written before all items are done.
        let job = unsafe { (*self.job.get()).map(|job| &*job) };
        let job = job.expect("an item exists only while a job is set");
        if let Err(JobPanicked(message)) = catch(|| job(worker, item)) {
            lock(&self.panicked).get_or_insert(message);
        }
        self.done.fetch_add(1, SeqCst);
        if self.caller_sleeps.load(SeqCst) {
            drop(lock(&self.lock));
            self.wake_caller.notify_one();
        }
    }

    /// Waits until `items` items are done.
    fn wait(&self, items: usize) {
        if spin(SPIN_MAX, || self.done.load(SeqCst) == items) {
            return;
        }
        let mut guard = lock(&self.lock);
        self.caller_sleeps.store(true, SeqCst);
        while self.done.load(SeqCst) != items {
            guard = self
                .wake_caller
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, SeqCst);
    }

    /// A worker's life.
    fn work(&self, worker: usize, spin_max: Duration) {
        let mut budget = spin_max;
        let idle = || self.ticket.load(SeqCst) as u32 == 0 && !self.stopping.load(SeqCst);
        while !self.stopping.load(SeqCst) {
            while let Some(item) = self.take() {
                self.carry_out(worker, item);
            }
            if spin(budget, || !idle()) {
                budget = (budget * 2).min(spin_max);
                continue;
            }
            budget = (budget / 2).max(SPIN_MIN);
            let mut guard = lock(&self.lock);
            self.sleepers.fetch_add(1, SeqCst);
            while idle() {
                guard = self
                    .wake_workers
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, SeqCst);
        }
    }
}

/// The data behind these locks is valid at every moment, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spins for at most `budget`; whether `ready` came true.
fn spin(budget: Duration, ready: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..SPINS_PER_CLOCK {
            if ready() {
                return true;
            }
            hint::spin_loop();
        }
        if start.elapsed() >= budget {
            return false;
        }
    }
}

fn catch(run: impl FnOnce()) -> Result<(), JobPanicked> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| JobPanicked(message_of(payload.as_ref())))
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests;
