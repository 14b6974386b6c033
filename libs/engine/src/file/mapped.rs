//! A read-only file in memory.

use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use super::LoadError;

/// The bytes of a file, mapped, with the path for messages.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let io_error = |source| LoadError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io_error)?;
        let metadata = file.metadata().map_err(io_error)?;
        if !metadata.is_file() {
            return Err(io_error(io::Error::other("not a regular file")));
        }
        if metadata.len() == 0 {
            return Err(LoadError::Malformed {
                path: path.to_owned(),
                detail: "the file is empty".into(),
            });
        }
        // SAFETY: the mapping is private and read-only, and nothing in this process writes to model files. As with
        // every program that maps its weights, another process that truncates the file while it is in use
        // would raise SIGBUS; model files are replaced by renaming, which leaves the mapped one whole.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of a range that was checked against the file's length when its header was read.
    pub(super) fn range(&self, range: &Range<usize>) -> &[u8] {
        &self.map[range.clone()]
    }

    /// Gives back the memory of pages that were read and will hardly be read again: they come back from the file if they are.
    pub(super) fn release(&self, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            // Whole pages only, whatever their size: the rest of one may be in use.
            const PAGE: usize = 64 << 10;
            let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
            if start < end && end <= self.map.len() {
                // SAFETY: the mapping is of a file and never written to, so that a page which is dropped is read from the file
                // again, with the same bytes.
                let _ = unsafe {
                    self.map
                        .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    pub(super) fn malformed(&self, detail: impl Into<String>) -> LoadError {
        LoadError::Malformed {
            path: self.path.clone(),
            detail: detail.into(),
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
