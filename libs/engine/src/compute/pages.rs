//! Memory for packed weights.

use std::io;

use memmap2::MmapMut;

/// Zeroed bytes, aligned to a page. Huge pages are asked for: weights are read in full for every token, and with small
/// pages the page walks show.
pub(crate) struct Pages {
    map: MmapMut,
    len: usize,
}

impl Pages {
    pub(crate) fn zeroed(len: usize) -> io::Result<Self> {
        let map = MmapMut::map_anon(len.max(1))?;
        #[cfg(target_os = "linux")]
        // A kernel without huge pages refuses; the memory works all the same.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map, len })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map[..self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[..self.len]
    }
}
