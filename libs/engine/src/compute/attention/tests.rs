use std::sync::Arc;

use types::{BlockId, KvDtype, KvLayout};

use super::*;
use crate::compute::isa::Isa;
use crate::compute::kv::{Pool, Rounded, TokenSlot};
use crate::monolith::OwnMemory;

const KV_HEADS: usize = 2;
const PER_KV: usize = 3;
const HEAD_DIM: usize = 24;
const TOKENS: usize = 2 * SEGMENT + 45;

fn noise(i: usize) -> f32 {
    ((i * 7919 + i / 64 * 131) % 4099) as f32 / 2049.5 - 1.0
}

fn k(token: usize, head: usize, dim: usize) -> f32 {
    2.0 * noise(token * 977 + head * 31 + dim)
}

fn v(token: usize, head: usize, dim: usize) -> f32 {
    noise(token * 613 + head * 17 + dim + 5)
}

fn queries() -> Vec<f32> {
    (0..TOKENS * KV_HEADS * PER_KV * HEAD_DIM)
        .map(|i| 0.7 * noise(i * 3))
        .collect()
}

/// KV of all tokens; every slot beyond is NaN.
fn pool() -> (Pool, Vec<BlockId>) {
    pool_of(TOKENS)
}

fn pool_of(tokens: usize) -> (Pool, Vec<BlockId>) {
    let layout = KvLayout {
        layers: 1,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        block_tokens: 32,
        dtype: KvDtype::F32,
    };
    let count = layout.blocks_for(tokens);
    let memory = Arc::new(OwnMemory::allocate(count * layout.block_bytes()).expect("memory"));
    let pool = Pool::new(Arc::clone(&memory) as _, layout).expect("host memory");
    let blocks: Vec<BlockId> = (0..count as u32).map(BlockId).collect();
    let nan = vec![f32::NAN; KV_HEADS * HEAD_DIM];
    for token in 0..count * 32 {
        let slot = TokenSlot {
            layer: 0,
            block: blocks[token / 32],
            slot: token % 32,
        };
        let of = |f: fn(usize, usize, usize) -> f32| -> Vec<f32> {
            (0..KV_HEADS * HEAD_DIM)
                .map(|i| f(token, i / HEAD_DIM, i % HEAD_DIM))
                .collect()
        };
        let (k, v) = if token < tokens {
            (of(k), of(v))
        } else {
            (nan.clone(), nan.clone())
        };
        // SAFETY: this test alone uses the pool.
        unsafe { pool.write(Isa::SCALAR, slot, &k, &v, &mut Rounded::default()) };
    }
    (pool, blocks)
}

struct Rows(Vec<Vec<f32>>);

impl RowsOut for Rows {
    fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.0[row]
    }
}

fn tile<'a>(
    pool: &'a Pool,
    blocks: &'a [BlockId],
    queries: &'a [f32],
    kv_head: usize,
    position: usize,
    rows: usize,
) -> Tile<'a> {
    let query_stride = KV_HEADS * PER_KV * HEAD_DIM;
    Tile {
        head: HeadOf {
            pool,
            blocks,
            layer: 0,
            kv_head,
        },
        queries: &queries[position * query_stride..],
        query_stride,
        first_query: kv_head * PER_KV * HEAD_DIM,
        heads_per_kv: PER_KV,
        rows,
        position,
        window: None,
        soft_cap: None,
    }
}

/// What may be asked of a layer's attention: windows within a panel, a segment, of whole ones, and across several.
const KINDS: [(Option<usize>, Option<f32>); 6] = [
    (None, None),
    (None, Some(1.5)),
    (Some(1), None),
    (Some(47), Some(1.5)),
    (Some(256), None),
    (Some(300), None),
];

/// All rows of a KV head in tiles of `rows`.
fn attend_all(isa: Isa, kv_head: usize, rows: usize, kind: (Option<usize>, Option<f32>)) -> Vec<Vec<f32>> {
    let (pool, blocks) = pool();
    let (queries, mut scratch) = (queries(), Scratch::default());
    let mut all = Vec::new();
    for position in (0..TOKENS).step_by(rows) {
        let count = rows.min(TOKENS - position);
        let mut out = Rows(vec![vec![0.0; PER_KV * HEAD_DIM]; count]);
        attend(
            isa,
            &Tile {
                window: kind.0,
                soft_cap: kind.1,
                ..tile(&pool, &blocks, &queries, kv_head, position, count)
            },
            &mut scratch,
            &mut out,
        );
        all.append(&mut out.0);
    }
    all
}

#[test]
fn results_are_the_softmax_weighted_sums_of_the_past_in_the_window() {
    KINDS.into_iter().for_each(check_sums);
}

fn check_sums((window, cap): (Option<usize>, Option<f32>)) {
    let (kv_head, found) = (1, attend_all(Isa::detect(), 1, 16, (window, cap)));
    let queries = queries();
    for position in [0, 1, 31, 32, 255, 256, 300, TOKENS - 1] {
        for head in 0..PER_KV {
            let start = ((position * KV_HEADS + kv_head) * PER_KV + head) * HEAD_DIM;
            let query = &queries[start..start + HEAD_DIM];
            let score = |token: usize| -> f64 {
                let product: f64 = (0..HEAD_DIM)
                    .map(|dim| f64::from(query[dim]) * f64::from(k(token, kv_head, dim)))
                    .sum();
                cap.map_or(product, |cap| {
                    let cap = f64::from(cap);
                    cap * (product / cap).tanh()
                })
            };
            let weight = |token: usize| match window {
                Some(window) if token + window <= position => 0.0,
                _ => score(token).exp(),
            };
            let weights: Vec<f64> = (0..=position).map(weight).collect();
            let total: f64 = weights.iter().sum();
            for dim in 0..HEAD_DIM {
                let sum = |(token, weight): (usize, &f64)| weight * f64::from(v(token, kv_head, dim));
                let expected = weights.iter().enumerate().map(sum).sum::<f64>() / total;
                let found = f64::from(found[position][head * HEAD_DIM + dim]);
                assert!(
                    (found - expected).abs() < 1e-5,
                    "position {position}: {found}, not {expected}"
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_tiles_segment_items_or_the_instruction_set() {
    KINDS.into_iter().for_each(check_bits);
}

fn check_bits(kind: (Option<usize>, Option<f32>)) {
    let expected = attend_all(Isa::SCALAR, 0, 16, kind);
    let (pool, blocks) = pool();
    let queries = queries();
    for isa in Isa::available() {
        for rows in [1, 7, 16, 100] {
            assert_eq!(
                attend_all(isa, 0, rows, kind),
                expected,
                "{isa:?}, tiles of {rows}"
            );
        }
        let mut scratch = Scratch::default();
        let floats = PER_KV * partial_floats(HEAD_DIM);
        for position in [0, 40, 255, 256, 511, 512, TOKENS - 1] {
            let tile = Tile {
                window: kind.0,
                soft_cap: kind.1,
                ..tile(&pool, &blocks, &queries, 0, position, 1)
            };
            let mut partials = vec![0.0; tile.segments().len() * floats];
            for (segment, out) in tile.segments().zip(partials.chunks_exact_mut(floats)) {
                attend_segment(isa, &tile, segment, &mut scratch, out);
            }
            let mut out = vec![0.0; PER_KV * HEAD_DIM];
            join(isa, &partials, HEAD_DIM, &mut out);
            assert_eq!(
                out, expected[position],
                "{isa:?}, position {position} by segments"
            );
        }
    }
}

/// Bytes of a thread's working memory.
fn scratch_bytes(scratch: &Scratch) -> usize {
    let Scratch {
        queries,
        keys,
        values,
        scores,
        segment,
        joined,
    } = scratch;
    let of_partial = |partial: &Partial| {
        let floats = partial.greatest.capacity() + partial.total.capacity() + partial.values.capacity();
        floats * size_of::<f32>()
    };
    queries.capacity() * size_of::<[f32; GROUP]>()
        + keys.capacity() * size_of::<[f32; PANEL]>()
        + values.capacity() * size_of::<f32>()
        + scores.capacity() * size_of::<[f32; SEGMENT]>()
        + of_partial(segment)
        + of_partial(joined)
}

#[test]
fn at_8k_positions_a_row_is_the_naive_one_and_takes_no_more_memory() {
    let mut bytes = Vec::new();
    for context in [1024, 8192] {
        let (pool, blocks) = pool_of(context);
        let query: Vec<f32> = (0..KV_HEADS * PER_KV * HEAD_DIM)
            .map(|i| 0.7 * noise(i * 3))
            .collect();
        let tile = Tile {
            queries: &query,
            ..tile(&pool, &blocks, &[], 1, 0, 1)
        };
        let tile = Tile {
            position: context - 1,
            ..tile
        };
        let mut scratch = Scratch::default();
        let mut out = Rows(vec![vec![0.0; PER_KV * HEAD_DIM]]);
        attend(Isa::detect(), &tile, &mut scratch, &mut out);
        bytes.push(scratch_bytes(&scratch));
        for head in 0..PER_KV {
            let query = &query[(PER_KV + head) * HEAD_DIM..][..HEAD_DIM];
            let score = |token: usize| -> f64 {
                (0..HEAD_DIM)
                    .map(|dim| f64::from(query[dim]) * f64::from(k(token, 1, dim)))
                    .sum()
            };
            let weights: Vec<f64> = (0..context).map(|token| score(token).exp()).collect();
            let total: f64 = weights.iter().sum();
            for dim in 0..HEAD_DIM {
                let sum = |(token, weight): (usize, &f64)| weight * f64::from(v(token, 1, dim));
                let expected = weights.iter().enumerate().map(sum).sum::<f64>() / total;
                let found = f64::from(out.0[0][head * HEAD_DIM + dim]);
                assert!((found - expected).abs() < 1e-4, "{found}, not {expected}");
            }
        }
    }
    assert_eq!(bytes[0], bytes[1]);
}
