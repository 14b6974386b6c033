//! The two files of a disk tier: `blocks`, one slot after the other, and `index`, which says what each slot holds.
//!
//! Invariant: a record names a slot only while the slot holds, completely, what the record says. A writer clears the record, writes the
//! block, and then writes the record. So a process that is killed at any moment leaves a slot empty or right. Nothing is
//! synchronised to the medium: after a loss of power a record may be older or newer than its block, which the checksum
//! shows to every reader.
//!
//! Blocks go past the page cache where the file system allows it (direct I/O) and the size of a block is a multiple of a page: the pool is
//! the cache, and a second copy in the page cache would only displace it. Records go through the page cache.
//!
//! Elsewhere: bytes of the index (`format.rs`), threads (`workers.rs`), which slot to use (`table.rs`).

use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use transfer::{HostMemory, memory};
use types::{BlockHash, Memory};

use super::OpenError;
use super::format::{HEADER_BYTES, Header, HeaderError, RECORD_BYTES, Record};
use super::table::SlotId;

/// What direct I/O needs of addresses, positions and lengths on every disk of today.
const DIRECT_ALIGNMENT: usize = 4096;
/// Records read at once when a tier is opened.
const RECORDS_PER_READ: usize = 16 * 1024;

/// What a disk does for a tier. The seam at which tests make it fail, fill up or slow down.
pub trait BlockFile: Send + Sync + 'static {
    /// Fills the block at `offset` of `memory` with what the slot holds.
    fn read(&self, slot: SlotId, memory: &dyn Memory, offset: usize) -> io::Result<()>;
    /// Writes the block at `offset` of `memory` to the slot.
    fn write(&self, slot: SlotId, memory: &dyn Memory, offset: usize) -> io::Result<()>;
    /// Says what the slot holds: nothing, or this.
    fn write_record(&self, slot: SlotId, record: Option<&Record>) -> io::Result<()>;
}

/// The files, locked for this process.
#[derive(Debug)]
pub struct BlockFiles {
    blocks: File,
    index: File,
    instance: u64,
    block_bytes: usize,
    slot_bytes: u64,
    is_direct: bool,
}

/// What an earlier process left.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Every slot with a record, in the order of the slots.
    pub records: Vec<(SlotId, Record)>,
    /// Why what was there is not used, if it is not.
    pub dropped: Option<String>,
}

impl BlockFiles {
    /// Opens the files in `folder` for `capacity` slots, or makes them. Blocks of another space or format are dropped.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(
        folder: &Path,
        block_bytes: usize,
        root: BlockHash,
        capacity: u32,
    ) -> Result<(Self, Recovered), OpenError> {
        let fail = |path: &Path, error: io::Error| OpenError::File {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        fs::create_dir_all(folder).map_err(|error| fail(folder, error))?;
        let index_path = folder.join("index");
        let index = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&index_path);
        let index = index.map_err(|error| fail(&index_path, error))?;
        match index.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path: index_path }),
            Err(TryLockError::Error(error)) => return Err(fail(&index_path, error)),
        }
        let wanted = Header {
            block_bytes: block_bytes as u64,
            root,
            instance: RandomState::new().hash_one(std::process::id()),
        };
        let (instance, recovered) =
            recover(&index, wanted, capacity).map_err(|error| fail(&index_path, error))?;
        let instance = instance.ok_or_else(|| OpenError::Foreign {
            path: index_path.clone(),
        })?;
        let slot_bytes = slot_bytes(block_bytes);
        let blocks_path = folder.join("blocks");
        let (blocks, is_direct) = open_blocks(&blocks_path, block_bytes, slot_bytes * u64::from(capacity))
            .map_err(|error| fail(&blocks_path, error))?;
        let files = Self {
            blocks,
            index,
            instance,
            block_bytes,
            slot_bytes,
            is_direct,
        };
        Ok((files, recovered))
    }

    /// Whether blocks go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    fn position(&self, slot: SlotId) -> u64 {
        u64::from(slot.0) * self.slot_bytes
    }
}

impl BlockFile for BlockFiles {
    fn read(&self, slot: SlotId, memory: &dyn Memory, offset: usize) -> io::Result<()> {
        memory::read_file(
            memory,
            offset,
            self.block_bytes,
            &self.blocks,
            self.position(slot),
        )
    }

    fn write(&self, slot: SlotId, memory: &dyn Memory, offset: usize) -> io::Result<()> {
        memory::write_file(
            memory,
            offset,
            self.block_bytes,
            &self.blocks,
            self.position(slot),
        )
    }

    fn write_record(&self, slot: SlotId, record: Option<&Record>) -> io::Result<()> {
        let position = HEADER_BYTES as u64 + u64::from(slot.0) * RECORD_BYTES as u64;
        let bytes = record.map_or([0; RECORD_BYTES], |record| record.encode(slot, self.instance));
        self.index.write_all_at(&bytes, position)
    }
}

/// Bytes of a slot that holds blocks of this size.
pub fn slot_bytes(block_bytes: usize) -> u64 {
    block_bytes.next_multiple_of(DIRECT_ALIGNMENT) as u64
}

/// Takes over what the index says, or begins it anew. No instance: the file is somebody else's.
fn recover(index: &File, wanted: Header, capacity: u32) -> io::Result<(Option<u64>, Recovered)> {
    let mut dropped = None;
    if index.metadata()?.len() > 0 {
        let mut bytes = [0; HEADER_BYTES];
        let found = match index.read_exact_at(&mut bytes, 0) {
            Ok(()) => Header::decode(&bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Header::decode(&bytes),
            Err(error) => return Err(error),
        };
        match found {
            Ok(header) if header.root != wanted.root => {
                dropped = Some(format!(
                    "its blocks are of space {}, not {}",
                    header.root, wanted.root
                ));
            }
            Ok(header) if header.block_bytes != wanted.block_bytes => {
                let (found, wanted) = (header.block_bytes, wanted.block_bytes);
                dropped = Some(format!("its blocks have {found} bytes, not {wanted}"));
            }
            Ok(header) => {
                let recovered = Recovered {
                    records: read_records(index, header.instance, capacity)?,
                    dropped: None,
                };
                return Ok((Some(header.instance), recovered));
            }
            Err(HeaderError::Foreign) => return Ok((None, Recovered::default())),
            Err(error @ (HeaderError::Version { .. } | HeaderError::Damaged)) => {
                dropped = Some(error.to_string());
            }
        }
    }
    // The new instance makes every old record none.
    index.write_all_at(&wanted.encode(), 0)?;
    let recovered = Recovered {
        records: Vec::new(),
        dropped,
    };
    Ok((Some(wanted.instance), recovered))
}

fn read_records(index: &File, instance: u64, capacity: u32) -> io::Result<Vec<(SlotId, Record)>> {
    let mut records = Vec::new();
    let mut bytes = vec![0; RECORDS_PER_READ * RECORD_BYTES];
    let mut slot = 0_u32;
    let mut position = HEADER_BYTES as u64;
    while slot < capacity {
        let read = read_at_most(index, &mut bytes, position)?;
        let (whole, _torn) = bytes[..read].as_chunks::<RECORD_BYTES>();
        if whole.is_empty() {
            break;
        }
        for record in whole {
            let id = SlotId(slot);
            if slot < capacity
                && let Some(record) = Record::decode(record, id, instance)
            {
                records.push((id, record));
            }
            slot = slot.saturating_add(1);
        }
        position += (whole.len() * RECORD_BYTES) as u64;
    }
    Ok(records)
}

/// Reads until the buffer is full or the file ends.
fn read_at_most(file: &File, bytes: &mut [u8], position: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < bytes.len() {
        match file.read_at(&mut bytes[read..], position + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// Opens the file of blocks past the page cache, if a page can be written to and read from `scratch` so; else through it. A slot
/// that was never written reads as zeros, which no checksum takes for a block.
fn open_blocks(path: &Path, block_bytes: usize, scratch: u64) -> io::Result<(File, bool)> {
    let (file, is_direct) = open_file(path, block_bytes, scratch)?;
    let wanted = scratch + slot_bytes(block_bytes);
    if file.metadata()?.len() < wanted {
        file.set_len(wanted)?;
    }
    Ok((file, is_direct))
}

fn open_file(path: &Path, block_bytes: usize, scratch: u64) -> io::Result<(File, bool)> {
    let open = |flags| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.custom_flags(flags).open(path)
    };
    if !block_bytes.is_multiple_of(DIRECT_ALIGNMENT) {
        tracing::info!(
            block_bytes,
            "the disk tier goes through the page cache: a block is no multiple of {DIRECT_ALIGNMENT} bytes"
        );
        return Ok((open(0)?, false));
    }
    let direct = open(libc::O_DIRECT).and_then(|file| {
        let page = HostMemory::allocate(DIRECT_ALIGNMENT).map_err(io::Error::other)?;
        memory::write_file(page.as_ref(), 0, DIRECT_ALIGNMENT, &file, scratch)?;
        memory::read_file(page.as_ref(), 0, DIRECT_ALIGNMENT, &file, scratch)?;
        Ok(file)
    });
    match direct {
        Ok(file) => Ok((file, true)),
        // What a file system says that cannot do it. A full or failing disk is the breaker's to find.
        Err(error) => {
            let reason = error.to_string();
            tracing::info!(%reason, "the disk tier goes through the page cache: no direct I/O here");
            Ok((open(0)?, false))
        }
    }
}

#[cfg(test)]
mod tests;
