//! The thread that drives UCX: it alone calls the library, everybody else sends it commands.
//!
//! Invariant: a handle of UCX never leaves this thread, so the library runs in its single-threaded mode, and a busy
//! runtime cannot hold up transfers. What a get writes to stays as it is until the get has ended: its `held` is dropped
//! then, and not before.
//!
//! The thread spins for [`super::Config::spin`] after the last event, then arms the workers' event descriptors and sleeps
//! on them and on the queue's. An endless spin would take a core from the engine; no spin would put a wake-up (30 to 150 µs
//! on virtual machines) before each of the calls that follow one another. Shared memory does not pass through here at
//! all: whoever wants bytes copies them.
//!
//! Elsewhere: the calls themselves (`worker.rs`), what is asked for (`ucx.rs`).

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, RwLock, RwLockReadGuard, TryLockError, mpsc,
};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::UcxError;
use super::domain::Way;
use super::worker::Worker;

/// Commands that wait. Transfers beyond it are refused, and go over TCP.
const COMMANDS_MAX: usize = 4096;
/// An endpoint's death is noticed by events; this is for what has none.
const SLEEP_MAX: Duration = Duration::from_millis(500);
/// How long the end of the transport waits for the library to let go.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the library is asked to make progress before commands are looked at again.
const PROGRESS_ROUNDS_MAX: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct MemoryId(pub(super) u64);
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct EndpointId(pub(super) u64);
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct WindowId(pub(super) u64);

/// Memory known to UCX.
#[derive(Debug, Clone)]
pub(super) struct Mapped {
    pub(super) id: MemoryId,
    /// Exposed address of the first byte.
    pub(super) base: usize,
    /// What a peer on this host needs to map it; empty if none can.
    pub(super) shared_key: Vec<u8>,
    /// What a peer needs to reach it over a network; empty if none can.
    pub(super) network_key: Vec<u8>,
}

/// Where peers' workers find those of this process. Empty where there is none.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Addresses {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) shared: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) network: Vec<u8>,
}

/// An endpoint whose lanes are set up.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) endpoint: EndpointId,
    pub(super) lanes: Vec<String>,
    /// False once the endpoint failed or was closed.
    pub(super) alive: Arc<AtomicBool>,
}

/// Remote memory that can be read.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) window: WindowId,
    /// Exposed address of the first byte, where the memory is mapped into this process.
    pub(super) mapped_at: Option<usize>,
}

/// Bytes of one get. Addresses are exposed ones: local in this process, remote in the peer's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) local: usize,
    pub(crate) remote: u64,
    pub(crate) bytes: usize,
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, UcxError>>;
/// For calls that do not wait on the network, and may be made outside of a runtime.
pub(super) type PromptReply<T> = mpsc::SyncSender<Result<T, UcxError>>;

pub(super) enum Command {
    Allocate {
        bytes: usize,
        reply: PromptReply<Mapped>,
    },
    Register {
        base: usize,
        bytes: usize,
        device: bool,
        reply: PromptReply<Mapped>,
    },
    Unmap {
        memory: MemoryId,
    },
    Connect {
        way: Way,
        address: Vec<u8>,
        reply: Reply<Connected>,
    },
    Close {
        endpoint: EndpointId,
    },
    Open {
        endpoint: EndpointId,
        packed_key: Vec<u8>,
        base: u64,
        reply: Reply<Opened>,
    },
    Forget {
        window: WindowId,
    },
    Get {
        window: WindowId,
        runs: Vec<Run>,
        device: bool,
        held: Box<dyn Any + Send>,
        reply: Reply<()>,
    },
    Stop,
}

impl Command {
    /// Whether it gives something back, which must not fail for want of room.
    fn releases(&self) -> bool {
        matches!(
            self,
            Self::Unmap { .. } | Self::Close { .. } | Self::Forget { .. } | Self::Stop
        )
    }
}

/// Held for reading by whoever is inside of the library. When the process exits, the library's own destructors run while
/// threads still do, and end in an assertion if one of them is inside; so the exit takes this for good before them.
static INSIDE: RwLock<()> = RwLock::new(());
/// How long the exit waits for threads to come out.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs before the destructors of libraries, since it is registered after they were loaded.
extern "C" fn at_exit() {
    let deadline = Instant::now() + EXIT_TIMEOUT;
    while Instant::now() < deadline {
        match INSIDE.try_write() {
            Ok(guard) => return std::mem::forget(guard),
            Err(TryLockError::Poisoned(poisoned)) => return std::mem::forget(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
}

/// Keeps the process from exiting, for a bounded time.
fn inside() -> RwLockReadGuard<'static, ()> {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // SAFETY: a function of this binary, which is never unloaded.
        let registered = unsafe { libc::atexit(at_exit) };
        if registered != 0 {
            tracing::warn!("the end of the process cannot wait for ucx");
        }
    });
    INSIDE.read().unwrap_or_else(PoisonError::into_inner)
}

/// The other threads' side of the driver. Dropping the last one ends the thread.
pub(super) struct Handle {
    queue: Arc<Queue>,
}

struct Queue {
    commands: Mutex<VecDeque<Command>>,
    /// Set by the driver before it looks at `commands` for the last time.
    sleeping: AtomicBool,
    bell: Bell,
    stopped: Mutex<bool>,
    stopped_now: Condvar,
}

impl Handle {
    /// Starts the thread. `make` opens the library there; its result, or why it failed, is returned.
    pub(super) fn start<T: Send + 'static>(
        make: impl FnOnce() -> Result<(Worker, T), UcxError> + Send + 'static,
        spin: Duration,
    ) -> Result<(Arc<Self>, T), UcxError> {
        let queue = Arc::new(Queue {
            commands: Mutex::default(),
            sleeping: AtomicBool::new(false),
            bell: Bell::new().map_err(|error| UcxError::new(format!("no event descriptor: {error}")))?,
            stopped: Mutex::new(false),
            stopped_now: Condvar::new(),
        });
        let (made_tx, made_rx) = mpsc::sync_channel(1);
        let of_thread = queue.clone();
        let thread = std::thread::Builder::new().name("ucx".to_owned());
        let make = || {
            let _within = inside();
            make()
        };
        let spawned = thread.spawn(move || match make() {
            Ok((worker, made)) => {
                if made_tx.send(Ok(made)).is_ok() {
                    drive(worker, &of_thread, spin);
                }
                of_thread.mark_stopped();
            }
            Err(error) => {
                // Whoever waited is gone only if the whole process ends.
                let _ = made_tx.send(Err(error));
            }
        });
        spawned.map_err(|error| UcxError::new(format!("no thread: {error}")))?;
        let made = made_rx
            .recv()
            .map_err(|_| UcxError::new("the library's thread ended".to_owned()))??;
        Ok((Arc::new(Self { queue }), made))
    }

    /// Hands a command over. The error is that too many wait, or the driver has stopped; the command's reply is dropped.
    pub(super) fn send(&self, command: Command) -> Result<(), UcxError> {
        self.queue.push(command)
    }

    /// Closes all endpoints and takes no new ones. Returns when nothing moves any more, or after a bounded time.
    /// Memory stays mapped for as long as its owners live.
    pub(super) fn stop(&self) {
        if self.queue.push(Command::Stop).is_err() {
            return;
        }
        let stopped = self.queue.stopped();
        let waited = self
            .queue
            .stopped_now
            .wait_timeout_while(stopped, STOP_TIMEOUT, |stopped| !*stopped);
        if waited.is_ok_and(|(stopped, _)| !*stopped) {
            tracing::warn!(timeout = ?STOP_TIMEOUT, "ucx did not close its endpoints in time");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.queue.push(Command::Stop);
    }
}

impl Queue {
    fn push(&self, command: Command) -> Result<(), UcxError> {
        {
            let mut commands = self.commands();
            if commands.len() >= COMMANDS_MAX && !command.releases() {
                return Err(UcxError::new(format!("{COMMANDS_MAX} commands wait already")));
            }
            commands.push_back(command);
        }
        if self.sleeping.swap(false, SeqCst) {
            self.bell.ring();
        }
        Ok(())
    }

    fn mark_stopped(&self) {
        *self.stopped() = true;
        self.stopped_now.notify_all();
    }

    fn commands(&self) -> MutexGuard<'_, VecDeque<Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> MutexGuard<'_, bool> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn drive(mut worker: Worker, queue: &Queue, spin: Duration) {
    let mut last_event = Instant::now();
    let mut stopping = false;
    loop {
        let within = inside();
        let mut busy = worker.progress(PROGRESS_ROUNDS_MAX);
        loop {
            // The lock is not held while the command runs.
            let Some(command) = queue.commands().pop_front() else {
                break;
            };
            busy = true;
            if matches!(command, Command::Stop) {
                stopping = true;
                worker.close_all();
            } else if !stopping || command.releases() {
                worker.on(command);
            }
        }
        if stopping && worker.is_closed() {
            break;
        }
        drop(within);
        if busy {
            last_event = Instant::now();
        } else if last_event.elapsed() < spin {
            std::hint::spin_loop();
        } else {
            sleep(&mut worker, queue);
            last_event = Instant::now();
        }
    }
    let within = inside();
    let mut memories = worker.end();
    drop(within);
    queue.mark_stopped();
    // The pool may outlive its transport. This thread calls the library again only to unmap.
    while !memories.is_empty() {
        let command = queue.commands().pop_front();
        match command {
            Some(Command::Unmap { memory }) => {
                let _within = inside();
                memories.unmap(memory);
            }
            Some(_) => {}
            None => queue.sleep_until_rung(),
        }
    }
    let _within = inside();
    memories.end();
}

impl Queue {
    /// Sleeps until a command comes, or a bounded time passed.
    fn sleep_until_rung(&self) {
        self.sleeping.store(true, SeqCst);
        if self.commands().is_empty() {
            wait_for([self.bell.0.as_raw_fd()], SLEEP_MAX);
        }
        self.sleeping.store(false, SeqCst);
        self.bell.silence();
    }
}

/// Sleeps until the library has an event, a command comes, or a bounded time passed.
fn sleep(worker: &mut Worker, queue: &Queue) {
    queue.sleeping.store(true, SeqCst);
    // A command that came before the flag was seen rings no bell. An event that came before the arming shows in `arm`.
    let quiet = {
        let _within = inside();
        queue.commands().is_empty() && worker.arm()
    };
    if quiet {
        wait_for(
            [queue.bell.0.as_raw_fd()]
                .into_iter()
                .chain(worker.event_descriptors()),
            SLEEP_MAX,
        );
    }
    queue.sleeping.store(false, SeqCst);
    queue.bell.silence();
}

/// Waits until one of the descriptors can be read. Errors end it like an event would.
fn wait_for(descriptors: impl IntoIterator<Item = RawFd>, timeout: Duration) {
    let polled = descriptors.into_iter().map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    let mut polled: Vec<_> = polled.collect();
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: initialised entries, and their number.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout_ms) };
}

/// Wakes the driver.
struct Bell(OwnedFd);

impl Bell {
    fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ring(&self) {
        let one = 1_u64;
        // SAFETY: eight valid bytes. It can only fail when it has been rung 2⁶⁴ − 2 times, and is loud then anyway.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    fn silence(&self) {
        let mut count = 0_u64;
        // SAFETY: eight valid bytes to write to. It fails when it was not rung, which is fine.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}
