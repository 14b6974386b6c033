use proptest::prelude::*;

use super::*;
use crate::compute::isa::{Isa, kernel};

const OPERATIONS: usize = 14;

kernel! {
    fn operations(a: &[f32; LANES], b: &[f32; LANES], c: &[f32; LANES], count: usize, out: &mut [[f32; LANES]]) =
        operations_lanes
}

#[inline(always)]
fn operations_lanes<L: Lanes>(
    a: &[f32; LANES],
    b: &[f32; LANES],
    c: &[f32; LANES],
    count: usize,
    out: &mut [[f32; LANES]],
) {
    let (a, b, c) = (L::load(a), L::load(b), L::load(c));
    let exponent = L::splat(-126.0).max(L::splat(127.0).min(b.round()));
    let results = [
        a.add(b),
        a.sub(b),
        a.mul(b),
        a.div(b),
        a.mul_add(b, c),
        a.max(b),
        a.min(b),
        a.abs(),
        a.round(),
        c.scale_by_power_of_two(exponent),
        a.keep_first(count, 7.0),
        a.zero_unless_greater(b, 0.5),
        L::splat(a.sum()),
        L::splat(a.greatest()),
    ];
    for (out, result) in out.iter_mut().zip(results) {
        result.store(out);
    }
}

kernel! {
    fn conversions(bits: &[u16; LANES], values: &[f32; LANES], out: &mut Converted) = conversions_lanes
}

#[derive(Default, PartialEq, Debug)]
struct Converted {
    from_f16: [u32; LANES],
    from_bf16: [u32; LANES],
    from_i8: [u32; LANES],
    to_f16: [u16; LANES],
    words: [i32; LANES / 4],
}

#[inline(always)]
fn conversions_lanes<L: Lanes>(bits: &[u16; LANES], values: &[f32; LANES], out: &mut Converted) {
    let mut lanes = [0.0; LANES];
    L::from_f16(bits).store(&mut lanes);
    out.from_f16 = lanes.map(f32::to_bits);
    L::from_bf16(bits).store(&mut lanes);
    out.from_bf16 = lanes.map(f32::to_bits);
    L::from_i8(&bits.map(|bits| bits as i8)).store(&mut lanes);
    out.from_i8 = lanes.map(f32::to_bits);
    L::load(values).to_f16(&mut out.to_f16);
    let limited = L::splat(-127.0).max(L::splat(127.0).min(L::load(values).round()));
    out.words = limited.to_words();
}

kernel! {
    fn dots(codes: &[u8; 256], rows: &[Words; 3], sums: &[i32; 3], out: &mut Vec<[f32; LANES]>) = dots_lanes
}

#[inline(always)]
fn dots_lanes<L: Lanes>(codes: &[u8; 256], rows: &[Words; 3], sums: &[i32; 3], out: &mut Vec<[f32; LANES]>) {
    let mut push = |ints: [L::Ints; 3]| {
        for ints in ints {
            let mut lanes = [0.0; LANES];
            L::from_ints(ints).store(&mut lanes);
            out.push(lanes);
        }
    };
    for offset in [false, true] {
        push(L::dot_nibbles(
            codes,
            [&rows[0], &rows[1], &rows[2]],
            *sums,
            offset,
        ));
    }
    let words = [0, 1, 2].map(|row: usize| &rows[row].as_chunks::<4>().0[1]);
    let halves = [0, 1, 2].map(|row: usize| words[row].iter().map(|word| sum_of(*word)).sum());
    push(L::dot_bytes(
        ByteCodes::Offset128,
        codes,
        words,
        halves,
        [L::ints(5); 3],
    ));
    let small = codes.map(|code| code % 64);
    push(L::dot_bytes(
        ByteCodes::Small,
        &small,
        words,
        halves,
        [L::ints(-9); 3],
    ));
}

fn sum_of(word: i32) -> i32 {
    word.to_le_bytes().iter().map(|byte| i32::from(*byte as i8)).sum()
}

fn others() -> impl Iterator<Item = Isa> {
    Isa::available().into_iter().filter(|isa| *isa != Isa::SCALAR)
}

fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -200.0f32..200.0,
        1 => -1e30f32..1e30,
        1 => Just(0.0),
        1 => Just(-0.0),
        1 => any::<i16>().prop_map(|i| f32::from(i) + 0.5),
    ]
}

proptest! {
    #[test]
    fn arithmetic_has_the_same_bits_on_every_instruction_set(
        a in prop::array::uniform16(value()),
        b in prop::array::uniform16(value()),
        c in prop::array::uniform16(value()),
        count in 0usize..20,
    ) {
        let run = |isa| {
            let mut out = [[0.0f32; LANES]; OPERATIONS];
            operations(isa, &a, &b, &c, count, &mut out);
            // A NaN's payload is not part of the contract.
            out.map(|lanes| lanes.map(|lane| if lane.is_nan() { u32::MAX } else { lane.to_bits() }))
        };
        for isa in others() {
            prop_assert_eq!(run(isa), run(Isa::SCALAR), "{:?}", isa);
        }
    }

    #[test]
    fn conversions_have_the_same_bits_on_every_instruction_set(
        bits in prop::array::uniform16(any::<u16>().prop_filter("a NaN is not finite", |bits| {
            !half::f16::from_bits(*bits).is_nan() && !half::bf16::from_bits(*bits).is_nan()
        })),
        values in prop::array::uniform16(prop_oneof![value(), -70000.0f32..70000.0, -1e-6f32..1e-6]),
    ) {
        let run = |isa| {
            let mut out = Converted::default();
            conversions(isa, &bits, &values, &mut out);
            out
        };
        for isa in others() {
            prop_assert_eq!(run(isa), run(Isa::SCALAR), "{:?}", isa);
        }
    }

    #[test]
    fn integer_dots_are_exact_on_every_instruction_set(
        codes in prop::collection::vec(any::<u8>(), 256),
        columns in prop::collection::vec(prop_oneof![-127i8..=127, Just(127), Just(-127)], 96),
        saturated in any::<bool>(),
    ) {
        let codes: [u8; 256] = if saturated { [255; 256] } else { codes.try_into().expect("256 codes") };
        let rows: [Words; 3] = std::array::from_fn(|row| std::array::from_fn(|word| {
            let at = 32 * row + 4 * word;
            i32::from_le_bytes(std::array::from_fn(|j| columns[at + j] as u8))
        }));
        let sums = rows.map(|row| row.iter().map(|word| sum_of(*word)).sum());
        let run = |isa| {
            let mut out = Vec::new();
            dots(isa, &codes, &rows, &sums, &mut out);
            out
        };
        for isa in others() {
            prop_assert_eq!(run(isa), run(Isa::SCALAR), "{:?}", isa);
        }
    }
}

#[test]
fn the_scalar_dot_follows_its_definition() {
    let codes: [u8; 256] = std::array::from_fn(|i| (i * 37 % 256) as u8);
    let column = |i: usize| (i as i32 * 29 % 255) - 127;
    let words: Words =
        std::array::from_fn(|w| i32::from_le_bytes(std::array::from_fn(|j| column(4 * w + j) as u8)));
    let sum = (0..32).map(column).sum::<i32>();
    let dots = Scalar::dot_nibbles(&codes, [&words], [sum], true);
    for (lane, dot) in dots[0].iter().enumerate() {
        let expected: i32 = (0..32)
            .map(|i| {
                let byte = codes[64 * (i % 16 / 4) + 4 * lane + i % 4];
                let code = if i < 16 { byte & 15 } else { byte >> 4 };
                (i32::from(code) - 8) * column(i)
            })
            .sum();
        assert_eq!(*dot, expected, "lane {lane}");
    }
}
