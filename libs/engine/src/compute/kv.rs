//! KV in the blocks of a pool: writing a token's, and unpacking panels of tokens for attention.
//!
//! Invariant: a block's bytes depend only on the tokens up to its last one. Whoever writes slot 0 of a block zero-fills the layer's
//! slice first, so that even the slots not yet used do.
//!
//! The block table promises that no one else writes to the blocks of a step, nor reads the slots that it writes. Offsets are
//! checked against the pool here, once per access to a head's slice.

use std::slice;
use std::sync::Arc;

use types::{BlockId, KvDtype, KvLayout, Memory, MemoryKind};

use super::isa::Isa;
use super::lanes::{LANES, Lanes};
use super::math::to_f16;

/// Tokens that are unpacked at a time.
pub(crate) const PANEL: usize = 32;

/// A pool of blocks.
#[derive(Clone)]
pub(crate) struct Pool {
    memory: Arc<dyn Memory>,
    layout: KvLayout,
}

/// Which slices of a pool an access is about.
#[derive(Clone, Copy)]
pub(crate) struct HeadOf<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) blocks: &'a [BlockId],
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
}

impl Pool {
    /// `None` unless the memory is this process's own.
    pub(crate) fn new(memory: Arc<dyn Memory>, layout: KvLayout) -> Option<Self> {
        (memory.kind() == MemoryKind::Host).then_some(Self { memory, layout })
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Blocks that fit the memory.
    pub(crate) fn blocks(&self) -> usize {
        self.memory.len() / self.layout.block_bytes()
    }

    /// `bytes` bytes at `offset` of a block.
    fn at(&self, block: BlockId, offset: usize, bytes: usize) -> *mut u8 {
        let start = block.0 as usize * self.layout.block_bytes() + offset;
        assert!(
            start + bytes <= self.memory.len(),
            "block {block} is beyond the pool"
        );
        // SAFETY: within the memory's `len` bytes, as just checked.
        unsafe { self.memory.base().as_ptr().add(start) }
    }

    /// Writes K and V, each `[kv_heads][head_dim]`, of the token at `position` of a sequence.
    ///
    /// # Safety
    ///
    /// No one else may access the block's layer slice meanwhile.
    pub(crate) unsafe fn write(&self, isa: Isa, at: TokenSlot, k: &[f32], v: &[f32], halves: &mut Vec<u16>) {
        let layout = &self.layout;
        let (layer, block) = (at.layer, at.block);
        let offset = layout.layer_range(layer).start;
        let slice = self.at(block, offset, layout.layer_bytes());
        if at.slot == 0 {
            // SAFETY: `slice` is `layer_bytes` long, and ours alone.
            unsafe { slice.write_bytes(0, layout.layer_bytes()) };
        }
        match layout.dtype {
            KvDtype::F16 => {
                halves.resize(k.len() + v.len(), 0);
                let (k_halves, v_halves) = halves.split_at_mut(k.len());
                to_f16(isa, k, k_halves);
                to_f16(isa, v, v_halves);
                // SAFETY: the caller's promise is ours.
                unsafe { self.scatter::<u16>(at, k_halves, v_halves) };
            }
            // SAFETY: the caller's promise is ours.
            KvDtype::F32 => unsafe { self.scatter::<f32>(at, k, v) },
        }
    }

    /// # Safety
    ///
    /// As [`Pool::write`]; `T` is the layout's element.
    unsafe fn scatter<T: Copy>(&self, at: TokenSlot, k: &[T], v: &[T]) {
        let layout = &self.layout;
        let (tokens, head_dim) = (layout.block_tokens, layout.head_dim);
        assert!(
            at.slot < tokens && size_of::<T>() == layout.dtype.bytes(),
            "a slot of this layout"
        );
        for (head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let k_base = self
                .at(at.block, layout.k_offset(at.layer, head), layout.head_bytes())
                .cast::<T>();
            let v_base = self
                .at(at.block, layout.v_offset(at.layer, head), layout.head_bytes())
                .cast::<T>();
            for (dim, value) in k.iter().enumerate() {
                // SAFETY: `dim * tokens + slot` is below `head_dim * tokens`, the elements of the head; the offset of a head
                // is a multiple of the element's size and the pool is aligned to 64.
                unsafe { k_base.add(dim * tokens + at.slot).write(*value) };
            }
            // SAFETY: as above, for `head_dim` elements from `slot * head_dim`.
            unsafe {
                v_base
                    .add(at.slot * head_dim)
                    .copy_from_nonoverlapping(v.as_ptr(), head_dim)
            };
        }
    }
}

/// The place of one token's KV in one layer.
#[derive(Clone, Copy)]
pub(crate) struct TokenSlot {
    pub(crate) layer: usize,
    pub(crate) block: BlockId,
    pub(crate) slot: usize,
}

/// An element of KV.
trait Element: Copy + Default + 'static {
    fn load<L: Lanes>(from: &[Self; LANES]) -> L;
}

impl Element for u16 {
    #[inline(always)]
    fn load<L: Lanes>(from: &[Self; LANES]) -> L {
        L::from_f16(from)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn load<L: Lanes>(from: &[Self; LANES]) -> L {
        L::load(from)
    }
}

impl HeadOf<'_> {
    /// K (or V) of the head in the sequence's block `index`.
    #[inline(always)]
    fn slice<T: Element>(&self, index: usize, values: bool) -> &[T] {
        let layout = &self.pool.layout;
        let offset = if values {
            layout.v_offset(self.layer, self.kv_head)
        } else {
            layout.k_offset(self.layer, self.kv_head)
        };
        let base = self.pool.at(self.blocks[index], offset, layout.head_bytes());
        // SAFETY: `head_bytes` bytes, aligned to the element; during attention no one writes to a block of the step.
        unsafe { slice::from_raw_parts(base.cast::<T>(), layout.head_dim * layout.block_tokens) }
    }
}

/// Unpacks K of the `count` tokens from `position` (a multiple of [`PANEL`]) on to `[head_dim][PANEL]`. Lanes beyond `count` are
/// unspecified.
#[inline(always)]
pub(crate) fn unpack_keys_lanes<L: Lanes>(
    head: HeadOf<'_>,
    position: usize,
    count: usize,
    panel: &mut [[f32; PANEL]],
) {
    match head.pool.layout.dtype {
        KvDtype::F16 => unpack_key_elements::<L, u16>(head, position, count, panel),
        KvDtype::F32 => unpack_key_elements::<L, f32>(head, position, count, panel),
    }
}

#[inline(always)]
fn unpack_key_elements<L: Lanes, T: Element>(
    head: HeadOf<'_>,
    position: usize,
    count: usize,
    panel: &mut [[f32; PANEL]],
) {
    let tokens = head.pool.layout.block_tokens;
    let run = tokens.min(PANEL);
    for start in (0..count).step_by(run) {
        let (block, slot) = ((position + start) / tokens, (position + start) % tokens);
        let keys = head.slice::<T>(block, false);
        for (keys, out) in keys.chunks_exact(tokens).zip(panel.iter_mut()) {
            let keys = &keys[slot..][..run];
            let (chunks, rest) = keys.as_chunks::<LANES>();
            let (outs, _) = out[start..].as_chunks_mut::<LANES>();
            for (keys, out) in chunks.iter().zip(outs) {
                T::load::<L>(keys).store(out);
            }
            if !rest.is_empty() {
                let mut lanes = [T::default(); LANES];
                lanes[..rest.len()].copy_from_slice(rest);
                T::load::<L>(&lanes).store_partial(&mut out[start..start + rest.len()]);
            }
        }
    }
}

/// Unpacks V of the `count` tokens from `position` on to `[count][stride]`, `stride` being `head_dim` rounded up to whole vectors,
/// with zeros in the columns beyond the head.
#[inline(always)]
pub(crate) fn unpack_values_lanes<L: Lanes>(
    head: HeadOf<'_>,
    position: usize,
    count: usize,
    panel: &mut [f32],
) {
    match head.pool.layout.dtype {
        KvDtype::F16 => unpack_value_elements::<L, u16>(head, position, count, panel),
        KvDtype::F32 => unpack_value_elements::<L, f32>(head, position, count, panel),
    }
}

#[inline(always)]
fn unpack_value_elements<L: Lanes, T: Element>(
    head: HeadOf<'_>,
    position: usize,
    count: usize,
    panel: &mut [f32],
) {
    let (tokens, head_dim) = (head.pool.layout.block_tokens, head.pool.layout.head_dim);
    let stride = head_dim.next_multiple_of(LANES);
    for (token, out) in panel.chunks_exact_mut(stride).take(count).enumerate() {
        let (block, slot) = ((position + token) / tokens, (position + token) % tokens);
        let values = &head.slice::<T>(block, true)[slot * head_dim..][..head_dim];
        let (chunks, rest) = values.as_chunks::<LANES>();
        let (outs, _) = out.as_chunks_mut::<LANES>();
        for (values, out) in chunks.iter().zip(outs.iter_mut()) {
            T::load::<L>(values).store(out);
        }
        if !rest.is_empty() {
            let mut lanes = [T::default(); LANES];
            lanes[..rest.len()].copy_from_slice(rest);
            T::load::<L>(&lanes).store(&mut outs[chunks.len()]);
        }
    }
}

#[cfg(test)]
mod tests;
