//! Pool memory that UCX allocated, so that peers on this host can map it.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use types::{Memory, MemoryKind};

use super::driver::{Command, Handle, MemoryId};

/// Memory of this process that other processes of this host may map through a packed key.
pub(crate) struct UcxMemory {
    base: NonNull<u8>,
    bytes: usize,
    id: MemoryId,
    driver: Arc<Handle>,
}

impl UcxMemory {
    /// `base` and `bytes` are what UCX mapped under `id`.
    pub(super) fn new(base: NonNull<u8>, bytes: usize, id: MemoryId, driver: Arc<Handle>) -> Self {
        Self {
            base,
            bytes,
            id,
            driver,
        }
    }
}

// SAFETY: the memory is plain mapped memory of the process, which any thread may reach.
unsafe impl Send for UcxMemory {}
// SAFETY: as above; all access is through raw pointers, under the promise of the block table.
unsafe impl Sync for UcxMemory {}

// SAFETY: UCX mapped `bytes` bytes at `base`, page aligned, by a method that gives zeroed pages (`driver.rs` allows no
// other), and unmaps them only when told so by `drop`.
unsafe impl Memory for UcxMemory {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.bytes
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

impl Drop for UcxMemory {
    fn drop(&mut self) {
        // A driver that is gone leaves the mapping to the end of the process.
        let _ = self.driver.send(Command::Unmap { memory: self.id });
    }
}

impl fmt::Debug for UcxMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UcxMemory").field("bytes", &self.bytes).finish()
    }
}
