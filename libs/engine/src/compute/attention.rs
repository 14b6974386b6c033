//! Grouped-query attention over paged KV, causal, for a run of one sequence's rows.
//!
//! Invariant: a query's result depends on its own position, not on the tile it is computed in. The context is cut into segments of
//! [`SEGMENT`] positions. Each gives its greatest score, its sum of exponentials and its weighted sum of V; segments are joined in
//! order. A tile walks over all segments; or each segment is an item of its own ([`attend_segment`]) and [`join`] walks over what
//! they gave: the operations are the same.
//!
//! No position beyond a query's own influences it, nor one before its window: scores there are dropped before the maximum, and V
//! there is not read. Segments and panels that no query of a tile sees are passed over, so that a window bounds the cost; which ones
//! a query's own result is made of depends on its window alone.

use std::ops::Range;

use super::isa::kernel;
use super::kv::{HeadOf, PANEL, unpack_keys_lanes, unpack_values_lanes};
use super::lanes::{LANES, Lanes};
use super::math::{exp, exp_one, soft_cap};

/// Positions over which a softmax is one pass. Fixes the order of operations: never change it within one arithmetic version.
pub(crate) const SEGMENT: usize = 256;

/// Queries that share each load of K or V.
const GROUP: usize = 4;

/// Queries of a tile: enough that unpacking K and V is little beside their use, few enough that scores stay in the L2 cache.
const TILE_QUERIES: usize = 48;

/// Consecutive rows of one sequence and one head of K and V.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// The sequence's KV.
    pub(crate) head: HeadOf<'a>,
    /// Rotated and scaled queries of the rows: `[row][query_stride]`, this KV head's from `first_query` on.
    pub(crate) queries: &'a [f32],
    /// Width of a row of `queries`.
    pub(crate) query_stride: usize,
    /// Column of the KV head's first query.
    pub(crate) first_query: usize,
    /// Query heads per KV head.
    pub(crate) heads_per_kv: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Position of the first row.
    pub(crate) position: usize,
    /// Positions that a query sees, its own among them; all if `None`.
    pub(crate) window: Option<usize>,
    /// See [`soft_cap`].
    pub(crate) soft_cap: Option<f32>,
}

/// Rows of a tile for so many query heads per KV head.
pub(crate) fn tile_rows(heads_per_kv: usize) -> usize {
    (TILE_QUERIES / heads_per_kv).max(1)
}

/// Segments that queries at these positions attend to.
pub(crate) fn segments(positions: Range<usize>, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |window| (positions.start + 1).saturating_sub(window));
    first / SEGMENT..positions.end.div_ceil(SEGMENT)
}

impl Tile<'_> {
    fn queries(&self) -> usize {
        self.rows * self.heads_per_kv
    }

    /// End of the positions that query `query` attends to.
    #[inline(always)]
    fn limit(&self, query: usize) -> usize {
        self.position + query / self.heads_per_kv + 1
    }

    /// First position that query `query` attends to.
    #[inline(always)]
    fn first(&self, query: usize) -> usize {
        self.window
            .map_or(0, |window| self.limit(query).saturating_sub(window))
    }

    /// Segments that any of its queries attends to.
    fn segments(&self) -> Range<usize> {
        segments(self.position..self.position + self.rows, self.window)
    }
}

/// Where a tile's results go.
pub(crate) trait RowsOut {
    /// `heads_per_kv * head_dim` values of row `row` of the tile.
    fn row(&mut self, row: usize) -> &mut [f32];
}

/// A softmax-weighted sum over some positions.
#[derive(Default)]
struct Partial {
    /// Greatest score, per query.
    greatest: Vec<f32>,
    /// Sum of `exp(score - greatest)`, per query.
    total: Vec<f32>,
    /// Sum of `exp(score - greatest) * V`: `[query][stride]`.
    values: Vec<f32>,
}

/// A thread's working memory.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[group][head_dim][GROUP]`.
    queries: Vec<[f32; GROUP]>,
    keys: Vec<[f32; PANEL]>,
    values: Vec<f32>,
    /// `[query][SEGMENT]`: scores, then their exponentials.
    scores: Vec<[f32; SEGMENT]>,
    segment: Partial,
    joined: Partial,
}

/// Floats that [`attend_segment`] writes for each query: greatest, total and the padded values.
pub(crate) fn partial_floats(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES) + 2
}

impl Scratch {
    fn prepare(&mut self, tile: &Tile<'_>) {
        let head_dim = tile.head.pool.layout().head_dim;
        let stride = head_dim.next_multiple_of(LANES);
        let queries = tile.queries().next_multiple_of(GROUP);
        self.queries.clear();
        self.queries.resize(queries / GROUP * head_dim, [0.0; GROUP]);
        self.keys.resize(head_dim, [0.0; PANEL]);
        self.values.resize(PANEL * stride, 0.0);
        self.scores.resize(queries.max(self.scores.len()), [0.0; SEGMENT]);
        for partial in [&mut self.segment, &mut self.joined] {
            partial.greatest.resize(queries, 0.0);
            partial.total.resize(queries, 0.0);
            partial.values.resize(queries * stride, 0.0);
        }
        for query in 0..tile.queries() {
            let (row, head) = (query / tile.heads_per_kv, query % tile.heads_per_kv);
            let start = row * tile.query_stride + tile.first_query + head * head_dim;
            let group = &mut self.queries[query / GROUP * head_dim..][..head_dim];
            for (to, from) in group.iter_mut().zip(&tile.queries[start..][..head_dim]) {
                to[query % GROUP] = *from;
            }
        }
    }
}

kernel! {
    /// Attends with all rows of a tile. Row `r`'s heads go to `out.row(r)`, `[heads_per_kv][head_dim]`.
    pub(crate) fn attend(tile: &Tile<'_>, scratch: &mut Scratch, out: &mut dyn RowsOut) = attend_lanes
}

#[inline(always)]
fn attend_lanes<L: Lanes>(tile: &Tile<'_>, scratch: &mut Scratch, out: &mut dyn RowsOut) {
    scratch.prepare(tile);
    let head_dim = tile.head.pool.layout().head_dim;
    let stride = head_dim.next_multiple_of(LANES);
    for segment in tile.segments() {
        segment_sums::<L>(tile, segment, scratch);
        let Scratch {
            segment: from,
            joined,
            ..
        } = scratch;
        for query in 0..tile.queries() {
            let first = tile.first(query) / SEGMENT;
            if segment >= first && tile.limit(query) > segment * SEGMENT {
                let (greatest, total) = (from.greatest[query], from.total[query]);
                let values = &from.values[query * stride..][..stride];
                let into = &mut joined.values[query * stride..][..stride];
                let state = (&mut joined.greatest[query], &mut joined.total[query]);
                join_partial::<L>(segment == first, (greatest, total), values, state, into);
            }
        }
    }
    for row in 0..tile.rows {
        for (head, out) in out.row(row).chunks_exact_mut(head_dim).enumerate() {
            let query = row * tile.heads_per_kv + head;
            let values = &scratch.joined.values[query * stride..][..stride];
            finish::<L>(values, scratch.joined.total[query], out);
        }
    }
}

kernel! {
    /// One segment of a one-row tile. `out` gets [`partial_floats`] for each of its queries, for [`join`].
    pub(crate) fn attend_segment(tile: &Tile<'_>, segment: usize, scratch: &mut Scratch, out: &mut [f32]) =
        attend_segment_lanes
}

#[inline(always)]
fn attend_segment_lanes<L: Lanes>(tile: &Tile<'_>, segment: usize, scratch: &mut Scratch, out: &mut [f32]) {
    scratch.prepare(tile);
    segment_sums::<L>(tile, segment, scratch);
    let floats = partial_floats(tile.head.pool.layout().head_dim);
    let stride = floats - 2;
    for (query, out) in out.chunks_exact_mut(floats).enumerate() {
        out[0] = scratch.segment.greatest[query];
        out[1] = scratch.segment.total[query];
        out[2..].copy_from_slice(&scratch.segment.values[query * stride..][..stride]);
    }
}

kernel! {
    /// Joins what [`attend_segment`] gave for one row, `[segment][query][partial_floats]`, into `[query][head_dim]`.
    pub(crate) fn join(partials: &[f32], head_dim: usize, out: &mut [f32]) = join_lanes
}

#[inline(always)]
fn join_lanes<L: Lanes>(partials: &[f32], head_dim: usize, out: &mut [f32]) {
    let floats = partial_floats(head_dim);
    let of_segment = floats * (out.len() / head_dim);
    let mut joined = vec![0.0; floats - 2];
    for (query, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let (mut greatest, mut total) = (0.0, 0.0);
        for (segment, partials) in partials.chunks_exact(of_segment).enumerate() {
            let partial = &partials[query * floats..][..floats];
            let state = (&mut greatest, &mut total);
            join_partial::<L>(
                segment == 0,
                (partial[0], partial[1]),
                &partial[2..],
                state,
                &mut joined,
            );
        }
        finish::<L>(&joined, total, out);
    }
}

/// `total = total * a + from_total * b` and likewise the values, `a` and `b` rescaling both to the common greatest score.
#[inline(always)]
fn join_partial<L: Lanes>(
    first: bool,
    (from_greatest, from_total): (f32, f32),
    from: &[f32],
    (greatest, total): (&mut f32, &mut f32),
    values: &mut [f32],
) {
    if first {
        (*greatest, *total) = (from_greatest, from_total);
        values.copy_from_slice(from);
        return;
    }
    let common = if from_greatest > *greatest {
        from_greatest
    } else {
        *greatest
    };
    let (kept, added) = (
        exp_one::<L>(*greatest - common),
        exp_one::<L>(from_greatest - common),
    );
    *greatest = common;
    *total = total.mul_add(kept, from_total * added);
    let (kept, added) = (L::splat(kept), L::splat(added));
    for (value, from) in values
        .as_chunks_mut::<LANES>()
        .0
        .iter_mut()
        .zip(from.as_chunks::<LANES>().0)
    {
        L::load(value)
            .mul_add(kept, L::load(from).mul(added))
            .store(value);
    }
}

#[inline(always)]
fn finish<L: Lanes>(values: &[f32], total: f32, out: &mut [f32]) {
    let total = L::splat(total);
    for (values, out) in values.as_chunks::<LANES>().0.iter().zip(out.chunks_mut(LANES)) {
        L::load(values).div(total).store_partial(out);
    }
}

/// Fills `scratch.segment` for every query that attends to `segment`.
#[inline(always)]
fn segment_sums<L: Lanes>(tile: &Tile<'_>, segment: usize, scratch: &mut Scratch) {
    let start = segment * SEGMENT;
    let end = (start + SEGMENT).min(tile.position + tile.rows);
    // The first query sees furthest back. Panels begin at multiples of their size, as segments do.
    let begin = start.max(tile.first(0) / PANEL * PANEL);
    let groups = tile.queries().div_ceil(GROUP);
    let head_dim = scratch.keys.len();
    for position in (begin..end).step_by(PANEL) {
        let count = PANEL.min(end - position);
        unpack_keys_lanes::<L>(tile.head, position, count, &mut scratch.keys);
        let scores = scratch.scores.as_chunks_mut::<GROUP>().0.iter_mut();
        for (queries, scores) in scratch.queries.chunks_exact(head_dim).zip(scores) {
            panel_scores::<L>(queries, &scratch.keys, position - start, scores);
        }
    }
    for query in 0..tile.queries() {
        let count = tile.limit(query).saturating_sub(start).min(SEGMENT);
        let first = tile.first(query).saturating_sub(start).min(count);
        let scores = &mut scratch.scores[query];
        if let Some(cap) = tile.soft_cap {
            cap_scores::<L>(scores, first..count, cap);
        }
        let (greatest, total) = soften::<L>(scores, first..count);
        scratch.segment.greatest[query] = greatest;
        scratch.segment.total[query] = total;
    }
    scratch.segment.values.fill(0.0);
    for position in (begin..end).step_by(PANEL) {
        let count = PANEL.min(end - position);
        unpack_values_lanes::<L>(tile.head, position, count, &mut scratch.values);
        for group in 0..groups {
            weigh_panel::<L>(tile, group, position, position - start, scratch);
        }
    }
}

/// Scores of four queries with the tokens of a panel.
#[inline(always)]
fn panel_scores<L: Lanes>(
    queries: &[[f32; GROUP]],
    keys: &[[f32; PANEL]],
    column: usize,
    scores: &mut [[f32; SEGMENT]; GROUP],
) {
    macro_rules! run {
        ($first:expr, $vectors:literal) => {
            let mut sums = [[L::splat(0.0); $vectors]; GROUP];
            for (query, keys) in queries.iter().zip(keys) {
                let (keys, _) = keys.as_chunks::<LANES>();
                for i in 0..GROUP {
                    let query = L::splat(query[i]);
                    for v in 0..$vectors {
                        sums[i][v] = query.mul_add(L::load(&keys[$first + v]), sums[i][v]);
                    }
                }
            }
            for i in 0..GROUP {
                let (scores, _) = scores[i][column..column + PANEL].as_chunks_mut::<LANES>();
                for v in 0..$vectors {
                    sums[i][v].store(&mut scores[$first + v]);
                }
            }
        };
    }
    if L::TILE_ROWS == 8 {
        run!(0, 2);
    } else {
        run!(0, 1);
        run!(1, 1);
    }
}

/// Caps the vectors that hold these scores.
#[inline(always)]
fn cap_scores<L: Lanes>(scores: &mut [f32; SEGMENT], kept: Range<usize>, cap: f32) {
    let (chunks, _) = scores.as_chunks_mut::<LANES>();
    for chunk in &mut chunks[kept.start / LANES..kept.end.div_ceil(LANES)] {
        soft_cap(L::load(chunk), cap).store(chunk);
    }
}

/// Turns the scores `kept` into `exp(score - greatest)`, and those before them in their vector into 0; gives the greatest and the
/// sum.
#[inline(always)]
fn soften<L: Lanes>(scores: &mut [f32; SEGMENT], kept: Range<usize>) -> (f32, f32) {
    // The first vector that is looked at, and how much of it is before the window.
    let skipped = kept.start / LANES * LANES;
    scores[skipped..kept.start].fill(f32::NEG_INFINITY);
    let count = kept.end - skipped;
    let (chunks, _) = scores[skipped..].as_chunks_mut::<LANES>();
    let chunks = &mut chunks[..count.div_ceil(LANES)];
    let mut greatest = L::splat(f32::NEG_INFINITY);
    for (index, chunk) in chunks.iter().enumerate() {
        greatest = greatest.max(L::load(chunk).keep_first(count - index * LANES, f32::NEG_INFINITY));
    }
    let greatest = greatest.greatest();
    let mut total = L::splat(0.0);
    for (index, chunk) in chunks.iter_mut().enumerate() {
        let weights = exp(L::load(chunk).sub(L::splat(greatest))).keep_first(count - index * LANES, 0.0);
        weights.store(chunk);
        total = total.add(weights);
    }
    (greatest, total.sum())
}

/// Adds the panel's weighted V to the sums of group `group`, up to each query's own position.
#[inline(always)]
fn weigh_panel<L: Lanes>(
    tile: &Tile<'_>,
    group: usize,
    position: usize,
    column: usize,
    scratch: &mut Scratch,
) {
    let queries = tile.queries();
    let stride = scratch.values.len() / PANEL;
    let Scratch {
        values,
        scores,
        segment,
        ..
    } = scratch;
    let in_panel = |at: usize| at.saturating_sub(position).min(PANEL);
    let seen = |query: usize| {
        let query = query.min(queries - 1);
        in_panel(tile.first(query))..in_panel(tile.limit(query))
    };
    let first = group * GROUP;
    // Windows move on with the query: from where the last one's begins to where the first one's ends, all see all.
    let begin = seen(first + GROUP - 1).start;
    let common = begin..seen(first).end.max(begin);
    let mut weights = [&scores[first][column..column + PANEL]; GROUP];
    for i in 1..GROUP {
        weights[i] = &scores[first + i][column..column + PANEL];
    }
    let sums = &mut segment.values[first * stride..][..GROUP * stride];
    for i in 0..GROUP {
        let own = seen(first + i);
        let own = own.start..own.end.min(common.start);
        weigh_own::<L>(weights[i], values, stride, own, &mut sums[i * stride..][..stride]);
    }
    let mut vector = 0;
    if L::TILE_ROWS == 8 {
        while stride - vector >= 4 * LANES {
            weigh::<L, GROUP, 4>(weights, values, stride, vector, common.clone(), sums);
            vector += 4 * LANES;
        }
    }
    while vector < stride {
        weigh::<L, GROUP, 1>(weights, values, stride, vector, common.clone(), sums);
        vector += LANES;
    }
    for i in 0..GROUP {
        let own = common.end..seen(first + i).end;
        weigh_own::<L>(weights[i], values, stride, own, &mut sums[i * stride..][..stride]);
    }
}

/// What one query alone sees.
#[inline(always)]
fn weigh_own<L: Lanes>(
    weights: &[f32],
    values: &[f32],
    stride: usize,
    tokens: Range<usize>,
    sums: &mut [f32],
) {
    let mut vector = 0;
    while !tokens.is_empty() && vector < stride {
        weigh::<L, 1, 1>([weights], values, stride, vector, tokens.clone(), sums);
        vector += LANES;
    }
}

/// `sums[i] += weights[i][t] * values[t]` for the tokens in order, for `V` vectors from column `vector` on.
#[inline(always)]
fn weigh<L: Lanes, const N: usize, const V: usize>(
    weights: [&[f32]; N],
    values: &[f32],
    stride: usize,
    vector: usize,
    tokens: Range<usize>,
    sums: &mut [f32],
) {
    let mut lanes = [[L::splat(0.0); V]; N];
    for i in 0..N {
        let (from, _) = sums[i * stride + vector..][..V * LANES].as_chunks::<LANES>();
        for v in 0..V {
            lanes[i][v] = L::load(&from[v]);
        }
    }
    for token in tokens {
        let (of_token, _) = values[token * stride + vector..][..V * LANES].as_chunks::<LANES>();
        for i in 0..N {
            let weight = L::splat(weights[i][token]);
            for v in 0..V {
                lanes[i][v] = weight.mul_add(L::load(&of_token[v]), lanes[i][v]);
            }
        }
    }
    for i in 0..N {
        let (to, _) = sums[i * stride + vector..][..V * LANES].as_chunks_mut::<LANES>();
        for v in 0..V {
            lanes[i][v].store(&mut to[v]);
        }
    }
}

#[cfg(test)]
mod tests;
