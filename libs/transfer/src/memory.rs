//! Memory of this process, and checked access to the bytes of any [`Memory`] that is readable here.
//!
//! The functions that touch bytes are safe to call in the sense of bounds: no argument makes them leave the
//! region. That nobody else uses the same bytes meanwhile is beyond the type system, since peers and kernels
//! take part; it is the block table's promise, and their soundness rests on it: a caller touches a block only
//! between the table handing it out and taking it back, and never while a write grant covers it.
//!
//! Elsewhere: moving bytes between processes ([`crate::transport`]).

use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use types::{ErrorCode, Memory, MemoryKind};

mod file;
mod placement;

pub use file::{read_file, write_file};
pub use placement::{HugePages, Placement, place};

/// Why memory could not be had, or not be touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The system gave none.
    #[error("cannot map {bytes} bytes of memory: {reason}")]
    Allocate {
        /// What was asked for.
        bytes: usize,
        /// The system's words.
        reason: String,
    },
    /// The range is not inside the region.
    #[error("{len} bytes at offset {offset} are outside a memory of {memory_bytes} bytes")]
    OutOfBounds {
        /// First byte.
        offset: usize,
        /// How many bytes.
        len: usize,
        /// What there is.
        memory_bytes: usize,
    },
    /// The bytes cannot be reached from this process.
    #[error("memory of kind {kind:?} is not readable by this process")]
    NotHost {
        /// The memory's kind.
        kind: MemoryKind,
    },
}

impl MemoryError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Allocate { .. } => ErrorCode::Overloaded,
            Self::OutOfBounds { .. } | Self::NotHost { .. } => ErrorCode::Invalid,
        }
    }
}

impl From<MemoryError> for types::Error {
    fn from(error: MemoryError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Anonymous, private, page-aligned memory, zeroed at first and unmapped on drop.
///
/// The system commits a page when it is first touched.
#[derive(Debug)]
pub struct HostMemory {
    map: MmapRaw,
}

impl HostMemory {
    /// Maps `bytes` bytes, on pages of whatever size the system takes by itself.
    pub fn allocate(bytes: usize) -> Result<Arc<Self>, MemoryError> {
        Self::allocate_on(bytes, HugePages::Off)
    }

    /// Maps `bytes` bytes; on reserved huge pages, of which it takes whole ones, only where that is asked for and there are any.
    /// See [`place`] for the rest.
    pub fn allocate_on(bytes: usize, huge_pages: HugePages) -> Result<Arc<Self>, MemoryError> {
        let fail = |reason: String| MemoryError::Allocate { bytes, reason };
        if bytes == 0 {
            return Err(fail("a memory needs at least one byte".into()));
        }
        // A Rust allocation, and so pointer arithmetic in one, ends there.
        if isize::try_from(bytes).is_err() {
            return Err(fail("more than the address space".into()));
        }
        let reserved = match huge_pages {
            HugePages::Reserved => reserved_pages(bytes),
            HugePages::Auto | HugePages::Off => None,
        };
        let map = reserved.map_or_else(|| MmapMut::map_anon(bytes), Ok);
        let map = map.map_err(|error| fail(error.to_string()))?;
        Ok(Arc::new(Self { map: map.into() }))
    }
}

/// Pages of 2 MiB, if the system has enough of them in reserve.
fn reserved_pages(bytes: usize) -> Option<MmapMut> {
    const PAGE_BITS: u8 = 21;
    let whole = bytes.checked_next_multiple_of(1 << PAGE_BITS)?;
    MmapOptions::new()
        .len(whole)
        .huge(Some(PAGE_BITS))
        .map_anon()
        .ok()
}

// SAFETY: the mapping is readable and writable, zeroed by the system, page-aligned, never moved or resized,
// and lives until `map` is dropped. `MmapRaw` gives out raw pointers only.
unsafe impl Memory for HostMemory {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).expect("a mapping is never at address zero")
    }

    fn len(&self) -> usize {
        self.map.len()
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }
}

/// Copies `len` bytes at `offset` out of the memory. See the module documentation for what the caller owes.
pub fn copy_out(memory: &dyn Memory, offset: usize, len: usize) -> Result<Vec<u8>, MemoryError> {
    let source = checked(memory, offset, len)?;
    let mut bytes = vec![0; len];
    // SAFETY: `checked` proved `len` bytes at `source` valid for reads; `bytes` is fresh, so they do not overlap.
    // Nobody writes them meanwhile: the block table's promise (module documentation).
    unsafe { source.copy_to_nonoverlapping(NonNull::from(bytes.as_mut_slice()).cast(), len) };
    Ok(bytes)
}

/// Copies `bytes` to `offset` of the memory. See the module documentation for what the caller owes.
pub fn copy_in(memory: &dyn Memory, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
    let target = checked(memory, offset, bytes.len())?;
    // SAFETY: `checked` proved the target valid for writes. A plain `copy` because `bytes` may itself be of
    // this memory. Nobody else uses the target meanwhile: the block table's promise (module documentation).
    unsafe { std::ptr::copy(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
    Ok(())
}

/// Lends `len` bytes at `offset` to `look`, without a copy, as for a checksum. See the module documentation
/// for what the caller owes; here it is owed until `look` returns.
pub fn with_bytes<R>(
    memory: &dyn Memory,
    offset: usize,
    len: usize,
    look: impl FnOnce(&[u8]) -> R,
) -> Result<R, MemoryError> {
    let start = checked(memory, offset, len)?;
    // SAFETY: `checked` proved `len` bytes at `start` valid for reads, and they are initialised (contract of
    // `Memory`); the slice lives only during `look`, while `memory` is borrowed. Nobody writes them meanwhile:
    // the block table's promise (module documentation).
    let bytes = unsafe { std::slice::from_raw_parts(start.as_ptr(), len) };
    Ok(look(bytes))
}

/// The address of `offset`, if `len` bytes there are inside the memory and reachable.
fn checked(memory: &dyn Memory, offset: usize, len: usize) -> Result<NonNull<u8>, MemoryError> {
    match memory.kind() {
        MemoryKind::Host => {}
        kind @ MemoryKind::Device(_) => return Err(MemoryError::NotHost { kind }),
    }
    let memory_bytes = memory.len();
    if offset.checked_add(len).is_none_or(|end| end > memory_bytes) {
        return Err(MemoryError::OutOfBounds {
            offset,
            len,
            memory_bytes,
        });
    }
    // SAFETY: `offset <= memory_bytes`, so the result is inside the region or one past its end.
    Ok(unsafe { memory.base().add(offset) })
}

#[cfg(test)]
mod tests;
