use rstest::rstest;

use super::*;
use crate::compute::isa::kernel;
use crate::monolith::OwnMemory;

kernel! {
    fn keys(head: HeadOf<'_>, position: usize, count: usize, panel: &mut [[f32; PANEL]]) = unpack_keys_lanes
}

kernel! {
    fn values(head: HeadOf<'_>, position: usize, count: usize, panel: &mut [f32]) = unpack_values_lanes
}

const TOKENS: usize = 71;

fn layout(dtype: KvDtype, block_tokens: usize, head_dim: usize) -> KvLayout {
    KvLayout {
        layers: 2,
        kv_heads: 3,
        head_dim,
        block_tokens,
        dtype,
    }
}

fn element(token: usize, head: usize, dim: usize, value: bool) -> f32 {
    // Exact in binary16.
    ((token * 31 + head * 7 + dim * 3) % 400) as f32 - if value { 200.0 } else { 0.25 }
}

fn row(layout: &KvLayout, token: usize, value: bool) -> Vec<f32> {
    let heads = (0..layout.kv_heads).flat_map(|head| (0..layout.head_dim).map(move |dim| (head, dim)));
    heads
        .map(|(head, dim)| element(token, head, dim, value))
        .collect()
}

/// A pool of garbage and a table of its blocks in some order.
fn filled(layout: KvLayout, isa: Isa) -> (Pool, Vec<BlockId>) {
    let count = layout.blocks_for(TOKENS);
    let memory = OwnMemory::allocate((count + 1) * layout.block_bytes()).expect("memory");
    // SAFETY: the memory is new.
    unsafe { memory.base().as_ptr().write_bytes(0xff, memory.len()) };
    let pool = Pool::new(Arc::new(memory), layout).expect("host memory");
    let blocks: Vec<BlockId> = (0..count).map(|i| BlockId((count - i) as u32)).collect();
    for layer in 0..layout.layers {
        for token in 0..TOKENS {
            let (block, slot) = (blocks[token / layout.block_tokens], token % layout.block_tokens);
            let slot = TokenSlot { layer, block, slot };
            // SAFETY: this test alone uses the pool.
            unsafe {
                pool.write(
                    isa,
                    slot,
                    &row(&layout, token, false),
                    &row(&layout, token, true),
                    &mut Rounded::default(),
                )
            };
        }
    }
    (pool, blocks)
}

/// A head as it comes back.
fn stored(dtype: KvDtype, head_dim: usize, token: usize, head: usize, value: bool) -> Vec<f32> {
    let values: Vec<f32> = (0..head_dim)
        .map(|dim| element(token, head, dim, value))
        .collect();
    match dtype {
        KvDtype::F16 | KvDtype::F32 => values,
        KvDtype::Bf16 => values
            .iter()
            .map(|value| bf16::from_f32(*value).to_f32())
            .collect(),
        KvDtype::Int8 => {
            let greatest = values
                .iter()
                .fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
            let scale = greatest / 127.0;
            values
                .iter()
                .map(|value| (value / scale).round_ties_even() * scale)
                .collect()
        }
    }
}

#[rstest]
fn panels_hold_what_was_written(
    #[values(KvDtype::F16, KvDtype::F32, KvDtype::Bf16, KvDtype::Int8)] dtype: KvDtype,
    #[values(8, 16, 32, 128)] block_tokens: usize,
    #[values(16, 20, 64)] head_dim: usize,
) {
    for isa in Isa::available() {
        let (pool, blocks) = filled(layout(dtype, block_tokens, head_dim), isa);
        let stride = head_dim.next_multiple_of(LANES);
        for position in (0..TOKENS).step_by(PANEL) {
            let count = PANEL.min(TOKENS - position);
            let head = HeadOf {
                pool: &pool,
                blocks: &blocks,
                layer: 1,
                kv_head: 2,
            };
            let mut k = vec![[0.0; PANEL]; head_dim];
            let mut v = vec![f32::NAN; PANEL * stride];
            keys(isa, head, position, count, &mut k);
            values(isa, head, position, count, &mut v);
            for token in 0..count {
                let rounded = |value| stored(dtype, head_dim, position + token, 2, value);
                let (keys, values) = (rounded(false), rounded(true));
                for dim in 0..head_dim {
                    assert_eq!(k[dim][token], keys[dim]);
                    assert_eq!(v[token * stride + dim], values[dim]);
                }
                assert!(
                    v[token * stride + head_dim..(token + 1) * stride]
                        .iter()
                        .all(|pad| *pad == 0.0)
                );
            }
        }
    }
}

#[test]
fn bytes_follow_the_layout_and_unused_slots_are_zero() {
    let layout = layout(KvDtype::F32, 32, 16);
    let (pool, blocks) = filled(layout, Isa::detect());
    let last = TOKENS / 32;
    // SAFETY: the block is in the pool, which this test alone uses.
    let block: &[f32] = unsafe {
        slice::from_raw_parts(
            pool.at(blocks[last], 0, layout.block_bytes()).cast(),
            layout.block_bytes() / 4,
        )
    };
    for head in 0..3 {
        let (k, v) = (layout.k_offset(0, head) / 4, layout.v_offset(0, head) / 4);
        for slot in 0..32 {
            for dim in 0..16 {
                let token = last * 32 + slot;
                let expected = |value| {
                    if token < TOKENS {
                        element(token, head, dim, value)
                    } else {
                        0.0
                    }
                };
                assert_eq!(block[k + dim * 32 + slot], expected(false));
                assert_eq!(block[v + slot * 16 + dim], expected(true));
            }
        }
    }
}

#[test]
#[should_panic(expected = "beyond the pool")]
fn a_block_beyond_the_pool_is_refused() {
    let layout = layout(KvDtype::F32, 32, 16);
    let (pool, _) = filled(layout, Isa::detect());
    pool.at(BlockId(pool.blocks() as u32), 0, 1);
}

#[test]
fn bytes_are_off_by_half_a_step_at_most_and_a_head_of_zeros_stays() {
    let mut codes = [1; 5];
    assert_eq!(to_bytes(&[0.0; 5], &mut codes), 0.0);
    assert_eq!(codes, [0; 5]);
    let values = [-3.0, 1.5, 0.01, 2.999, -0.4];
    let scale = to_bytes(&values, &mut codes);
    assert_eq!(codes[0], -127);
    for (value, code) in values.iter().zip(codes) {
        assert!(
            (f32::from(code) * scale - value).abs() <= scale / 2.0 * 1.0001,
            "{value}"
        );
    }
}
