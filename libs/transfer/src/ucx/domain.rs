//! Contexts of the library: the memory they know, and their workers. All of it belongs to the driver's thread.
//!
//! There are two. One knows nothing but this host's shared memory: its endpoints exist so that keys can be unpacked on
//! them, nothing is ever sent over them, and so nothing can go wrong with them when a peer dies. The other one knows the
//! network, and its endpoints handle the peer's failure, which no transport of shared memory can.
//!
//! Elsewhere: what workers do (`worker.rs`).

use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_void};
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::ptr::{self, null, null_mut};
use std::sync::Arc;

use ucx_sys::Library;

use super::UcxError;
use super::driver::{Mapped, MemoryId};

/// Allocation methods that give zeroed pages, those that peers can map first.
const ZEROED_METHODS: &str = "md:sysv,md:posix,mmap";
/// Transports that share memory.
const SHARED_TLS: &str = "sysv,posix,self";
/// Transports of a network, where the operator names none. UCX over TCP is no better than the built-in transport, and
/// UCX 1.13 ends the process when a peer dies while it is being connected to over TCP.
const NETWORK_TLS: &str = "^tcp";
/// Names of transports, and of groups of them, that share memory.
const SHARED_NAMES: [&str; 6] = ["all", "sm", "shm", "mm", "sysv", "posix"];

/// How an endpoint reaches a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// By mapping its memory.
    Shared,
    /// Over a network.
    Network,
}

/// A worker of the library.
pub(super) struct Handle {
    pub(super) worker: ucx_sys::ucp_worker_h,
    pub(super) event_descriptor: RawFd,
}

/// A context of the library, with the memory it knows. Outlives its workers where memory does.
pub(super) struct Domain {
    pub(super) library: Arc<Library>,
    context: ucx_sys::ucp_context_h,
    mapped: HashMap<MemoryId, ucx_sys::ucp_mem_h>,
}

/// With one worker, an endpoint to a peer that connected first would be the one that UCX made for the peer's messages,
/// whose lanes reach nothing but what those need. So all endpoints begin at `asking` and end at the peers' `answering`,
/// which only lets the library answer.
pub(super) struct NetworkWorkers {
    pub(super) asking: Handle,
    pub(super) answering: Handle,
}

/// The contexts, and the memory they know. They outlive the workers where memory does.
pub(super) struct Domains {
    pub(super) library: Arc<Library>,
    pub(super) shared: Option<Domain>,
    pub(super) network: Option<Domain>,
    known: HashSet<MemoryId>,
}

/// Settings of the library without their prefix, with their values.
pub(super) type Settings = Vec<(String, String)>;

/// The settings of the two contexts: of shared memory, if the operator has not excluded it, and of the network.
/// `settings` are the operator's, `environment` what `UCX_TLS` says, `forced` whether TCP is good enough.
pub(super) fn domain_settings(
    settings: &[(String, String)],
    environment: Option<&str>,
    forced: bool,
) -> (Option<Settings>, Settings) {
    let named = settings.iter().find(|(name, _)| name == "TLS");
    let tls = named.map(|(_, tls)| tls.as_str()).or(environment);
    let set = |tls: &str| {
        let mut settings = settings.to_vec();
        settings.retain(|(name, _)| name != "TLS");
        settings.push(("TLS".to_owned(), tls.to_owned()));
        settings
    };
    let shared = shares_memory(tls).then(|| set(SHARED_TLS));
    let network = if tls.is_none() && !forced {
        set(NETWORK_TLS)
    } else {
        settings.to_vec()
    };
    (shared, network)
}

/// Whether a list of transports, in the form of `UCX_TLS`, has one that shares memory.
fn shares_memory(tls: Option<&str>) -> bool {
    let Some(tls) = tls else { return true };
    let (negated, names) = match tls.strip_prefix('^') {
        Some(names) => (true, names),
        None => (false, tls),
    };
    let named = names.split(',').any(|name| SHARED_NAMES.contains(&name.trim()));
    named != negated
}

impl Domain {
    /// Opens the library.
    pub(super) fn open(library: Arc<Library>, settings: &[(String, String)]) -> Result<Self, UcxError> {
        Ok(Self {
            context: open_context(&library, settings)?,
            library,
            mapped: HashMap::new(),
        })
    }

    /// Registers `bytes` bytes at `base`, or at a place of the library's choice where that is null. Gives their address and
    /// their packed key.
    pub(super) fn map(
        &mut self,
        id: MemoryId,
        base: *mut c_void,
        bytes: usize,
        device: bool,
    ) -> Result<(usize, Vec<u8>), UcxError> {
        let library = &self.library;
        // SAFETY: all-zero is a valid value of this plain struct; the mask says which fields are set.
        let mut params: ucx_sys::ucp_mem_map_params_t = unsafe { zeroed() };
        params.field_mask = u64::from(
            ucx_sys::UCP_MEM_MAP_PARAM_FIELD_ADDRESS
                | ucx_sys::UCP_MEM_MAP_PARAM_FIELD_LENGTH
                | ucx_sys::UCP_MEM_MAP_PARAM_FIELD_FLAGS
                | ucx_sys::UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        );
        params.address = base;
        params.length = bytes;
        params.flags = if base.is_null() {
            ucx_sys::UCP_MEM_MAP_ALLOCATE
        } else {
            0
        };
        params.memory_type = memory_type(device);
        let mut handle = null_mut();
        // SAFETY: an open context; the memory, where it is not the library's own, lives until it is unmapped.
        let status = unsafe { library.ucp_mem_map(self.context, &raw const params, &raw mut handle) };
        check(library, "ucp_mem_map", status)?;
        // From here on `unmap` gives it back.
        self.mapped.insert(id, handle);
        let described = describe_memory(library, self.context, handle);
        if described.is_err() {
            self.unmap(id);
        }
        described
    }

    pub(super) fn unmap(&mut self, id: MemoryId) {
        if let Some(handle) = self.mapped.remove(&id) {
            // SAFETY: mapped in this context, and its owner lets it go.
            let status = unsafe { self.library.ucp_mem_unmap(self.context, handle) };
            if status != ucx_sys::UCS_OK {
                tracing::warn!(error = self.library.explain(status), "ucx did not unmap memory");
            }
        }
    }

    /// Closes the context. No memory may be left.
    pub(super) fn end(self) {
        // SAFETY: its worker and all its memory are gone, and nobody uses it afterwards.
        unsafe { self.library.ucp_cleanup(self.context) };
    }
}

impl Handle {
    pub(super) fn open(domain: &Domain) -> Result<Self, UcxError> {
        let library = &domain.library;
        // SAFETY: all-zero is a valid value of this plain struct; the mask says which fields are set.
        let mut params: ucx_sys::ucp_worker_params_t = unsafe { zeroed() };
        params.field_mask = u64::from(ucx_sys::UCP_WORKER_PARAM_FIELD_THREAD_MODE);
        params.thread_mode = ucx_sys::UCS_THREAD_MODE_SINGLE;
        let mut worker = null_mut();
        // SAFETY: a valid context, parameters that live during the call, and a place for the result.
        let status = unsafe { library.ucp_worker_create(domain.context, &raw const params, &raw mut worker) };
        check(library, "ucp_worker_create", status)?;
        let mut event_descriptor = -1;
        // SAFETY: a valid worker, of a context with the wake-up feature.
        let status = unsafe { library.ucp_worker_get_efd(worker, &raw mut event_descriptor) };
        check(library, "ucp_worker_get_efd", status)?;
        Ok(Self {
            worker,
            event_descriptor,
        })
    }

    /// Where peers find it.
    pub(super) fn address(&self, library: &Library) -> Result<Vec<u8>, UcxError> {
        let (mut address, mut bytes) = (null_mut(), 0);
        // SAFETY: a valid worker, and places for the results.
        let status = unsafe { library.ucp_worker_get_address(self.worker, &raw mut address, &raw mut bytes) };
        check(library, "ucp_worker_get_address", status)?;
        // SAFETY: the library just said that `bytes` bytes are there.
        let copied = unsafe { std::slice::from_raw_parts(address.cast_const().cast::<u8>(), bytes) }.to_vec();
        // SAFETY: the address is of this worker, and not used any more.
        unsafe { library.ucp_worker_release_address(self.worker, address) };
        Ok(copied)
    }
}

impl Domains {
    pub(super) fn new(library: Arc<Library>) -> Self {
        Self {
            library,
            shared: None,
            network: None,
            known: HashSet::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Memory that peers on this host can map, and that the network's devices know.
    pub(super) fn allocate(&mut self, id: MemoryId, bytes: usize) -> Result<Mapped, UcxError> {
        let Some(shared) = &mut self.shared else {
            return Err(UcxError::new("the operator excludes shared memory".to_owned()));
        };
        let (base, shared_key) = shared.map(id, null_mut(), bytes, false)?;
        let network_key = self.register_with_network(id, base, bytes, false);
        self.known.insert(id);
        Ok(Mapped {
            id,
            base,
            shared_key,
            network_key: network_key.unwrap_or_else(|error| {
                tracing::warn!(%error, bytes, "the pool is out of reach of the network's devices");
                Vec::new()
            }),
        })
    }

    /// Memory that somebody else allocated, for the network's devices.
    pub(super) fn register(
        &mut self,
        id: MemoryId,
        base: usize,
        bytes: usize,
        device: bool,
    ) -> Result<Mapped, UcxError> {
        let network_key = self.register_with_network(id, base, bytes, device)?;
        self.known.insert(id);
        Ok(Mapped {
            id,
            base,
            shared_key: Vec::new(),
            network_key,
        })
    }

    fn register_with_network(
        &mut self,
        id: MemoryId,
        base: usize,
        bytes: usize,
        device: bool,
    ) -> Result<Vec<u8>, UcxError> {
        let Some(network) = &mut self.network else {
            return Ok(Vec::new());
        };
        let (_, key) = network.map(id, ptr::with_exposed_provenance_mut(base), bytes, device)?;
        Ok(key)
    }

    /// Forgets memory, first where it is only registered and then where it was allocated.
    pub(super) fn unmap(&mut self, id: MemoryId) {
        self.known.remove(&id);
        for domain in self.network.iter_mut().chain(&mut self.shared) {
            domain.unmap(id);
        }
    }

    /// Closes the contexts. No memory may be left.
    pub(super) fn end(self) {
        self.network.into_iter().chain(self.shared).for_each(Domain::end);
    }
}

pub(super) fn open_shared(
    library: &Arc<Library>,
    settings: &[(String, String)],
) -> Result<(Domain, Handle, Vec<u8>), UcxError> {
    let domain = Domain::open(library.clone(), settings)?;
    let handle = Handle::open(&domain)?;
    let address = handle.address(library)?;
    Ok((domain, handle, address))
}

pub(super) fn open_network(
    library: &Arc<Library>,
    settings: &[(String, String)],
) -> Result<(Domain, NetworkWorkers, Vec<u8>), UcxError> {
    let domain = Domain::open(library.clone(), settings)?;
    let (asking, answering) = (Handle::open(&domain)?, Handle::open(&domain)?);
    let address = answering.address(library)?;
    Ok((domain, NetworkWorkers { asking, answering }, address))
}

/// Where memory lies, and its packed key.
fn describe_memory(
    library: &Library,
    context: ucx_sys::ucp_context_h,
    handle: ucx_sys::ucp_mem_h,
) -> Result<(usize, Vec<u8>), UcxError> {
    // SAFETY: all-zero is a valid value of this plain struct; the mask says what is asked for.
    let mut attributes: ucx_sys::ucp_mem_attr_t = unsafe { zeroed() };
    attributes.field_mask = u64::from(ucx_sys::UCP_MEM_ATTR_FIELD_ADDRESS);
    // SAFETY: mapped memory, and a place for the answer.
    let status = unsafe { library.ucp_mem_query(handle, &raw mut attributes) };
    check(library, "ucp_mem_query", status)?;
    let (mut packed, mut bytes) = (null_mut(), 0);
    // SAFETY: mapped memory of this context, and places for the results.
    let status = unsafe { library.ucp_rkey_pack(context, handle, &raw mut packed, &raw mut bytes) };
    check(library, "ucp_rkey_pack", status)?;
    // SAFETY: the library just said that `bytes` bytes are there.
    let copied = unsafe { std::slice::from_raw_parts(packed.cast_const().cast::<u8>(), bytes) }.to_vec();
    // SAFETY: packed above, and not used any more.
    unsafe { library.ucp_rkey_buffer_release(packed) };
    Ok((attributes.address.expose_provenance(), copied))
}

fn open_context(
    library: &Library,
    settings: &[(String, String)],
) -> Result<ucx_sys::ucp_context_h, UcxError> {
    let mut config = null_mut();
    // SAFETY: null means no prefix and no file; a place for the result.
    let status = unsafe { library.ucp_config_read(null(), null(), &raw mut config) };
    check(library, "ucp_config_read", status)?;
    let zeroed_methods = ("ALLOC_PRIO".to_owned(), ZEROED_METHODS.to_owned());
    let modified = settings
        .iter()
        .chain([&zeroed_methods])
        .try_for_each(|(name, value)| {
            let c_string = |text: &str| {
                CString::new(text).map_err(|_| UcxError::new(format!("setting {name} contains a zero byte")))
            };
            let (name_c, value_c) = (c_string(name)?, c_string(value)?);
            // SAFETY: a configuration that was read, and two strings that live during the call.
            let status = unsafe { library.ucp_config_modify(config, name_c.as_ptr(), value_c.as_ptr()) };
            check(library, &format!("setting {name} to {value:?}"), status)
        });
    let opened = modified.and_then(|()| {
        // SAFETY: all-zero is a valid value of this plain struct; the mask says which fields are set.
        let mut params: ucx_sys::ucp_params_t = unsafe { zeroed() };
        params.field_mask = u64::from(ucx_sys::UCP_PARAM_FIELD_FEATURES);
        params.features = u64::from(ucx_sys::UCP_FEATURE_RMA | ucx_sys::UCP_FEATURE_WAKEUP);
        let mut context = null_mut();
        // SAFETY: parameters and configuration live during the call; the version is that of the bindings.
        let status = unsafe {
            library.ucp_init_version(
                ucx_sys::UCP_API_MAJOR,
                ucx_sys::UCP_API_MINOR,
                &raw const params,
                config,
                &raw mut context,
            )
        };
        check(library, "ucp_init_version", status).map(|()| context)
    });
    // SAFETY: read above, and not used any more.
    unsafe { library.ucp_config_release(config) };
    opened
}

pub(super) fn memory_type(device: bool) -> ucx_sys::ucs_memory_type_t {
    if device {
        ucx_sys::UCS_MEMORY_TYPE_CUDA
    } else {
        ucx_sys::UCS_MEMORY_TYPE_HOST
    }
}

pub(super) fn check(library: &Library, what: &str, status: ucx_sys::ucs_status_t) -> Result<(), UcxError> {
    if status == ucx_sys::UCS_OK {
        return Ok(());
    }
    Err(UcxError::new(format!("{what}: {}", library.explain(status))))
}

#[cfg(test)]
mod tests;
