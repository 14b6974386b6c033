//! Cutting a step's attention into items.

use super::forward::{Buffers, Context, qkv_width};
use super::plan::Run;
use super::product::{ITEMS_PER_THREAD, grow};
use crate::compute::attention::{self, RowsOut, Tile, attend, attend_segment, join, partial_floats};
use crate::compute::kv::HeadOf;
use crate::compute::shared::Shared;
use crate::threads::{JobPanicked, Threads};

/// A piece of attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    /// Index of the tile.
    tile: usize,
    kv_head: usize,
    /// The one segment, and where its result goes among the partial results; all segments if `None`.
    part: Option<(usize, usize)>,
}

/// Some columns of a tile's rows.
struct Columns<'a> {
    out: &'a Shared<'a, f32>,
    first: usize,
    stride: usize,
    width: usize,
}

impl RowsOut for Columns<'_> {
    fn row(&mut self, row: usize) -> &mut [f32] {
        // SAFETY: a row's columns of one KV head belong to one item.
        unsafe { self.out.range(self.first + row * self.stride, self.width) }
    }
}

impl Context<'_> {
    /// Attention of the rows of `tiles`, from `qkv` and the blocks to `input`.
    pub(super) fn attend(
        &self,
        layer: usize,
        tiles: &[Run],
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let split = self.cut(layer, tiles, threads.count(), buffers);
        let Buffers {
            input,
            qkv,
            partials,
            attention,
            workers,
            ..
        } = buffers;
        let out_stride = self.config.heads * self.config.head_dim;
        let group = out_stride / self.config.kv_heads;
        let part_floats = self.part_floats();
        let (out, parts) = (Shared::new(&mut input.dense), Shared::new(partials));
        let workers = Shared::new(workers);
        threads.run(attention.len(), &|worker, item| {
            let Item { tile, kv_head, part } = attention[item];
            let run = tiles[tile];
            let tile = self.tile(layer, run, kv_head, qkv);
            // SAFETY: a worker runs one item at a time.
            let scratch = &mut unsafe { workers.range(worker, 1) }[0].attention;
            match part {
                None => {
                    let first = run.row * out_stride + kv_head * group;
                    let mut columns = Columns {
                        out: &out,
                        first,
                        stride: out_stride,
                        width: group,
                    };
                    attend(self.isa, &tile, scratch, &mut columns);
                }
                Some((segment, at)) => {
                    // SAFETY: `cut` gives every part its own place.
                    let part = unsafe { parts.range(at, part_floats) };
                    attend_segment(self.isa, &tile, segment, scratch, part);
                }
            }
        })?;
        if split {
            self.join_parts(tiles, attention, partials, &mut input.dense);
        }
        Ok(())
    }

    fn tile<'a>(&'a self, layer: usize, run: Run, kv_head: usize, qkv: &'a [f32]) -> Tile<'a> {
        let query_stride = qkv_width(self.config);
        let heads_per_kv = self.config.heads / self.config.kv_heads;
        let blocks = self.batch[run.sequence].blocks;
        Tile {
            head: HeadOf {
                pool: self.pool,
                blocks,
                layer,
                kv_head,
            },
            queries: &qkv[run.row * query_stride..],
            query_stride,
            first_query: kv_head * heads_per_kv * self.config.head_dim,
            heads_per_kv,
            rows: run.rows,
            position: run.position,
            window: self.config.window_of(layer),
            soft_cap: self.config.attention_soft_cap,
        }
    }

    /// Floats of one segment's result for the query heads of a KV head.
    fn part_floats(&self) -> usize {
        self.config.heads / self.config.kv_heads * partial_floats(self.config.head_dim)
    }

    /// Lists the items; whether any row is split into segments. With few rows there are fewer heads than it takes to keep
    /// all threads busy, and contexts differ.
    fn cut(&self, layer: usize, tiles: &[Run], threads: usize, buffers: &mut Buffers) -> bool {
        let kv_heads = self.config.kv_heads;
        let window = self.config.window_of(layer);
        let few = threads > 1 && tiles.len() * kv_heads < ITEMS_PER_THREAD * threads;
        let mut at = 0;
        buffers.attention.clear();
        for (tile, run) in tiles.iter().enumerate() {
            let segments = attention::segments(run.position..run.position + run.rows, window);
            for kv_head in 0..kv_heads {
                if !few || run.rows > 1 || segments.len() == 1 {
                    buffers.attention.push(Item {
                        tile,
                        kv_head,
                        part: None,
                    });
                    continue;
                }
                for segment in segments.clone() {
                    buffers.attention.push(Item {
                        tile,
                        kv_head,
                        part: Some((segment, at)),
                    });
                    at += self.part_floats();
                }
            }
        }
        grow(&mut buffers.partials, at);
        at > 0
    }

    /// Joins the segments of every split row and head.
    fn join_parts(&self, tiles: &[Run], items: &[Item], partials: &[f32], out: &mut [f32]) {
        let stride = self.config.heads * self.config.head_dim;
        let group = stride / self.config.kv_heads;
        for parts in items.chunk_by(|a, b| (a.tile, a.kv_head) == (b.tile, b.kv_head)) {
            let Some((_, at)) = parts[0].part else { continue };
            let first = tiles[parts[0].tile].row * stride + parts[0].kv_head * group;
            let partials = &partials[at..][..parts.len() * self.part_floats()];
            join(
                self.isa,
                partials,
                self.config.head_dim,
                &mut out[first..][..group],
            );
        }
    }
}
