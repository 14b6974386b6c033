//! Moving bytes by UCX: RDMA, NVLink and shared memory, through a library that is loaded at run time.
//!
//! Invariant, **nobody but a node itself writes its memory**: a peer never gets to put bytes here. It says where its
//! bytes are, and this node reads them: from the peer's memory where that is mapped into this process, by a
//! get of the network card otherwise. So the fence needs nobody's word: copies are made inside the grant's gate, gets
//! are counted by the grant they write to, and an endpoint that is closed by force ends its gets.
//!
//! UCX's own way of writing to a peer (put) would leave the receiver without a fence: a mapping of shared memory cannot
//! be taken back, a stopped process goes on when it is continued, and one that is killed leaves bytes on their way.
//!
//! What is measured of the library (1.13.1 and 1.22.0): endpoints that handle the peer's failure never have shared
//! memory among their lanes, so memory is mapped through a context of its own (`domain.rs`); over TCP a get is emulated,
//! and slower than a socket, so pairs that have nothing else use the built-in transport.
//!
//! Elsewhere: the conversation between nodes (`tcp`), the thread that calls the library (`driver.rs`), the calls
//! (`worker.rs`, `domain.rs`).

mod domain;
mod driver;
mod lanes;
mod maps;
mod memory;
mod worker;

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;
use types::{Memory, MemoryKind};
use ucx_sys::Library;

pub(crate) use domain::Way;
pub(crate) use driver::{Addresses, Run};
use driver::{Command, EndpointId, Handle, Mapped, MemoryId, WindowId};
use maps::LookedUp;
use memory::UcxMemory;
use worker::Worker;

/// How long a call of the library that does not wait for the network may take: allocating a large pool is the longest.
const PROMPT_TIMEOUT: Duration = Duration::from_secs(60);

/// What may move the bytes of transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// UCX for every pair of nodes where it offers more than TCP, built-in TCP for the others.
    #[default]
    Auto,
    /// Built-in TCP only.
    Tcp,
    /// UCX for every pair, also where it only offers TCP. A node without it does not start.
    Ucx,
}

/// Whether and how UCX is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What may move bytes.
    pub choice: Choice,
    /// The library's file. `None`: `libucp.so.0`, wherever the system finds it.
    pub library: Option<PathBuf>,
    /// UCX's own settings without their prefix, such as `TLS` or `MAX_RMA_RAILS`, which override the environment.
    pub settings: BTreeMap<String, String>,
    /// How long the thread that drives UCX, and both sides of a request whatever moves its bytes, look for more work
    /// before they sleep.
    pub spin: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            library: None,
            settings: BTreeMap::new(),
            // Of the order of a wake-up: spinning longer costs more than it saves.
            spin: Duration::from_micros(20),
        }
    }
}

/// What must be equal for two processes to be able to map each other's memory: the running kernel, and the namespace of
/// System V memory. `None` where the kernel does not say.
pub(crate) fn host() -> Option<String> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/ipc").ok()?;
    Some(format!("{} {}", kernel.trim(), namespace.display()))
}

/// Sets what the library reads from the environment when it is loaded, where the operator has not: it logs to stderr and
/// leaves the process's signal handlers alone. For the beginning of `main`: it does nothing, and returns false, once the
/// process has more than one thread.
pub fn prepare_process() -> bool {
    ucx_sys::prepare_environment()
}

/// Why something could not be done by UCX.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub(crate) struct UcxError {
    reason: String,
}

impl UcxError {
    pub(crate) fn new(reason: String) -> Self {
        Self { reason }
    }

    fn closed() -> Self {
        Self::new("the endpoint is closed".to_owned())
    }

    fn stopped() -> Self {
        Self::new("ucx has stopped".to_owned())
    }
}

/// Memory of a node as its peers get to know it: a message between nodes.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Exposed {
    /// Address of the first byte, in the process that owns it.
    #[prost(fixed64, tag = "1")]
    pub(crate) base: u64,
    /// How many bytes it has.
    #[prost(uint64, tag = "2")]
    pub(crate) bytes: u64,
    /// UCX's packed key for processes of the same host; empty if they cannot map it.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) shared_key: Vec<u8>,
    /// UCX's packed key for the network; empty if it is out of its devices' reach.
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) network_key: Vec<u8>,
}

/// The library, opened.
pub(crate) struct Ucx {
    driver: Arc<Handle>,
    version: String,
    addresses: Addresses,
    /// By exposed address of the first byte.
    known: Mutex<HashMap<usize, Known>>,
}

/// Memory that the library knows.
struct Known {
    /// An address may be mapped again, for other memory.
    memory: Weak<dyn Memory>,
    exposed: Exposed,
    /// To be unmapped here; allocated memory does that by itself.
    registered: Option<MemoryId>,
}

impl Ucx {
    /// Loads the library and opens it.
    pub(crate) fn open(config: &Config) -> Result<Self, UcxError> {
        let library =
            Library::load(config.library.as_deref()).map_err(|error| UcxError::new(error.to_string()))?;
        let version = format!("UCX {} from {}", library.version(), library.path().display());
        let settings: Vec<_> = config.settings.clone().into_iter().collect();
        let library = Arc::new(library);
        let forced = config.choice == Choice::Ucx;
        let environment = std::env::var("UCX_TLS").ok();
        let open = move || Worker::open(&library, &settings, environment.as_deref(), forced);
        let (driver, addresses) = Handle::start(open, config.spin)?;
        Ok(Self {
            driver,
            version,
            addresses,
            known: Mutex::default(),
        })
    }

    /// The library's version and place.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Where peers' workers find this one's.
    pub(crate) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Zeroed memory that peers on this host can map.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>, UcxError> {
        let mapped = self.prompt(|reply| Command::Allocate { bytes, reply })?;
        let base = NonNull::new(ptr::with_exposed_provenance_mut(mapped.base));
        let base = base.ok_or_else(|| UcxError::new("memory at address zero".to_owned()))?;
        // The library may have rounded up; the caller gets what was asked for.
        let memory: Arc<dyn Memory> = Arc::new(UcxMemory::new(base, bytes, mapped.id, self.driver.clone()));
        self.remember(&memory, mapped, None);
        Ok(memory)
    }

    /// What peers need to reach `memory`, which is registered with the library's devices if it is not known yet.
    pub(crate) fn expose(&self, memory: &Arc<dyn Memory>) -> Result<Exposed, UcxError> {
        let base = memory.base().as_ptr().expose_provenance();
        if let Some(known) = self.known().get(&base)
            && ptr::addr_eq(known.memory.as_ptr(), Arc::as_ptr(memory))
        {
            return Ok(known.exposed.clone());
        }
        let mapped = self.prompt(|reply| Command::Register {
            base,
            bytes: memory.len(),
            device: is_device(memory),
            reply,
        })?;
        let id = mapped.id;
        Ok(self.remember(memory, mapped, Some(id)))
    }

    /// Forgets memory that [`Ucx::expose`] registered.
    pub(crate) fn conceal(&self, memory: &Arc<dyn Memory>) {
        let base = memory.base().as_ptr().expose_provenance();
        let mut known = self.known();
        if known.get(&base).is_some_and(|known| known.registered.is_some())
            && let Some(Known {
                registered: Some(memory),
                ..
            }) = known.remove(&base)
        {
            let _ = self.driver.send(Command::Unmap { memory });
        }
    }

    /// An endpoint to the worker at `address`. Ends with the library's own time limits; dropping the future gives up.
    pub(crate) async fn connect(&self, way: Way, addresses: &Addresses) -> Result<Peer, UcxError> {
        let (reply, answer) = oneshot::channel();
        let address = match way {
            Way::Shared => addresses.shared.clone(),
            Way::Network => addresses.network.clone(),
        };
        self.driver.send(Command::Connect { way, address, reply })?;
        let connected = answer.await.map_err(|_| UcxError::stopped())??;
        Ok(Peer {
            driver: self.driver.clone(),
            endpoint: connected.endpoint,
            way,
            lanes: connected.lanes,
            alive: connected.alive,
        })
    }

    /// Closes all endpoints, which ends everything that goes on, and waits for it.
    pub(crate) fn stop(&self) {
        self.driver.stop();
    }

    fn remember(&self, memory: &Arc<dyn Memory>, mapped: Mapped, registered: Option<MemoryId>) -> Exposed {
        let exposed = Exposed {
            base: mapped.base as u64,
            bytes: memory.len() as u64,
            shared_key: mapped.shared_key,
            network_key: mapped.network_key,
        };
        let known = Known {
            memory: Arc::downgrade(memory),
            exposed: exposed.clone(),
            registered,
        };
        self.known().insert(mapped.base, known);
        exposed
    }

    fn prompt<T>(&self, command: impl FnOnce(driver::PromptReply<T>) -> Command) -> Result<T, UcxError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.driver.send(command(reply))?;
        match answer.recv_timeout(PROMPT_TIMEOUT) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(UcxError::stopped()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(UcxError::new(format!("no answer within {PROMPT_TIMEOUT:?}")))
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<usize, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Ucx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ucx").field("version", &self.version).finish()
    }
}

/// An endpoint to a peer's worker. Dropping it closes it, which ends all that goes on over it.
pub(crate) struct Peer {
    driver: Arc<Handle>,
    endpoint: EndpointId,
    way: Way,
    lanes: Vec<String>,
    alive: Arc<AtomicBool>,
}

impl Peer {
    /// How it reaches the peer.
    pub(crate) fn way(&self) -> Way {
        self.way
    }

    /// The transports that UCX chose, with their devices.
    pub(crate) fn lanes(&self) -> &[String] {
        &self.lanes
    }

    /// Whether one of them is better than plain TCP. Mapped memory is not among them.
    pub(crate) fn offers_more_than_tcp(&self) -> bool {
        lanes::offer_more_than_tcp(&self.lanes)
    }

    /// False once the endpoint failed or was closed.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Relaxed)
    }

    /// Closes it before it is dropped: everything that goes on over it ends soon, in errors.
    pub(crate) fn close(&self) {
        let endpoint = self.endpoint;
        let _ = self.driver.send(Command::Close { endpoint });
    }

    /// Makes memory of the peer readable.
    pub(crate) async fn open(&self, exposed: &Exposed) -> Result<Window, UcxError> {
        let key = match self.way {
            Way::Shared => &exposed.shared_key,
            Way::Network => &exposed.network_key,
        };
        if key.is_empty() {
            return Err(UcxError::new(format!(
                "the peer's memory cannot be reached by {:?}",
                self.way
            )));
        }
        let (reply, answer) = oneshot::channel();
        self.driver.send(Command::Open {
            endpoint: self.endpoint,
            packed_key: key.clone(),
            base: exposed.base,
            reply,
        })?;
        let opened = answer.await.map_err(|_| UcxError::stopped())??;
        // The library says where a mapping begins, but not where it ends, and the peer's word is not enough to
        // read memory of this process.
        let mapping = opened
            .mapped_at
            .filter(|start| maps::covers(*start, exposed.bytes))
            .map(|start| LookedUp::none_of(start, exposed.bytes));
        Ok(Window {
            driver: self.driver.clone(),
            window: opened.window,
            remote_base: exposed.base,
            bytes: exposed.bytes,
            mapping,
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.close();
    }
}

/// Memory of a peer that can be read.
pub(crate) struct Window {
    driver: Arc<Handle>,
    window: WindowId,
    remote_base: u64,
    bytes: u64,
    mapping: Option<LookedUp>,
}

impl Window {
    /// Whether it is mapped into this process, so that [`Window::mapped`] says where.
    pub(crate) fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    /// Whether the peer exposed `bytes` bytes at `offset`.
    pub(crate) fn covers(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// Where `bytes` bytes at `offset` of the peer's memory are readable here, for as long as the window lives: its key is
    /// destroyed by `drop`, and the mapping was looked up when it was opened. The peer may change them at any time. `None` if that
    /// memory is not mapped, or the peer did not expose as much.
    pub(crate) fn mapped(&self, offset: u64, bytes: u64) -> Option<*const u8> {
        let mapping = self.mapping.as_ref().filter(|_| self.covers(offset, bytes))?;
        mapping.look_up(offset, bytes);
        Some(ptr::with_exposed_provenance(mapping.start() + offset as usize))
    }

    /// Lets hardware read. `held` is dropped when nothing is written any more; then, the result comes. Dropping
    /// the future does not end the gets.
    ///
    /// # Safety
    ///
    /// `held` keeps the local bytes of all `runs` valid for writes, and used by nobody else.
    pub(crate) async unsafe fn get(
        &self,
        runs: Vec<Run>,
        device: bool,
        held: Box<dyn Any + Send>,
    ) -> Result<(), UcxError> {
        let (reply, answer) = oneshot::channel();
        self.driver.send(Command::Get {
            window: self.window,
            runs,
            device,
            held,
            reply,
        })?;
        answer.await.map_err(|_| UcxError::stopped())?
    }

    /// Where `offset` of the memory lies for [`Run::remote`].
    pub(crate) fn address(&self, offset: u64) -> u64 {
        self.remote_base.wrapping_add(offset)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let window = self.window;
        let _ = self.driver.send(Command::Forget { window });
    }
}

fn is_device(memory: &Arc<dyn Memory>) -> bool {
    matches!(memory.kind(), MemoryKind::Device(_))
}
