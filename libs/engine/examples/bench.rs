//! Tokens per second of prefill and decode, on this machine.
//!
//! `cargo run --release -p engine --example bench -- [--model PATH] [--threads 1,2] [--isa NAME] [--exact] [--json] [--first-token]`
//!
//! Prefill is one step of 128, 512 or 2048 tokens. Decode is steps of 1, 4, 8 or 16 sequences with about 128 or 2048 tokens of context,
//! which they share but for the last block. `--first-token` loads the model, computes one prompt of 16 tokens and ends: what that takes
//! is measured from outside.
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
const DECODE_CONTEXTS: [usize; 2] = [128, 2048];
const FIRST_TOKEN_PROMPT: usize = 16;
const DECODE_STEPS: usize = 16;

type Failure = Box<dyn std::error::Error>;

struct Options {
    model: PathBuf,
    threads: Vec<NonZeroUsize>,
    isa: Isa,
    precision: Precision,
    json: bool,
    first_token: bool,
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
        first_token: false,
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
            "--first-token" => options.first_token = true,
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
    if options.json && !options.first_token {
        let (bytes, operations) = (model.step_weight_bytes(), operations_per_token(&model));
        println!(r#"{{"phase":"model","step_weight_bytes":{bytes},"operations_per_token":{operations}}}"#);
    }
    let layout = model.layout(BLOCK_TOKENS);
    let [.., deepest] = DECODE_CONTEXTS;
    let [.., batch_max] = DECODE_BATCHES;
    // What all share, and a block for each.
    let count = layout.blocks_for(deepest) + batch_max;
    let memory: Arc<dyn Memory> = Arc::new(OwnMemory::allocate(layout.block_bytes() * count)?);
    let blocks: Vec<BlockId> = (0..).take(count).map(BlockId).collect();
    for threads in &options.threads {
        let engine = Engine::with_isa(
            Arc::clone(&model),
            Arc::clone(&memory),
            layout,
            *threads,
            options.isa,
        )?;
        let mut bench = Bench {
            engine,
            blocks: &blocks,
            report: Report {
                json: options.json,
                threads: *threads,
            },
        };
        if options.first_token {
            return bench.first_token();
        }
        for count in PREFILL_TOKENS {
            bench.prefill(count)?;
        }
        for context in DECODE_CONTEXTS {
            for batch in DECODE_BATCHES {
                bench.decode(context, batch)?;
            }
        }
    }
    Ok(())
}

/// Multiplications and additions of a token's products with the weights of all layers.
fn operations_per_token(model: &Model) -> usize {
    let config = model.config();
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let layer = config.hidden * (2 * queries + 2 * keys + 3 * config.intermediate);
    2 * config.layers * layer
}

/// Says what was measured.
struct Report {
    json: bool,
    threads: NonZeroUsize,
}

impl Report {
    fn tell(&self, phase: &str, size: usize, context: usize, tokens: usize, spent: Spent) {
        let Self { json, threads } = self;
        let rate = tokens as f64 / spent.wall.as_secs_f64();
        let per_processor = tokens as f64 / spent.processor.as_secs_f64();
        if *json {
            println!(
                r#"{{"phase":"{phase}","size":{size},"context":{context},"threads":{threads},"tokens_per_second":{rate:.1},"tokens_per_processor_second":{per_processor:.1}}}"#
            );
        } else {
            println!(
                "{phase:8} {size:5} at {context:5}  {threads} threads  {rate:8.1} tokens/s  {per_processor:8.1} per processor second"
            );
        }
    }
}

/// One engine and its memory.
struct Bench<'a> {
    engine: Engine,
    blocks: &'a [BlockId],
    report: Report,
}

impl Bench<'_> {
    fn tokens(&self, count: usize) -> Vec<Token> {
        let vocabulary = self.engine.model().config().vocabulary;
        (0..count)
            .map(|i| ((i * 7919 + 13) % vocabulary) as Token)
            .collect()
    }

    fn first_token(&mut self) -> Result<(), Failure> {
        let tokens = self.tokens(FIRST_TOKEN_PROMPT);
        let logits = self.engine.step(&[sequence(&tokens, 0, self.blocks)], &mut ())?;
        println!("{}", logits.row(0)[0]);
        Ok(())
    }

    fn prefill(&mut self, count: usize) -> Result<(), Failure> {
        let tokens = self.tokens(count);
        let step = sequence(&tokens, 0, self.blocks);
        let spent = best(|| Ok(self.engine.step(&[step], &mut ()).map(drop)?))?;
        self.report.tell("prefill", count, 0, count, spent);
        Ok(())
    }

    fn decode(&mut self, context: usize, batch: usize) -> Result<(), Failure> {
        let prompt = self.tokens(context);
        self.engine.step(&[sequence(&prompt, 0, self.blocks)], &mut ())?;
        let (shared, own) = self.blocks.split_at(context / BLOCK_TOKENS);
        let tables: Vec<Vec<BlockId>> = own[..batch]
            .iter()
            .map(|own| [shared, &[*own]].concat())
            .collect();
        let spent = best(|| {
            for position in context..context + DECODE_STEPS {
                let steps: Vec<_> = tables
                    .iter()
                    .zip(prompt.chunks(1))
                    .map(|(table, token)| sequence(token, position, table))
                    .collect();
                self.engine.step(&steps, &mut ())?;
            }
            Ok(())
        })?;
        self.report
            .tell("decode", batch, context, batch * DECODE_STEPS, spent);
        Ok(())
    }
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
