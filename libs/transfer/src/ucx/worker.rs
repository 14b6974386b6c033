//! Endpoints, windows and gets, and the calls of the library behind them. All of it belongs to the driver's thread.
//!
//! Invariant: an operation that was begun ends in [`ended`], once, which frees its request; what it needs lives until
//! then. An endpoint's error only sets a flag: the endpoint is closed from the loop, never from inside the library.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::ptr::{self, null_mut};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use ucx_sys::{Begun, Library};

use super::domain::{
    Domains, Handle, NetworkWorkers, Way, check, domain_settings, memory_type, open_network, open_shared,
};
use super::driver::{Addresses, Command, Connected, EndpointId, MemoryId, Opened, Reply, Run, WindowId};
use super::{UcxError, lanes};

/// The contexts with their workers.
pub(super) struct Worker {
    domains: Domains,
    shared: Option<Handle>,
    network: Option<NetworkWorkers>,
    endpoints: HashMap<EndpointId, Endpoint>,
    windows: HashMap<WindowId, (EndpointId, ucx_sys::ucp_rkey_h)>,
    next_id: u64,
    /// What ended inside the library, to be looked at outside of it.
    ended: Rc<RefCell<VecDeque<Ended>>>,
    /// Set when some endpoint failed.
    some_failed: Rc<Cell<bool>>,
}

struct Endpoint {
    handle: ucx_sys::ucp_ep_h,
    /// At an address that the library knows.
    state: Box<EndpointState>,
    alive: Arc<AtomicBool>,
    closing: bool,
    way: Way,
}

struct EndpointState {
    failed: Cell<bool>,
    some_failed: Rc<Cell<bool>>,
}

/// One or more calls of the library that end together.
struct Pending {
    library: Arc<Library>,
    /// Calls that have not ended, and one for the issuing.
    remaining: Cell<usize>,
    status: Cell<ucx_sys::ucs_status_t>,
    purpose: Cell<Option<Purpose>>,
    queue: Rc<RefCell<VecDeque<Ended>>>,
}

enum Purpose {
    Connect {
        endpoint: EndpointId,
        reply: Reply<Connected>,
    },
    Get {
        held: Box<dyn Any + Send>,
        reply: Reply<()>,
    },
    Close {
        endpoint: EndpointId,
    },
}

struct Ended {
    purpose: Purpose,
    status: ucx_sys::ucs_status_t,
}

/// The library calls this when an operation ends that did not end at once.
///
/// # Safety
///
/// `user_data` comes from [`Pending::into_raw`] and has not ended; `request` is the operation's.
unsafe extern "C" fn ended(request: *mut c_void, status: ucx_sys::ucs_status_t, user_data: *mut c_void) {
    let pending: *const Pending = user_data.cast_const().cast();
    // SAFETY: alive until its last operation ended (contract).
    let library = unsafe { (*pending).library.clone() };
    // SAFETY: the library hands the request over with this call.
    unsafe { library.ucp_request_free(request) };
    // SAFETY: this is the end of one of its operations.
    unsafe { Pending::one_ended(pending, status) };
}

/// The library calls this when an endpoint fails.
///
/// # Safety
///
/// `state` is the `EndpointState` of an endpoint that is not closed yet.
unsafe extern "C" fn endpoint_failed(
    state: *mut c_void,
    _endpoint: ucx_sys::ucp_ep_h,
    _status: ucx_sys::ucs_status_t,
) {
    // SAFETY: the contract; on the thread that owns the state.
    let state: &EndpointState = unsafe { &*state.cast_const().cast() };
    state.failed.set(true);
    state.some_failed.set(true);
}

impl Pending {
    fn into_raw(self) -> *const Self {
        Box::into_raw(Box::new(self)).cast_const()
    }

    /// # Safety
    ///
    /// `pending` comes from `into_raw`; called once for each of its operations and once for the issuing.
    unsafe fn one_ended(pending: *const Self, status: ucx_sys::ucs_status_t) {
        // SAFETY: not freed before the count is zero, and it is not (contract).
        let this = unsafe { &*pending };
        if status != ucx_sys::UCS_OK && this.status.get() == ucx_sys::UCS_OK {
            this.status.set(status);
        }
        this.remaining.set(this.remaining.get() - 1);
        if this.remaining.get() > 0 {
            return;
        }
        // SAFETY: from `into_raw`, and nobody else has it any more.
        let this = unsafe { Box::from_raw(pending.cast_mut()) };
        if let Some(purpose) = this.purpose.take() {
            let status = this.status.get();
            this.queue.borrow_mut().push_back(Ended { purpose, status });
        }
    }
}

impl Worker {
    /// Opens the library's contexts and their workers; also returns the addresses at which peers find them. One of the
    /// contexts suffices; the error is of the last one that failed.
    pub(super) fn open(
        library: &Arc<Library>,
        settings: &[(String, String)],
        environment: Option<&str>,
        forced: bool,
    ) -> Result<(Self, Addresses), UcxError> {
        let (of_shared, of_network) = domain_settings(settings, environment, forced);
        let mut addresses = Addresses::default();
        let (mut failed, mut domains) = (None, Domains::new(library.clone()));
        let mut shared = None;
        if let Some(settings) = of_shared {
            match open_shared(library, &settings) {
                Ok((domain, handle, address)) => {
                    domains.shared = Some(domain);
                    shared = Some(handle);
                    addresses.shared = address;
                }
                Err(error) => failed = Some(error),
            }
        }
        let mut network = None;
        match open_network(library, &of_network) {
            Ok((domain, workers, address)) => {
                domains.network = Some(domain);
                network = Some(workers);
                addresses.network = address;
            }
            Err(error) => failed = Some(error),
        }
        if let (None, None, Some(error)) = (&shared, &network, failed) {
            return Err(error);
        }
        let opened = Self {
            domains,
            shared,
            network,
            endpoints: HashMap::new(),
            windows: HashMap::new(),
            next_id: 1,
            ended: Rc::default(),
            some_failed: Rc::default(),
        };
        Ok((opened, addresses))
    }

    fn workers(&self) -> impl Iterator<Item = &Handle> {
        let network = self.network.iter();
        let network = network.flat_map(|workers| [&workers.asking, &workers.answering]);
        self.shared.iter().chain(network)
    }

    /// Lets the library work, and looks at what ended. Returns whether there was anything.
    pub(super) fn progress(&mut self, rounds_max: usize) -> bool {
        let mut busy = false;
        for handle in self.workers() {
            for _ in 0..rounds_max {
                // SAFETY: a worker of this thread.
                if unsafe { self.library().ucp_worker_progress(handle.worker) } == 0 {
                    break;
                }
                busy = true;
            }
        }
        loop {
            let ended = self.ended.borrow_mut().pop_front();
            let Some(Ended { purpose, status }) = ended else {
                break;
            };
            busy = true;
            self.finish(purpose, status);
        }
        if self.some_failed.replace(false) {
            busy = true;
            let failed: Vec<EndpointId> = self
                .endpoints
                .iter()
                .filter(|(_, endpoint)| endpoint.state.failed.get())
                .map(|(id, _)| *id)
                .collect();
            failed.into_iter().for_each(|id| self.close(id));
        }
        busy
    }

    /// Prepares for sleep. False if there is something to do first.
    pub(super) fn arm(&mut self) -> bool {
        self.workers().all(|handle| {
            // SAFETY: a worker of this thread.
            let status = unsafe { self.library().ucp_worker_arm(handle.worker) };
            status == ucx_sys::UCS_OK
        })
    }

    /// What becomes readable when there is something to do.
    pub(super) fn event_descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.workers().map(|handle| handle.event_descriptor)
    }

    /// Carries out a command.
    pub(super) fn on(&mut self, command: Command) {
        match command {
            // Whoever does not wait any more for a prompt reply has gone for good.
            Command::Allocate { bytes, reply } => {
                let id = MemoryId(self.id());
                let _ = reply.send(self.domains.allocate(id, bytes));
            }
            Command::Register {
                base,
                bytes,
                device,
                reply,
            } => {
                let id = MemoryId(self.id());
                let _ = reply.send(self.domains.register(id, base, bytes, device));
            }
            Command::Unmap { memory } => self.domains.unmap(memory),
            Command::Connect {
                way: Way::Shared,
                address,
                reply,
            } => self.connect_shared(&address, reply),
            Command::Connect {
                way: Way::Network,
                address,
                reply,
            } => self.connect_network(&address, reply),
            Command::Close { endpoint } => self.close(endpoint),
            Command::Open {
                endpoint,
                packed_key,
                base,
                reply,
            } => {
                if let Err(Ok(unwanted)) = reply.send(self.open_window(endpoint, &packed_key, base)) {
                    self.forget(unwanted.window);
                }
            }
            Command::Forget { window } => self.forget(window),
            Command::Get {
                window,
                runs,
                device,
                held,
                reply,
            } => self.get(window, &runs, device, held, reply),
            Command::Stop => {}
        }
    }

    pub(super) fn close_all(&mut self) {
        let all: Vec<EndpointId> = self.endpoints.keys().copied().collect();
        all.into_iter().for_each(|id| self.close(id));
    }

    pub(super) fn is_closed(&self) -> bool {
        self.endpoints.is_empty()
    }

    /// Lets go of everything but memory. All endpoints must be closed.
    pub(super) fn end(mut self) -> Domains {
        let windows: Vec<WindowId> = self.windows.keys().copied().collect();
        windows.into_iter().for_each(|window| self.forget(window));
        for handle in self.workers() {
            // SAFETY: a worker of this thread; its endpoints are closed, and nobody uses it afterwards.
            unsafe { self.library().ucp_worker_destroy(handle.worker) };
        }
        self.domains
    }

    fn library(&self) -> &Library {
        &self.domains.library
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// An endpoint over which nothing is sent: it only lets keys be unpacked.
    fn connect_shared(&mut self, address: &[u8], reply: Reply<Connected>) {
        let worker = self.shared.as_ref().map(|handle| handle.worker);
        let connected = self
            .create(Way::Shared, worker, address)
            .map(|(endpoint, alive)| Connected {
                endpoint,
                lanes: vec!["shared memory".to_owned()],
                alive,
            });
        if let Err(Ok(unwanted)) = reply.send(connected) {
            self.close(unwanted.endpoint);
        }
    }

    fn connect_network(&mut self, address: &[u8], reply: Reply<Connected>) {
        let worker = self.network.as_ref().map(|workers| workers.asking.worker);
        let endpoint = match self.create(Way::Network, worker, address) {
            Ok((endpoint, _)) => endpoint,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let Some(handle) = self.endpoints.get(&endpoint).map(|open| open.handle) else {
            return;
        };
        // Its lanes are known when the first operation went through.
        self.issue(1, Purpose::Connect { endpoint, reply }, |library, params| {
            // SAFETY: an open endpoint of this thread's worker, and parameters that live during the call.
            vec![unsafe { library.ucp_ep_flush_nbx(handle, &raw const *params) }]
        });
    }

    fn create(
        &mut self,
        way: Way,
        worker: Option<ucx_sys::ucp_worker_h>,
        address: &[u8],
    ) -> Result<(EndpointId, Arc<AtomicBool>), UcxError> {
        let none = || UcxError::new(format!("this node has no UCX for {way:?}"));
        let worker = worker.ok_or_else(none)?;
        if address.is_empty() {
            return Err(UcxError::new(format!("the peer has no UCX for {way:?}")));
        }
        let state = Box::new(EndpointState {
            failed: Cell::new(false),
            some_failed: self.some_failed.clone(),
        });
        // SAFETY: all-zero is a valid value of this plain struct; the mask says which fields are set.
        let mut params: ucx_sys::ucp_ep_params_t = unsafe { zeroed() };
        params.field_mask = u64::from(
            ucx_sys::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
                | ucx_sys::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                | ucx_sys::UCP_EP_PARAM_FIELD_ERR_HANDLER,
        );
        params.address = address.as_ptr().cast();
        params.err_mode = match way {
            Way::Shared => ucx_sys::UCP_ERR_HANDLING_MODE_NONE,
            Way::Network => ucx_sys::UCP_ERR_HANDLING_MODE_PEER,
        };
        params.err_handler = ucx_sys::ucp_err_handler {
            cb: Some(endpoint_failed),
            arg: (&raw const *state).cast_mut().cast(),
        };
        let mut handle = null_mut();
        // SAFETY: the parameters live during the call; the state lives until the endpoint is closed.
        let status = unsafe {
            self.library()
                .ucp_ep_create(worker, &raw const params, &raw mut handle)
        };
        check(self.library(), "ucp_ep_create", status)?;
        let endpoint = EndpointId(self.id());
        let alive = Arc::new(AtomicBool::new(true));
        self.endpoints.insert(
            endpoint,
            Endpoint {
                handle,
                state,
                alive: alive.clone(),
                closing: false,
                way,
            },
        );
        Ok((endpoint, alive))
    }

    fn close(&mut self, id: EndpointId) {
        let Some(endpoint) = self.endpoints.get_mut(&id) else {
            return;
        };
        endpoint.alive.store(false, Relaxed);
        if std::mem::replace(&mut endpoint.closing, true) {
            return;
        }
        let (handle, way) = (endpoint.handle, endpoint.way);
        self.issue(1, Purpose::Close { endpoint: id }, |library, params| {
            if way == Way::Network {
                params.op_attr_mask |= ucx_sys::UCP_OP_ATTR_FIELD_FLAGS;
                params.flags = ucx_sys::UCP_EP_CLOSE_FLAG_FORCE;
            }
            // SAFETY: an open endpoint that is closed once, and not used afterwards.
            vec![unsafe { library.ucp_ep_close_nbx(handle, &raw const *params) }]
        });
    }

    fn open_window(&mut self, id: EndpointId, packed_key: &[u8], base: u64) -> Result<Opened, UcxError> {
        let endpoint = self.endpoints.get(&id).filter(|endpoint| !endpoint.closing);
        let handle = endpoint.ok_or_else(UcxError::closed)?.handle;
        let mut key = null_mut();
        // SAFETY: an open endpoint, and the bytes that the peer packed. The library trusts their form: they come
        // from a node of the cluster, over the same connection as the worker's address.
        let status = unsafe {
            self.library()
                .ucp_ep_rkey_unpack(handle, packed_key.as_ptr().cast(), &raw mut key)
        };
        check(self.library(), "ucp_ep_rkey_unpack", status)?;
        let mut mapped_at = null_mut();
        // SAFETY: a key of this thread's endpoint, and a place for the result.
        let status = unsafe { self.library().ucp_rkey_ptr(key, base, &raw mut mapped_at) };
        let window = WindowId(self.id());
        self.windows.insert(window, (id, key));
        Ok(Opened {
            window,
            mapped_at: (status == ucx_sys::UCS_OK).then(|| mapped_at.expose_provenance()),
        })
    }

    fn forget(&mut self, window: WindowId) {
        if let Some((_, key)) = self.windows.remove(&window) {
            // SAFETY: a key of this worker that no operation uses: gets hold their window, and so do copies.
            unsafe { self.library().ucp_rkey_destroy(key) };
        }
    }
}

/// Operations that go on.
impl Worker {
    fn get(
        &mut self,
        window: WindowId,
        runs: &[Run],
        device: bool,
        held: Box<dyn Any + Send>,
        reply: Reply<()>,
    ) {
        let open = self.windows.get(&window).and_then(|(id, key)| {
            let endpoint = self.endpoints.get(id).filter(|endpoint| !endpoint.closing);
            endpoint.map(|endpoint| (endpoint.handle, *key))
        });
        let Some((handle, key)) = open else {
            drop(held);
            let _ = reply.send(Err(UcxError::closed()));
            return;
        };
        self.issue(runs.len(), Purpose::Get { held, reply }, |library, params| {
            params.op_attr_mask |= ucx_sys::UCP_OP_ATTR_FIELD_MEMORY_TYPE;
            params.memory_type = memory_type(device);
            let get = |run: &Run| {
                let local = ptr::with_exposed_provenance_mut(run.local);
                // SAFETY: `held` keeps `bytes` bytes at `local` for this operation until it ended; the endpoint is
                // open and the key is its own. What the peer's memory is, the library and its hardware check.
                unsafe { library.ucp_get_nbx(handle, local, run.bytes, run.remote, key, &raw const *params) }
            };
            runs.iter().map(get).collect()
        });
    }

    /// Begins `count` calls that end together.
    fn issue(
        &mut self,
        count: usize,
        purpose: Purpose,
        begin: impl FnOnce(&Library, &mut ucx_sys::ucp_request_param_t) -> Vec<ucx_sys::ucs_status_ptr_t>,
    ) {
        let pending = Pending {
            library: self.domains.library.clone(),
            remaining: Cell::new(count + 1),
            status: Cell::new(ucx_sys::UCS_OK),
            purpose: Cell::new(Some(purpose)),
            queue: self.ended.clone(),
        };
        let pending = pending.into_raw();
        // SAFETY: all-zero is a valid value of this plain struct; the mask says which fields are set.
        let mut params: ucx_sys::ucp_request_param_t = unsafe { zeroed() };
        params.op_attr_mask = ucx_sys::UCP_OP_ATTR_FIELD_CALLBACK | ucx_sys::UCP_OP_ATTR_FIELD_USER_DATA;
        params.cb.send = Some(ended);
        params.user_data = pending.cast_mut().cast();
        let begun = begin(&self.domains.library, &mut params);
        debug_assert_eq!(begun.len(), count, "every call is counted");
        for call in begun {
            match Begun::of(call) {
                // SAFETY: this call has ended, and its callback will not come.
                Begun::Done => unsafe { Pending::one_ended(pending, ucx_sys::UCS_OK) },
                // SAFETY: as above.
                Begun::Failed(status) => unsafe { Pending::one_ended(pending, status) },
                Begun::Request(_) => {}
            }
        }
        // SAFETY: the issuing ends here.
        unsafe { Pending::one_ended(pending, ucx_sys::UCS_OK) };
    }

    fn finish(&mut self, purpose: Purpose, status: ucx_sys::ucs_status_t) {
        match purpose {
            Purpose::Connect { endpoint, reply } => {
                let connected = check(self.library(), "connecting", status).and_then(|()| {
                    let open = self.endpoints.get(&endpoint).filter(|open| !open.closing);
                    let open = open.ok_or_else(UcxError::closed)?;
                    Ok(Connected {
                        endpoint,
                        lanes: lanes::parse(&describe(self.library(), open.handle)),
                        alive: open.alive.clone(),
                    })
                });
                let failed = connected.is_err();
                if reply.send(connected).is_err() || failed {
                    self.close(endpoint);
                }
            }
            Purpose::Get { held, reply } => {
                // First, so that whoever hears of the end finds the memory its own again.
                drop(held);
                let _ = reply.send(check(self.library(), "ucp_get_nbx", status));
            }
            Purpose::Close { endpoint } => {
                self.endpoints.remove(&endpoint);
            }
        }
    }
}

/// What the library prints of an endpoint. Empty if there is no memory for it.
fn describe(library: &Library, endpoint: ucx_sys::ucp_ep_h) -> String {
    let (mut text, mut bytes) = (null_mut(), 0);
    // SAFETY: places for a buffer that the stream allocates.
    let stream = unsafe { libc::open_memstream(&raw mut text, &raw mut bytes) };
    if stream.is_null() {
        return String::new();
    }
    // SAFETY: an open endpoint and an open stream.
    unsafe { library.ucp_ep_print_info(endpoint, stream.cast()) };
    // SAFETY: opened above; closing makes `text` and `bytes` valid.
    unsafe { libc::fclose(stream) };
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the stream wrote `bytes` bytes there.
    let copied = unsafe { std::slice::from_raw_parts(text.cast_const().cast::<u8>(), bytes) };
    let description = String::from_utf8_lossy(copied).into_owned();
    // SAFETY: allocated by the stream, and not used any more.
    unsafe { libc::free(text.cast()) };
    description
}
