//! Disaggregated is monolithic, bit for bit: whatever a cluster does to a request (another node's prefill, chunks, batches,
//! caches of every length), its tokens are those of one engine that served nothing else.

#![allow(missing_docs)]

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use engine::fixture::{TinyModel, write_tiny_gguf, write_tiny_hf};
use engine::monolith::Monolith;
use engine::tensor::TensorFormat;
use engine::{Model, Numerics, Precision};
use futures::StreamExt;
use tests::cases::{Case, Random, token};
use tests::{Cluster, Generated, generate};
use types::{KvDtype, Token};

const VOCABULARY: u32 = 256;
const DOCUMENT_TOKENS: u64 = 3000;

struct Shape {
    seed: u64,
    cases: usize,
    concurrency: usize,
    arguments: &'static [&'static str],
    numerics: Numerics,
}

/// Prompts that share prefixes, some as long as the longest.
fn documents(random: &mut Random) -> Vec<Vec<Token>> {
    (0..3)
        .map(|_| (0..DOCUMENT_TOKENS).map(|_| token(random, VOCABULARY)).collect())
        .collect()
}

fn tiny(folder: &Path, format: TensorFormat) -> std::path::PathBuf {
    let path = folder.join("tiny.gguf");
    let model = TinyModel {
        format,
        ..TinyModel::default()
    };
    write_tiny_gguf(&path, &model).expect("write the model");
    path
}

/// A directory with the tiny model of a family.
fn of_family(folder: &Path, family: &'static str) -> std::path::PathBuf {
    let path = folder.join(family);
    write_tiny_hf(&path, &TinyModel::of(family), 1).expect("write the model");
    path
}

/// What one engine says, case by case.
fn expected(model: &Path, numerics: Numerics, cases: &[Case]) -> Vec<Vec<Token>> {
    let model = Model::load(model, numerics).expect("load");
    let mut monolith = Monolith::new(Arc::clone(&model), 32, 4096, NonZeroUsize::MIN).expect("engine");
    cases
        .iter()
        .map(|case| monolith.generate(&case.prompt, &case.sampling).expect("generate"))
        .collect()
}

async fn served(cluster: &Cluster, cases: &[Case], concurrency: usize) -> Vec<Generated> {
    let client = cluster.client().await;
    futures::stream::iter(cases)
        .map(|case| {
            let mut client = client.clone();
            async move {
                generate(&mut client, case.request())
                    .await
                    .expect("a request must not fail")
            }
        })
        .buffered(concurrency)
        .collect()
        .await
}

async fn compare(shape: Shape, format: TensorFormat) {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path(), format);
    compare_model(shape, &model).await;
}

async fn compare_model(shape: Shape, model: &Path) {
    let mut random = Random::new(shape.seed);
    let documents = documents(&mut random);
    let cases: Vec<Case> = (0..shape.cases)
        .map(|_| Case::random(&mut random, &documents, VOCABULARY, 24))
        .collect();
    let expected = expected(model, shape.numerics, &cases);
    let cluster = Cluster::start(model, shape.arguments);
    let served = served(&cluster, &cases, shape.concurrency).await;
    let mut cached = 0;
    let mut moved = 0;
    for (index, (generated, expected)) in served.iter().zip(&expected).enumerate() {
        assert_eq!(
            &generated.tokens, expected,
            "seed {} case {index}: {:?}\n{:?}",
            shape.seed, cases[index].sampling, generated.finished
        );
        assert_eq!(
            generated.usage().completion_tokens,
            expected.len() as u64,
            "case {index}"
        );
        assert_eq!(
            generated.usage().prompt_tokens,
            cases[index].prompt.len() as u64,
            "case {index}"
        );
        cached += generated.usage().cached_tokens;
        moved += generated.report().handoff_bytes;
    }
    assert!(
        cached > 0,
        "no case hit a cache: the comparison would prove little"
    );
    assert!(
        moved > 0,
        "no KV moved between nodes: the comparison would prove little"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_nodes_in_turn_with_small_chunks_and_batches_of_16() {
    let arguments = &[
        "--prefill",
        "2",
        "--decode",
        "2",
        "--kv-memory",
        "64MiB",
        "--set",
        "router.policy=round_robin",
        "--set",
        "prefill.step_tokens=96",
        "--set",
        "decode.step_tokens=48",
    ];
    let shape = Shape {
        seed: 1,
        cases: 90,
        concurrency: 16,
        arguments,
        numerics: Precision::Fast.into(),
    };
    compare(shape, TensorFormat::Q4_1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pair_one_request_at_a_time() {
    let arguments = &[
        "--prefill",
        "1",
        "--decode",
        "1",
        "--kv-memory",
        "64MiB",
        "--set",
        "router.local_prefill_tokens_max=0",
    ];
    let shape = Shape {
        seed: 2,
        cases: 40,
        concurrency: 1,
        arguments,
        numerics: Precision::Fast.into(),
    };
    compare(shape, TensorFormat::Q8_0).await;
}

/// Windows with rotations of their own, and experts: prompts that begin in another node's cache are far longer than the window.
#[tokio::test(flavor = "multi_thread")]
async fn other_families_are_served_as_llama_is() {
    for (seed, family) in [(5, "gemma3"), (6, "qwen3moe")] {
        let arguments = &[
            "--prefill",
            "2",
            "--decode",
            "1",
            "--kv-memory",
            "64MiB",
            "--set",
            "router.policy=round_robin",
            "--set",
            "prefill.step_tokens=96",
        ];
        let shape = Shape {
            seed,
            cases: 20,
            concurrency: 8,
            arguments,
            numerics: Precision::Fast.into(),
        };
        let folder = tempfile::tempdir().expect("folder");
        compare_model(shape, &of_family(folder.path(), family)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_too_small_for_the_batch_preempts() {
    let arguments = &[
        "--prefill",
        "1",
        "--decode",
        "2",
        "--kv-memory",
        "4MiB",
        "--set",
        "router.policy=random",
        "--set",
        "prefill.step_tokens=256",
    ];
    let shape = Shape {
        seed: 3,
        cases: 60,
        concurrency: 12,
        arguments,
        numerics: Precision::Fast.into(),
    };
    compare(shape, TensorFormat::F16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_precision_with_the_default_policy() {
    let arguments = &[
        "--prefill",
        "1",
        "--decode",
        "2",
        "--kv-memory",
        "64MiB",
        "--precision",
        "exact",
    ];
    let shape = Shape {
        seed: 4,
        cases: 40,
        concurrency: 4,
        arguments,
        numerics: Precision::Exact.into(),
    };
    compare(shape, TensorFormat::Q4_1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_in_bytes_moves_between_nodes_and_gives_one_engines_tokens() {
    let arguments = &[
        "--prefill",
        "2",
        "--decode",
        "2",
        "--kv-memory",
        "64MiB",
        "--set",
        "router.policy=round_robin",
        "--set",
        "model.kv_format=int8",
    ];
    let shape = Shape {
        seed: 5,
        cases: 40,
        concurrency: 8,
        arguments,
        numerics: Numerics {
            kv: KvDtype::Int8,
            ..Precision::Fast.into()
        },
    };
    compare(shape, TensorFormat::Q4_1).await;
}
