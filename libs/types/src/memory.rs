//! The seam between those who allocate KV memory and those who compute in it or move it.
//!
//! A pool is one region. The block table decides who may touch which block; nothing in the type system
//! does, because remote writers and kernels on other devices take part.

use std::ptr::NonNull;

/// Which processor's memory this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// DRAM, readable by this process.
    Host,
    /// Memory of the accelerator with this ordinal.
    Device(u32),
}

/// A region of memory that stays mapped, at one address, for as long as the value lives.
///
/// # Safety
///
/// `base` must point to `len` bytes that are valid for reads and writes from any thread, initialised, aligned to
/// 64 bytes, and stay so until the implementor is dropped. Every byte is accessed through raw pointers
/// only; exclusive access to a block is the block table's promise.
#[allow(unsafe_code)] // Declares a contract; the blocks that rely on it are in `engine` and `transfer`.
pub unsafe trait Memory: Send + Sync + 'static {
    /// First byte.
    fn base(&self) -> NonNull<u8>;
    /// Size in bytes.
    fn len(&self) -> usize;
    /// Which processor's memory this is.
    fn kind(&self) -> MemoryKind;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
