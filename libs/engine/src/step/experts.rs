//! Feed-forward layers of experts, of which each row uses a few.
//!
//! Rows are sorted by expert, so that an expert's weights are read once for all its rows. Invariant: what an expert gives for a row is
//! the product of that row alone, and a row's sum is over its own experts in the order of their numbers; which other rows chose
//! the same expert decides only where the row lies.

use std::ops::Range;

use super::forward::Context;
use super::product::{Group, Operand, Product, for_rows, grow};
use crate::compute::math::{add_weighted, softmax_row};
use crate::compute::matrix::{Epilogue, Matrix};
use crate::compute::shared::Shared;
use crate::config::Experts;
use crate::model::Gated;
use crate::threads::{JobPanicked, Threads};

/// Rows that are sorted together. Bounds the memory for what is copied for every expert that they use, and is enough for
/// every one to be used by several.
const ROWS_SORTED: usize = 1024;

/// The experts of a layer.
pub(super) struct Mixture<'a> {
    pub(super) experts: Experts,
    pub(super) router: &'a Matrix,
    pub(super) weights: &'a [Gated],
}

impl Mixture<'_> {
    /// Whether any of the matrices that take the layer's input wants it quantised.
    pub(super) fn quantised(&self) -> bool {
        let experts = self.weights.iter();
        self.router.quantised()
            || experts
                .into_iter()
                .any(|weights| weights.gate.quantised() || weights.up.quantised())
    }
}

/// An expert that a row uses.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

/// Working memory.
pub(super) struct Routed {
    /// What the router makes of each row: `[row][expert]`.
    routes: Vec<f32>,
    /// `[row][used]`, by expert.
    choices: Vec<Choice>,
    /// Place of each choice of the sorted rows among the copies.
    places: Vec<usize>,
    /// Row of each copy.
    rows: Vec<usize>,
    copies: Operand,
    gated: Operand,
    products: Vec<f32>,
}

impl Routed {
    pub(super) fn new() -> Self {
        Self {
            routes: Vec::new(),
            choices: Vec::new(),
            places: Vec::new(),
            rows: Vec::new(),
            copies: Operand::new(),
            gated: Operand::new(),
            products: Vec::new(),
        }
    }

    pub(super) fn prepare(&mut self, rows: usize, experts: Experts, hidden: usize, intermediate: usize) {
        grow(&mut self.routes, rows * experts.count);
        grow(&mut self.choices, rows * experts.used);
        let copies = rows.min(ROWS_SORTED) * experts.used;
        self.copies.grow(copies, hidden);
        self.gated.grow(copies, intermediate);
        grow(&mut self.products, copies * hidden);
    }

    /// Gives every choice of these rows its place, and says which copies are whose.
    fn sort(&mut self, rows: Range<usize>, experts: Experts) -> Vec<Range<usize>> {
        let Experts { count, used, .. } = experts;
        let choices = &self.choices[rows.start * used..rows.end * used];
        let mut ends = vec![0; count];
        choices.iter().for_each(|choice| ends[choice.expert] += 1);
        let mut at = 0;
        let of_experts: Vec<Range<usize>> = ends
            .iter()
            .map(|copies| {
                let start = at;
                at += copies;
                start..at
            })
            .collect();
        let mut next: Vec<usize> = of_experts.iter().map(|copies| copies.start).collect();
        self.places.clear();
        self.rows.clear();
        self.rows.resize(choices.len(), 0);
        for (index, choice) in choices.iter().enumerate() {
            let place = &mut next[choice.expert];
            self.rows[*place] = rows.start + index / used;
            self.places.push(*place);
            *place += 1;
        }
        of_experts
    }
}

impl Context<'_> {
    /// What the experts make of the rows of `input`.
    pub(super) fn through_experts(
        &self,
        rows: usize,
        mixture: &Mixture<'_>,
        input: &Operand,
        routed: &mut Routed,
        out: &mut [f32],
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let experts = mixture.experts;
        let product = Product {
            matrices: &[(mixture.router, Epilogue::Store)],
            first_column: 0,
        };
        self.multiply(
            rows,
            input,
            &[product],
            &mut routed.routes,
            experts.count,
            threads,
        )?;
        self.choose(rows, experts, routed, threads)?;
        for start in (0..rows).step_by(ROWS_SORTED) {
            let sorted = start..rows.min(start + ROWS_SORTED);
            let of_experts = routed.sort(sorted.clone(), experts);
            self.multiply_copies(&of_experts, mixture.weights, input, routed, threads)?;
            self.add_up(sorted, experts, routed, out, threads)?;
        }
        Ok(())
    }

    /// The `used` greatest of each row, the first of equal ones.
    fn choose(
        &self,
        rows: usize,
        experts: Experts,
        routed: &mut Routed,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let Experts {
            count,
            used,
            normalised,
        } = experts;
        let (routes, choices) = (Shared::new(&mut routed.routes), Shared::new(&mut routed.choices));
        for_rows(threads, rows, &|row| {
            // SAFETY: rows are disjoint.
            let (route, chosen) =
                unsafe { (routes.range(row * count, count), choices.range(row * used, used)) };
            softmax_row(self.isa, route);
            pick(route, chosen);
            if normalised {
                let total: f32 = chosen.iter().map(|choice| choice.weight).sum();
                chosen.iter_mut().for_each(|choice| choice.weight /= total);
            }
        })
    }

    /// Copies rows to their places, and multiplies each expert's with its weights.
    fn multiply_copies(
        &self,
        of_experts: &[Range<usize>],
        weights: &[Gated],
        input: &Operand,
        routed: &mut Routed,
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let Routed {
            rows,
            copies,
            gated,
            products,
            ..
        } = routed;
        let (hidden, width) = (self.config.hidden, self.config.intermediate);
        copies.copy_rows(rows, hidden, input, threads)?;
        let used: Vec<(&Range<usize>, &Gated)> = of_experts
            .iter()
            .zip(weights)
            .filter(|(copies, _)| !copies.is_empty())
            .collect();
        let inputs: Vec<Group<'_>> = used
            .iter()
            .map(|(rows, weights)| Group {
                rows: (*rows).clone(),
                matrices: vec![(&weights.gate, Epilogue::Store), (&weights.up, self.gate())],
            })
            .collect();
        self.multiply_groups(&inputs, copies, &mut gated.dense, width, threads)?;
        if weights.iter().any(|weights| weights.down.quantised()) {
            self.quantise(rows.len(), width, gated, threads)?;
        }
        let outputs: Vec<Group<'_>> = used
            .iter()
            .map(|(rows, weights)| Group {
                rows: (*rows).clone(),
                matrices: vec![(&weights.down, Epilogue::Store)],
            })
            .collect();
        self.multiply_groups(&outputs, gated, products, hidden, threads)
    }

    /// Adds up what a row's experts gave, each by its weight, from 0.
    fn add_up(
        &self,
        rows: Range<usize>,
        experts: Experts,
        routed: &Routed,
        out: &mut [f32],
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let (hidden, used) = (self.config.hidden, experts.used);
        let out = Shared::new(out);
        for_rows(threads, rows.len(), &|index| {
            let row = rows.start + index;
            // SAFETY: rows are disjoint.
            let sum = unsafe { out.range(row * hidden, hidden) };
            sum.fill(0.0);
            let choices = &routed.choices[row * used..][..used];
            for (choice, place) in choices.iter().zip(&routed.places[index * used..]) {
                let product = &routed.products[place * hidden..][..hidden];
                add_weighted(self.isa, sum, choice.weight, product);
            }
        })
    }
}

/// The greatest of `weights`, in the order of their places; of equal ones the first.
fn pick(weights: &[f32], chosen: &mut [Choice]) {
    for index in 0..chosen.len() {
        let (before, rest) = chosen.split_at_mut(index);
        let mut best: Option<usize> = None;
        for (expert, weight) in weights.iter().enumerate() {
            let taken = before.iter().any(|choice| choice.expert == expert);
            if !taken && best.is_none_or(|best| *weight > weights[best]) {
                best = Some(expert);
            }
        }
        let expert = best.expect("no more experts are used than there are");
        rest[0] = Choice {
            expert,
            weight: weights[expert],
        };
    }
    chosen.sort_unstable_by_key(|choice| choice.expert);
}

#[cfg(test)]
mod tests {
    use super::{Choice, pick};

    #[test]
    fn the_greatest_are_picked_in_the_order_of_their_numbers() {
        let mut chosen = [Choice::default(); 3];
        pick(&[0.1, 0.3, 0.2, 0.3, 0.1, 0.2], &mut chosen);
        assert_eq!(chosen.map(|choice| choice.expert), [1, 2, 3]);
        assert_eq!(chosen.map(|choice| choice.weight), [0.3, 0.2, 0.3]);
    }
}
