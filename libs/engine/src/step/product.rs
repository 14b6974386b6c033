//! Work over rows: preparing the input of a product, and multiplying it.

use std::ops::Range;

use super::forward::Context;
use crate::compute::activations::{ActivationBlock, quantise_row};
use crate::compute::lanes::BLOCK;
use crate::compute::math::{add_assign, rms_norm};
use crate::compute::matrix::{Activations, Epilogue, Matrix, Planes, Target, multiply};
use crate::compute::shared::Shared;
use crate::threads::{JobPanicked, Threads};

/// Rows that are cheaper to do here than to hand out.
pub(super) const ROWS_INLINE: usize = 4;

/// Rows of an item of row-wise work.
const ROWS_PER_ITEM: usize = 16;

/// Rows that one item multiplies: their activations stay in the L2 cache while weights pass.
const PRODUCT_ROWS: usize = 256;

/// Items per thread, so that a thread that is held up can be helped.
pub(super) const ITEMS_PER_THREAD: usize = 4;

/// The input of products.
pub(super) struct Operand {
    /// `[row][width]`.
    pub(super) dense: Vec<f32>,
    /// `[row][plane][width / 32]`, if a matrix wants it.
    blocks: Vec<ActivationBlock>,
    planes: Planes,
}

/// Matrices that are multiplied with one operand tile by tile, each with its epilogue, into the columns from `first_column`.
pub(super) struct Product<'a> {
    pub(super) matrices: &'a [(&'a Matrix, Epilogue)],
    pub(super) first_column: usize,
}

/// Rows of an operand that are multiplied with matrices of their own.
pub(super) struct Group<'a> {
    pub(super) rows: Range<usize>,
    pub(super) matrices: Vec<(&'a Matrix, Epilogue)>,
}

impl Operand {
    pub(super) fn new() -> Self {
        Self {
            dense: Vec::new(),
            blocks: Vec::new(),
            planes: Planes::One,
        }
    }

    /// Makes room for `rows` rows of up to `width`, in up to two planes.
    pub(super) fn grow(&mut self, rows: usize, width: usize) {
        grow(&mut self.dense, rows * width);
        grow(
            &mut self.blocks,
            Planes::Two as usize * rows * width.div_ceil(BLOCK),
        );
    }
}

impl Operand {
    /// Fills the rows with copies of `rows` of another operand, in both forms that it may have.
    pub(super) fn copy_rows(
        &mut self,
        rows: &[usize],
        width: usize,
        from: &Self,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        self.planes = from.planes;
        let blocks_per_row = from.planes as usize * (width / BLOCK);
        let (dense, blocks) = (Shared::new(&mut self.dense), Shared::new(&mut self.blocks));
        for_rows(threads, rows.len(), &|copy| {
            let row = rows[copy];
            // SAFETY: rows are disjoint.
            let (dense, blocks) = unsafe {
                (
                    dense.range(copy * width, width),
                    blocks.range(copy * blocks_per_row, blocks_per_row),
                )
            };
            dense.copy_from_slice(&from.dense[row * width..][..width]);
            blocks.copy_from_slice(&from.blocks[row * blocks_per_row..][..blocks_per_row]);
        })
    }
}

pub(super) fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

impl Context<'_> {
    /// Normalises rows of the stream into `to`, or copies them if there is no norm; in two planes if `quantised`.
    pub(super) fn normalise(
        &self,
        rows: usize,
        stream: &[f32],
        weight: Option<&[f32]>,
        quantised: bool,
        to: &mut Operand,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let width = self.config.hidden;
        to.planes = Planes::Two;
        let (dense, blocks) = (Shared::new(&mut to.dense), Shared::new(&mut to.blocks));
        for_rows(threads, rows, &|row| {
            // SAFETY: rows are disjoint.
            let out = unsafe { dense.range(row * width, width) };
            let of_row = &stream[row * width..][..width];
            match weight {
                Some(weight) => rms_norm(self.isa, of_row, weight, self.config.norm_epsilon, out),
                None => out.copy_from_slice(of_row),
            }
            if quantised {
                let count = Planes::Two as usize * (width / BLOCK);
                // SAFETY: rows are disjoint.
                quantise_row(self.isa, out, unsafe { blocks.range(row * count, count) });
            }
        })
    }

    /// Rounds the dense rows of `operand` to one plane.
    pub(super) fn quantise(
        &self,
        rows: usize,
        width: usize,
        operand: &mut Operand,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        operand.planes = Planes::One;
        let (dense, blocks) = (&operand.dense, Shared::new(&mut operand.blocks));
        for_rows(threads, rows, &|row| {
            let count = width / BLOCK;
            // SAFETY: rows are disjoint.
            let blocks = unsafe { blocks.range(row * count, count) };
            quantise_row(self.isa, &dense[row * width..][..width], blocks);
        })
    }

    /// Adds the rows of a branch to the stream, normalised if there is a norm. `spare` has room for them.
    pub(super) fn add_branch(
        &self,
        rows: usize,
        branch: &[f32],
        weight: Option<&[f32]>,
        spare: &mut [f32],
        stream: &mut [f32],
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let width = self.config.hidden;
        let (spare, stream) = (Shared::new(spare), Shared::new(stream));
        for_rows(threads, rows, &|row| {
            // SAFETY: rows are disjoint.
            let (spare, stream) =
                unsafe { (spare.range(row * width, width), stream.range(row * width, width)) };
            let branch = &branch[row * width..][..width];
            match weight {
                Some(weight) => {
                    rms_norm(self.isa, branch, weight, self.config.norm_epsilon, spare);
                    add_assign(self.isa, stream, spare);
                }
                None => add_assign(self.isa, stream, branch),
            }
        })
    }

    /// Multiplies every group's rows of `operand` with its matrices into the same rows of `out`.
    pub(super) fn multiply_groups(
        &self,
        groups: &[Group<'_>],
        operand: &Operand,
        out: &mut [f32],
        stride: usize,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let tiles: usize = groups.iter().map(|group| group.matrices[0].0.tiles()).sum();
        let per_item = (tiles / (ITEMS_PER_THREAD * threads.count())).max(1);
        let mut pieces = Vec::new();
        for group in groups {
            let tiles = group.matrices[0].0.tiles();
            for first_row in group.rows.clone().step_by(PRODUCT_ROWS) {
                let rows = first_row..group.rows.end.min(first_row + PRODUCT_ROWS);
                let starts = (0..tiles).step_by(per_item);
                pieces
                    .extend(starts.map(|start| (group, rows.clone(), start..(start + per_item).min(tiles))));
            }
        }
        let out = Shared::new(out);
        threads.run(pieces.len(), &|_, item| {
            let (group, rows, tiles) = &pieces[item];
            for (matrix, epilogue) in &group.matrices {
                let target = Target {
                    out: &out,
                    stride,
                    first_column: 0,
                    epilogue: *epilogue,
                };
                let x = operand.activations(matrix);
                multiply(self.isa, matrix, tiles.clone(), x, rows.clone(), &target);
            }
        })
    }

    /// Multiplies `rows` rows of `operand` with every product's matrices into `out`, `[row][stride]`.
    pub(super) fn multiply(
        &self,
        rows: usize,
        operand: &Operand,
        products: &[Product<'_>],
        out: &mut [f32],
        stride: usize,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let tiles: usize = products.iter().map(|product| product.matrices[0].0.tiles()).sum();
        let per_item = (tiles / (ITEMS_PER_THREAD * threads.count())).max(1);
        let mut pieces: Vec<(&Product<'_>, Range<usize>)> =
            Vec::with_capacity(2 * ITEMS_PER_THREAD * threads.count());
        for product in products {
            let tiles = product.matrices[0].0.tiles();
            let starts = (0..tiles).step_by(per_item);
            pieces.extend(starts.map(|start| (product, start..(start + per_item).min(tiles))));
        }
        let out = Shared::new(out);
        threads.run(pieces.len() * rows.div_ceil(PRODUCT_ROWS), &|_, item| {
            let (product, tiles) = &pieces[item % pieces.len()];
            let first_row = item / pieces.len() * PRODUCT_ROWS;
            let of_item = first_row..rows.min(first_row + PRODUCT_ROWS);
            for (matrix, epilogue) in product.matrices {
                let (first_column, epilogue) = (product.first_column, *epilogue);
                let target = Target {
                    out: &out,
                    stride,
                    first_column,
                    epilogue,
                };
                let x = operand.activations(matrix);
                multiply(self.isa, matrix, tiles.clone(), x, of_item.clone(), &target);
            }
        })
    }
}

impl Operand {
    fn activations(&self, matrix: &Matrix) -> Activations<'_> {
        if matrix.quantised() {
            Activations::Quantised {
                blocks: &self.blocks,
                planes: self.planes,
            }
        } else {
            Activations::Dense(&self.dense)
        }
    }
}

/// Runs `work` for every row: here if they are few, else in runs of rows on all threads.
pub(super) fn for_rows(
    threads: &mut Threads,
    rows: usize,
    work: &(dyn Fn(usize) + Sync),
) -> Result<(), JobPanicked> {
    if rows <= ROWS_INLINE {
        (0..rows).for_each(work);
        return Ok(());
    }
    threads.run(rows.div_ceil(ROWS_PER_ITEM), &|_, item| {
        let start = item * ROWS_PER_ITEM;
        (start..rows.min(start + ROWS_PER_ITEM)).for_each(work);
    })
}
