//! What this machine could do at most: multiplications per second out of registers, and bytes per second that are read in order.
//!
//! `cargo run --release -p engine --example roofline -- [--threads 1,2] [--bytes N] [--json]`
//!
//! `f32` is fused multiply-adds, `int8` dot products of bytes into 32 bits, as the processor has them: one multiplication and one
//! addition count as two operations. Reading goes over `--bytes`, shared by the threads, those of a model's weights by default, so that it
//! is the cache that is measured where they fit into it. Each figure is the best of several runs.

#![allow(unsafe_code)]

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// A figure is measured for at least so long.
const MEASURE: Duration = Duration::from_millis(1000);
/// Rounds of one measurement: some milliseconds.
const ROUNDS: u64 = 2_000_000;
/// About the weights of a model of 135M parameters in 4 bits.
const BYTES_DEFAULT: usize = 100 << 20;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let (mut threads, mut bytes, mut json) = (vec![1, 2], BYTES_DEFAULT, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--threads" => threads = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--bytes" => bytes = value()?.parse()?,
            "--json" => json = true,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    let memory: Vec<u64> = (0..bytes as u64 / 8).collect();
    for count in threads {
        let float = best(count, &|_| float_operations(ROUNDS));
        let byte = best(count, &|_| byte_operations(ROUNDS));
        let read = best(count, &|thread| {
            let part = memory.len() / count;
            sum(&memory[thread * part..][..part]);
            part as u64 * 8
        });
        for (what, unit, rate) in [
            ("f32", "GFLOP/s", float),
            ("int8", "GOP/s", byte),
            ("read", "GB/s", read),
        ] {
            match json {
                true => println!(
                    r#"{{"what":"{what}","threads":{count},"giga_per_second":{:.2}}}"#,
                    rate / 1e9
                ),
                false => println!("{what:5} {count} threads {:9.1} {unit}", rate / 1e9),
            }
        }
    }
    Ok(())
}

/// The most per second that so many threads do together of what `work` counts.
fn best(threads: usize, work: &(dyn Fn(usize) -> u64 + Sync)) -> f64 {
    let (begin, mut most) = (Instant::now(), 0.0_f64);
    while begin.elapsed() < MEASURE {
        let barrier = Barrier::new(threads);
        let rates: Vec<(Instant, Instant, u64)> = std::thread::scope(|scope| {
            let run = |thread| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    let done = work(thread);
                    (start, Instant::now(), done)
                })
            };
            let threads: Vec<_> = (0..threads).map(run).collect();
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().expect("it does not panic"));
            joined.collect()
        });
        let start = rates.iter().map(|rate| rate.0).min().expect("a thread");
        let end = rates.iter().map(|rate| rate.1).max().expect("a thread");
        let done: u64 = rates.iter().map(|rate| rate.2).sum();
        most = most.max(done as f64 / (end - start).as_secs_f64());
    }
    most
}

/// Eight sums, so that loads and not additions are what is waited for.
fn sum(memory: &[u64]) -> u64 {
    let mut sums = [0_u64; 8];
    for chunk in memory.chunks_exact(8) {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*value);
        }
    }
    black_box(sums.iter().fold(0, |all, sum| all.wrapping_add(*sum)))
}

#[cfg(target_arch = "x86_64")]
fn float_operations(rounds: u64) -> u64 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the features, as just found.
        return unsafe { x86::float_512(rounds) };
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: as above.
        return unsafe { x86::float_256(rounds) };
    }
    portable(rounds)
}

#[cfg(target_arch = "x86_64")]
fn byte_operations(rounds: u64) -> u64 {
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the processor has the features, as just found.
        return unsafe { x86::bytes_512(rounds) };
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        return unsafe { x86::bytes_256(rounds) };
    }
    portable(rounds)
}

#[cfg(not(target_arch = "x86_64"))]
fn float_operations(rounds: u64) -> u64 {
    portable(rounds)
}

#[cfg(not(target_arch = "x86_64"))]
fn byte_operations(rounds: u64) -> u64 {
    portable(rounds)
}

/// What the compiler makes of it.
fn portable(rounds: u64) -> u64 {
    let mut sums = [[0.0_f32; 16]; 8];
    let (a, b) = (black_box(0.5_f32), black_box(0.25_f32));
    for _ in 0..rounds {
        for sum in &mut sums {
            for lane in sum {
                *lane = a.mul_add(b, *lane);
            }
        }
    }
    black_box(sums);
    rounds * 8 * 16 * 2
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Twelve sums in registers: more than two units have in flight.

    use std::arch::x86_64::*;
    use std::hint::black_box;

    const SUMS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub(super) fn float_512(rounds: u64) -> u64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
        rounds * SUMS as u64 * 16 * 2
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn float_256(rounds: u64) -> u64 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
        rounds * SUMS as u64 * 8 * 2
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn bytes_512(rounds: u64) -> u64 {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
        rounds * SUMS as u64 * 64 * 2
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn bytes_256(rounds: u64) -> u64 {
        let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)));
        let ones = _mm256_set1_epi16(black_box(1));
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                let pairs = _mm256_maddubs_epi16(black_box(a), b);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
        rounds * SUMS as u64 * 32 * 2
    }
}
