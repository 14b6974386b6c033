//! Tokens per second of prefill and decode, on this machine.
//!
//! `cargo run --release -p engine --example bench -- [--model PATH] [--threads 1,2] [--isa NAME] [--exact] [--json]`
//!
//! Prefill is one step of 128, 512 or 2048 tokens. Decode is steps of 1, 4, 8 or 16 sequences with about 128 tokens of context.
//! Each figure is the best of several runs, since other work on the machine can only slow a run down. Beside it stands the figure per
//! second of processor time, which other work disturbs less; it counts the spinning of idle threads.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::monolith::OwnMemory;
use engine::{Engine, Isa, LogitsWanted, Model, Precision, SequenceStep};
use types::{BlockId, Memory, Token};

/// A figure is measured for at least so long.
const MEASURE: Duration = Duration::from_millis(1500);
const BLOCK_TOKENS: usize = 32;
const PREFILL_TOKENS: [usize; 3] = [128, 512, 2048];
const DECODE_BATCHES: [usize; 4] = [1, 4, 8, 16];
const DECODE_CONTEXT: usize = 128;
const DECODE_STEPS: usize = 16;

type Failure = Box<dyn std::error::Error>;

struct Options {
    model: PathBuf,
    threads: Vec<NonZeroUsize>,
    isa: Isa,
    precision: Precision,
    json: bool,
}

fn options() -> Result<Options, Failure> {
    let default = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../models/SmolLM2-135M-Instruct.Q4_1.gguf"
    );
    let mut options = Options {
        model: std::env::var_os("PERIGEE_MODEL").map_or_else(|| default.into(), PathBuf::from),
        threads: vec![NonZeroUsize::MIN, NonZeroUsize::MIN.saturating_add(1)],
        isa: Isa::detect(),
        precision: Precision::Fast,
        json: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--model" => options.model = value()?.into(),
            "--threads" => {
                options.threads = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            "--isa" => {
                let name = value()?;
                let found = Isa::available().into_iter().find(|isa| isa.name() == name);
                options.isa = found.ok_or(format!("this processor has no {name}"))?;
            }
            "--exact" => options.precision = Precision::Exact,
            "--json" => options.json = true,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    Ok(options)
}

/// Time by the clock, and of all processors.
#[derive(Clone, Copy)]
struct Spent {
    wall: Duration,
    processor: Duration,
}

/// Processor time of this process so far; zero where the system does not tell.
fn processor_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let of_task = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.filter_map(of_task).sum())
}

/// The shortest of the runs that fit the measuring time, and at least two.
fn best(mut run: impl FnMut() -> Result<(), Failure>) -> Result<Spent, Failure> {
    let begin = Instant::now();
    let (mut shortest, mut runs) = (
        Spent {
            wall: Duration::MAX,
            processor: Duration::MAX,
        },
        0,
    );
    while runs < 2 || begin.elapsed() < MEASURE {
        let (start, processor) = (Instant::now(), processor_time());
        run()?;
        let spent = Spent {
            wall: start.elapsed(),
            processor: processor_time().saturating_sub(processor),
        };
        shortest.wall = shortest.wall.min(spent.wall);
        shortest.processor = shortest.processor.min(spent.processor);
        runs += 1;
    }
    Ok(shortest)
}

fn tokens(count: usize, vocabulary: usize) -> Vec<Token> {
    (0..count)
        .map(|i| ((i * 7919 + 13) % vocabulary) as Token)
        .collect()
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let start = Instant::now();
    let model = Model::load(&options.model, options.precision)?;
    eprintln!(
        "{}: {} MiB of weights, loaded in {:.2} s, {}",
        model.config().name,
        model.weight_bytes() >> 20,
        start.elapsed().as_secs_f64(),
        options.isa.name()
    );
    let layout = model.layout(BLOCK_TOKENS);
    let per_sequence = layout.blocks_for(PREFILL_TOKENS[2]);
    let memory = OwnMemory::allocate(layout.block_bytes() * per_sequence * DECODE_BATCHES[3])?;
    let memory: Arc<dyn Memory> = Arc::new(memory);
    let blocks: Vec<BlockId> = (0..)
        .take(per_sequence * DECODE_BATCHES[3])
        .map(BlockId)
        .collect();
    for threads in &options.threads {
        let mut engine = Engine::with_isa(
            Arc::clone(&model),
            Arc::clone(&memory),
            layout,
            *threads,
            options.isa,
        )?;
        let report = |phase: &str, size: usize, tokens: usize, spent: Spent| {
            let rate = tokens as f64 / spent.wall.as_secs_f64();
            let per_processor = tokens as f64 / spent.processor.as_secs_f64();
            if options.json {
                println!(
                    r#"{{"phase":"{phase}","size":{size},"threads":{threads},"tokens_per_second":{rate:.1},"tokens_per_processor_second":{per_processor:.1}}}"#
                );
            } else {
                println!(
                    "{phase:8} {size:5}  {threads} threads  {rate:8.1} tokens/s  {per_processor:8.1} per processor second"
                );
            }
        };
        for count in PREFILL_TOKENS {
            let tokens = tokens(count, model.config().vocabulary);
            let step = sequence(&tokens, 0, &blocks);
            let spent = best(|| Ok(engine.step(&[step], &mut ()).map(drop)?))?;
            report("prefill", count, count, spent);
        }
        for batch in DECODE_BATCHES {
            let prompt = tokens(DECODE_CONTEXT, model.config().vocabulary);
            let of_sequence = |index: usize| &blocks[index * per_sequence..][..per_sequence];
            for index in 0..batch {
                engine.step(&[sequence(&prompt, 0, of_sequence(index))], &mut ())?;
            }
            let spent = best(|| {
                for position in DECODE_CONTEXT..DECODE_CONTEXT + DECODE_STEPS {
                    let steps: Vec<_> = (0..batch)
                        .map(|index| sequence(&prompt[index..=index], position, of_sequence(index)))
                        .collect();
                    engine.step(&steps, &mut ())?;
                }
                Ok(())
            })?;
            report("decode", batch, batch * DECODE_STEPS, spent);
        }
    }
    Ok(())
}

fn sequence<'a>(tokens: &'a [Token], start: usize, blocks: &'a [BlockId]) -> SequenceStep<'a> {
    SequenceStep {
        tokens,
        start,
        blocks,
        cached_tokens: 0,
        logits: LogitsWanted::Last,
    }
}
