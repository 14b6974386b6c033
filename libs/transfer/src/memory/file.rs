//! Bytes between a file and raw memory, without a copy in between.
//!
//! As in `cursor.rs`, the kernel moves them and this process never looks at them, so direct I/O works where the caller's
//! offsets and lengths are aligned. Both calls block for as long as the disk takes: they belong on threads of their own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use types::Memory;

use super::checked;

/// Fills `len` bytes at `offset` of the memory with those at `position` of the file. The end of the file before
/// that is [`io::ErrorKind::UnexpectedEof`]. See the module documentation of `memory` for what the caller owes; after an error the
/// bytes are unspecified.
pub fn read_file(
    memory: &dyn Memory,
    offset: usize,
    len: usize,
    file: &File,
    position: u64,
) -> io::Result<()> {
    transfer(memory, offset, len, position, |address, count, at| {
        // SAFETY: `transfer` proved `count` bytes at `address` valid for writes, and the kernel writes no more. Nobody else uses
        // them meanwhile: the block table's promise.
        unsafe { libc::pread(file.as_raw_fd(), address.cast(), count, at) }
    })
}

/// Writes `len` bytes at `offset` of the memory to `position` of the file. See the module documentation of `memory` for
/// what the caller owes.
pub fn write_file(
    memory: &dyn Memory,
    offset: usize,
    len: usize,
    file: &File,
    position: u64,
) -> io::Result<()> {
    transfer(memory, offset, len, position, |address, count, at| {
        // SAFETY: `transfer` proved `count` bytes at `address` valid for reads, and they are initialised (contract of
        // `Memory`). Nobody writes them meanwhile: the block table's promise.
        unsafe { libc::pwrite(file.as_raw_fd(), address.cast(), count, at) }
    })
}

/// Calls `call` until everything is moved. `call` gets an address of the memory, how many bytes are left there, and their place in
/// the file.
fn transfer(
    memory: &dyn Memory,
    offset: usize,
    len: usize,
    position: u64,
    call: impl Fn(*mut u8, usize, libc::off_t) -> isize,
) -> io::Result<()> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let start = checked(memory, offset, len).map_err(|error| invalid(error.to_string()))?;
    let mut done = 0;
    while done < len {
        let at = position.checked_add(done as u64);
        let at = at.and_then(|at| libc::off_t::try_from(at).ok());
        let at = at.ok_or_else(|| invalid(format!("no file has a position {position}")))?;
        // SAFETY: `done < len`, and `checked` proved `len` bytes at `start` to be inside the memory.
        let address = unsafe { start.add(done) };
        match usize::try_from(call(address.as_ptr(), len - done, at)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
