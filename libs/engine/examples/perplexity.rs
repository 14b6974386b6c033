//! Perplexity of a text, as `llama-perplexity` counts it: the text is cut into windows of so many tokens, the first of each is replaced by
//! the model's own beginning if it wants one, and the tokens of a window's second half are predicted from all before them in the window.
//!
//! `cargo run --release -p engine --example perplexity -- --model PATH --text PATH [--window 512] [--windows 8] [--exact]
//! [--kv-format f32|f16|bf16|int8] [--threads 2]`

use std::num::NonZeroUsize;
use std::sync::Arc;

use engine::monolith::OwnMemory;
use engine::{Engine, LogitsWanted, Model, Numerics, Precision, SequenceStep};
use types::{BlockId, KvDtype, Token};

const BLOCK_TOKENS: usize = 32;
/// Rows whose logits are made at a time.
const CHUNK_ROWS: usize = 128;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let (mut model, mut text) = (std::env::var("PERIGEE_MODEL").unwrap_or_default(), String::new());
    let (mut window, mut windows, mut threads) = (512, 8, NonZeroUsize::MIN.saturating_add(1));
    let (mut precision, mut kv) = (Precision::Fast, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--model" => model = value()?,
            "--text" => text = value()?,
            "--window" => window = value()?.parse()?,
            "--windows" => windows = value()?.parse()?,
            "--threads" => threads = value()?.parse()?,
            "--exact" => precision = Precision::Exact,
            "--kv-format" => {
                let name = value()?;
                let found = KvDtype::ALL.into_iter().find(|dtype| dtype.name() == name);
                kv = Some(found.ok_or(format!("no KV format is named {name}"))?);
            }
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    let by_precision = Numerics::from(precision);
    let numerics = Numerics {
        kv: kv.unwrap_or(by_precision.kv),
        ..by_precision
    };
    let model = Model::load(model.as_ref(), numerics)?;
    let tokens = model.tokenizer().encode(&std::fs::read_to_string(text)?, false);
    let layout = model.layout(BLOCK_TOKENS);
    let blocks: Vec<BlockId> = (0..layout.blocks_for(window) as u32).map(BlockId).collect();
    let memory = Arc::new(OwnMemory::allocate(blocks.len() * layout.block_bytes())?);
    let mut engine = Engine::new(Arc::clone(&model), memory, layout, threads)?;
    let (mut sum, mut count) = (0.0, 0_usize);
    for tokens in tokens.chunks_exact(window).take(windows) {
        let mut tokens: Vec<Token> = tokens.to_vec();
        if let Some(first) = model.tokenizer().bos().filter(|_| model.tokenizer().add_bos()) {
            tokens[0] = first;
        }
        for start in (0..window).step_by(CHUNK_ROWS) {
            let step = SequenceStep {
                tokens: &tokens[start..(start + CHUNK_ROWS).min(window)],
                start,
                blocks: &blocks,
                cached_tokens: 0,
                logits: LogitsWanted::All,
            };
            let logits = engine.step(&[step], &mut ())?;
            for row in 0..logits.rows() {
                let position = start + row;
                if position >= window / 2 && position + 1 < window {
                    sum -= log_probability(logits.row(row), tokens[position + 1] as usize);
                    count += 1;
                }
            }
        }
    }
    println!("{:.4} over {count} tokens", (sum / count as f64).exp());
    Ok(())
}

fn log_probability(logits: &[f32], token: usize) -> f64 {
    let greatest = logits
        .iter()
        .fold(f32::MIN, |greatest, logit| greatest.max(*logit));
    let total: f64 = logits.iter().map(|logit| f64::from(logit - greatest).exp()).sum();
    f64::from(logits[token] - greatest) - total.ln()
}
