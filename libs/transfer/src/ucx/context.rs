//! The library's context: the memory it knows, and its workers. All of it belongs to the driver's thread.
//!
//! Elsewhere: what workers do (`worker.rs`).

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::ptr::{null, null_mut};
use std::sync::Arc;

use ucx_sys::Library;

use super::UcxError;
use super::driver::{Mapped, MemoryId};

/// Allocation methods that give zeroed pages, those that peers can map first.
const ZEROED_METHODS: &str = "md:sysv,md:posix,mmap";

/// The context and the memory it knows. Outlives the worker where memory does.
pub(super) struct Memories {
    pub(super) library: Arc<Library>,
    context: ucx_sys::ucp_context_h,
    mapped: HashMap<MemoryId, ucx_sys::ucp_mem_h>,
}

/// A worker of the library.
pub(super) struct Handle {
    pub(super) worker: ucx_sys::ucp_worker_h,
    pub(super) event_descriptor: RawFd,
}

impl Memories {
    /// Opens the library.
    pub(super) fn open(library: Arc<Library>, settings: &[(String, String)]) -> Result<Self, UcxError> {
        Ok(Self {
            context: open_context(&library, settings)?,
            library,
            mapped: HashMap::new(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.mapped.is_empty()
    }

    /// Registers `bytes` bytes at `base`, or at a place of the library's choice where that is null.
    pub(super) fn map(
        &mut self,
        id: MemoryId,
        base: *mut c_void,
        bytes: usize,
        device: bool,
    ) -> Result<Mapped, UcxError> {
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
        let (base, packed_key) = described?;
        Ok(Mapped { id, base, packed_key })
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
    pub(super) fn open(memories: &Memories) -> Result<Self, UcxError> {
        let library = &memories.library;
        // SAFETY: all-zero is a valid value of this plain struct; the mask says which fields are set.
        let mut params: ucx_sys::ucp_worker_params_t = unsafe { zeroed() };
        params.field_mask = u64::from(ucx_sys::UCP_WORKER_PARAM_FIELD_THREAD_MODE);
        params.thread_mode = ucx_sys::UCS_THREAD_MODE_SINGLE;
        let mut worker = null_mut();
        // SAFETY: a valid context, parameters that live during the call, and a place for the result.
        let status =
            unsafe { library.ucp_worker_create(memories.context, &raw const params, &raw mut worker) };
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
