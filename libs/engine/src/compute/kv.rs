//! KV in the blocks of a pool: writing a token's, and unpacking panels of tokens for attention.
//!
//! Invariant: a block's bytes depend only on the tokens up to its last one. Whoever writes slot 0 of a block zero-fills the layer's
//! slice first, so that even the slots not yet used do.
//!
//! The block table promises that no one else writes to the blocks of a step, nor reads the slots that it writes. Offsets are
//! checked against the pool here, once per access to a head's slice.
//!
//! Rounding: binary16 and bfloat16 to the nearest, ties to even. Bytes per head and token: `scale = greatest / 127`,
//! `code = round(value / scale)`, ties to even, `value = code * scale`.

use std::slice;
use std::sync::Arc;

use half::bf16;
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
    pub(crate) unsafe fn write(&self, isa: Isa, at: TokenSlot, k: &[f32], v: &[f32], scratch: &mut Rounded) {
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
                let (k_halves, v_halves) = room(&mut scratch.halves, k, v);
                to_f16(isa, k, k_halves);
                to_f16(isa, v, v_halves);
                // SAFETY: the caller's promise is ours.
                unsafe { self.scatter::<u16>(at, k_halves, v_halves) };
            }
            KvDtype::Bf16 => {
                let (k_halves, v_halves) = room(&mut scratch.halves, k, v);
                for (from, to) in [(k, &mut *k_halves), (v, &mut *v_halves)] {
                    for (value, half) in from.iter().zip(to) {
                        *half = bf16::from_f32(*value).to_bits();
                    }
                }
                // SAFETY: the caller's promise is ours.
                unsafe { self.scatter::<u16>(at, k_halves, v_halves) };
            }
            KvDtype::Int8 => {
                let (k_codes, v_codes) = room(&mut scratch.codes, k, v);
                let heads = |values: &[f32], codes: &mut [i8], base: fn(&KvLayout, usize, usize) -> usize| {
                    let heads = values
                        .chunks_exact(layout.head_dim)
                        .zip(codes.chunks_exact_mut(layout.head_dim));
                    for (head, (values, codes)) in heads.enumerate() {
                        let scale = to_bytes(values, codes);
                        // SAFETY: the caller's promise is ours.
                        unsafe { self.write_scale(at, base(layout, layer, head), scale) };
                    }
                };
                heads(k, k_codes, KvLayout::k_offset);
                heads(v, v_codes, KvLayout::v_offset);
                // SAFETY: the caller's promise is ours.
                unsafe { self.scatter::<i8>(at, k_codes, v_codes) };
            }
            // SAFETY: the caller's promise is ours.
            KvDtype::F32 => unsafe { self.scatter::<f32>(at, k, v) },
        }
    }

    /// Writes what a slot's codes of a head are multiplied with; `head` is where K or V of the head begins in the block.
    ///
    /// # Safety
    ///
    /// As [`Pool::write`].
    unsafe fn write_scale(&self, at: TokenSlot, head: usize, scale: f32) {
        assert!(at.slot < self.layout.block_tokens, "a slot of this layout");
        let offset = head + self.layout.scales_offset() + at.slot * size_of::<f32>();
        let place = self.at(at.block, offset, size_of::<f32>());
        // SAFETY: four bytes of the pool, as just checked. A head has a multiple of eight codes before its scales, and whole words
        // of scales, so that they are aligned.
        unsafe { place.cast::<f32>().write(scale) };
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

/// Room for a token's K and V as they are stored.
#[derive(Default)]
pub(crate) struct Rounded {
    halves: Vec<u16>,
    codes: Vec<i8>,
}

fn room<'a, T: Clone + Default>(buffer: &'a mut Vec<T>, k: &[f32], v: &[f32]) -> (&'a mut [T], &'a mut [T]) {
    buffer.resize(k.len() + v.len(), T::default());
    buffer.split_at_mut(k.len())
}

/// Rounds a head to bytes, and gives what they are to be multiplied with.
fn to_bytes(values: &[f32], codes: &mut [i8]) -> f32 {
    let greatest = values
        .iter()
        .fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
    let scale = greatest / 127.0;
    for (value, code) in values.iter().zip(codes) {
        // All are 0 where the scale is: 0 / 0 is no number, which is 0 as an integer.
        *code = (value / scale).round_ties_even() as i8;
    }
    scale
}

/// The place of one token's KV in one layer.
#[derive(Clone, Copy)]
pub(crate) struct TokenSlot {
    pub(crate) layer: usize,
    pub(crate) block: BlockId,
    pub(crate) slot: usize,
}

/// An element of KV in its stored form.
trait Element {
    type Stored: Copy + Default + 'static;

    /// Whether a head's tokens have scales.
    const SCALED: bool;

    fn load<L: Lanes>(from: &[Self::Stored; LANES]) -> L;
}

macro_rules! elements {
    ($($name:ident: $stored:ty, $scaled:literal, $load:ident;)*) => {
        $(
            struct $name;
            impl Element for $name {
                type Stored = $stored;
                const SCALED: bool = $scaled;
                #[inline(always)]
                fn load<L: Lanes>(from: &[$stored; LANES]) -> L {
                    L::$load(from)
                }
            }
        )*
    };
}

elements! {
    Binary16: u16, false, from_f16;
    Bfloat16: u16, false, from_bf16;
    Binary32: f32, false, load;
    Byte: i8, true, from_i8;
}

/// Evaluates `$body` with `$element` bound to the element of a format.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            KvDtype::F16 => {
                type $element = Binary16;
                $body
            }
            KvDtype::Bf16 => {
                type $element = Bfloat16;
                $body
            }
            KvDtype::F32 => {
                type $element = Binary32;
                $body
            }
            KvDtype::Int8 => {
                type $element = Byte;
                $body
            }
        }
    };
}

impl HeadOf<'_> {
    /// K (or V) of the head in the sequence's block `index`.
    #[inline(always)]
    fn slice<T: Element>(&self, index: usize, values: bool) -> &[T::Stored] {
        let layout = &self.pool.layout;
        let base = self
            .pool
            .at(self.blocks[index], self.offset(values), layout.head_bytes());
        // SAFETY: `head_bytes` bytes, aligned to the element; during attention no one writes to a block of the step.
        unsafe { slice::from_raw_parts(base.cast::<T::Stored>(), layout.head_dim * layout.block_tokens) }
    }

    /// What the tokens' codes are multiplied with; nothing where they have no scales.
    #[inline(always)]
    fn scales<T: Element>(&self, index: usize, values: bool) -> &[f32] {
        if !T::SCALED {
            return &[];
        }
        let layout = &self.pool.layout;
        let bytes = layout.block_tokens * size_of::<f32>();
        let base = self.pool.at(
            self.blocks[index],
            self.offset(values) + layout.scales_offset(),
            bytes,
        );
        // SAFETY: as above; scales are aligned, since a head has a multiple of eight codes before them.
        unsafe { slice::from_raw_parts(base.cast::<f32>(), layout.block_tokens) }
    }

    #[inline(always)]
    fn offset(&self, values: bool) -> usize {
        let layout = &self.pool.layout;
        if values {
            layout.v_offset(self.layer, self.kv_head)
        } else {
            layout.k_offset(self.layer, self.kv_head)
        }
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
    with_element!(head.pool.layout.dtype, T => unpack_key_elements::<L, T>(head, position, count, panel));
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
        let (keys, scales) = (head.slice::<T>(block, false), head.scales::<T>(block, false));
        let scale = |first: usize, lanes: L| {
            if T::SCALED {
                let of = &scales[slot + first..];
                lanes.mul(match of.first_chunk::<LANES>() {
                    Some(of) => L::load(of),
                    None => L::load_partial(of, 0.0),
                })
            } else {
                lanes
            }
        };
        for (keys, out) in keys.chunks_exact(tokens).zip(panel.iter_mut()) {
            let keys = &keys[slot..][..run];
            let (chunks, rest) = keys.as_chunks::<LANES>();
            let (outs, _) = out[start..].as_chunks_mut::<LANES>();
            for (index, (keys, out)) in chunks.iter().zip(outs).enumerate() {
                scale(index * LANES, T::load::<L>(keys)).store(out);
            }
            if !rest.is_empty() {
                let mut lanes = [T::Stored::default(); LANES];
                lanes[..rest.len()].copy_from_slice(rest);
                let first = run - rest.len();
                scale(first, T::load::<L>(&lanes)).store_partial(&mut out[start..start + rest.len()]);
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
    with_element!(head.pool.layout.dtype, T => unpack_value_elements::<L, T>(head, position, count, panel));
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
        let scale = if T::SCALED {
            L::splat(head.scales::<T>(block, true)[slot])
        } else {
            L::splat(1.0)
        };
        let scaled = |lanes: L| if T::SCALED { lanes.mul(scale) } else { lanes };
        let (chunks, rest) = values.as_chunks::<LANES>();
        let (outs, _) = out.as_chunks_mut::<LANES>();
        for (values, out) in chunks.iter().zip(outs.iter_mut()) {
            scaled(T::load::<L>(values)).store(out);
        }
        if !rest.is_empty() {
            let mut lanes = [T::Stored::default(); LANES];
            lanes[..rest.len()].copy_from_slice(rest);
            scaled(T::load::<L>(&lanes)).store(&mut outs[chunks.len()]);
        }
    }
}

#[cfg(test)]
mod tests;
