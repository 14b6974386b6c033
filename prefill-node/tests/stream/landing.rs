//! What lands is what one engine alone computes.

use std::collections::BTreeSet;

use futures::future::join_all;
use prefill_node::Config;
use proto::v1;
use types::Token;

use crate::harness::*;

/// Small steps, so that prompts take several.
fn config(step_tokens: usize) -> Config {
    Config {
        step_tokens,
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn landed_bytes_and_token_equal_a_single_engines() {
    let model = tiny_model();
    let mut reference = Reference::new(&model);
    for (round, step_tokens) in [8, 24, 512].into_iter().enumerate() {
        let node = PrefillNode::start(&model, 400, config(step_tokens)).await;
        let decode = DecodeSide::start(&model, 400, &node).await;
        let cases: Vec<_> = [1, 7, 8, 9, 16, 40, 63, 64, 65, 200, 333]
            .into_iter()
            .enumerate()
            .map(|(i, length)| {
                let tokens = prompt((round * 100 + i) as u32, length);
                let resumed = if i % 3 == 0 { length / 4 } else { 0 };
                let params = sampled(if i % 2 == 0 { 0.0 } else { 1.0 }, i as u64);
                let held = length / BLOCK_TOKENS * (i % 4) / 4;
                (tokens, length - resumed, held, params)
            })
            .collect();
        // All at once: chunks of several prompts share steps.
        let received = join_all(cases.iter().map(|(tokens, prompt_tokens, held, params)| {
            decode.receive(v1::PrefillStart {
                prompt_tokens: *prompt_tokens as u64,
                held_blocks: *held as u64,
                sampling: to_wire(params),
                ..decode.request(tokens)
            })
        }))
        .await;
        for ((tokens, prompt_tokens, held, params), received) in cases.iter().zip(received) {
            let received = received.expect("landed");
            let (bytes, token) = reference.prefill(tokens, *prompt_tokens, params);
            assert_eq!(
                received.landed.first_token,
                token,
                "first token after {} tokens",
                tokens.len()
            );
            assert!(
                received.bytes == bytes[*held..],
                "KV of {} tokens, step {step_tokens}",
                tokens.len()
            );
            assert_eq!(received.landed.cached_tokens, 0);
            let pushed = (bytes.len() - held) * bytes[0].len();
            assert_eq!(
                received.landed.handoff_bytes, pushed as u64,
                "every byte is pushed once"
            );
        }
        node.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_request_is_told_what_was_cached() {
    let model = tiny_model();
    let mut reference = Reference::new(&model);
    let node = PrefillNode::start(&model, 100, config(16)).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let tokens = prompt(5, 100);
    let greedy = sampled(0.0, 0);
    decode
        .receive(decode.request(&tokens[..67]))
        .await
        .expect("landed");
    // 67 tokens are 8 full blocks; the ninth is partial, and private.
    for (length, cached) in [
        (100, 64),
        (64, 64),
        (65, 64),
        (60, 56),
        (100, 96),
        (96, 96),
        (8, 8),
        (7, 0),
    ] {
        let received = decode
            .receive(decode.request(&tokens[..length]))
            .await
            .expect("landed");
        assert_eq!(received.landed.cached_tokens, cached, "of {length} tokens");
        let (bytes, token) = reference.prefill(&tokens[..length], length, &greedy);
        assert!(received.bytes == bytes, "KV of {length} tokens, {cached} cached");
        assert_eq!(received.landed.first_token, token);
    }
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_share_no_cache() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 100, config(64)).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let tokens = prompt(6, 40);
    let of = |tenant: &str| v1::PrefillStart {
        tenant: tenant.into(),
        ..decode.request(&tokens)
    };
    let mut cached = Vec::new();
    for tenant in ["", "a", "b", "a"] {
        cached.push(
            decode
                .receive(of(tenant))
                .await
                .expect("landed")
                .landed
                .cached_tokens,
        );
    }
    assert_eq!(cached, [0, 0, 0, 40]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_is_fetched_from_a_peer() {
    let model = tiny_model();
    let mut reference = Reference::new(&model);
    let peer = PrefillNode::start(&model, 60, config(64)).await;
    let node = PrefillNode::start(&model, 60, config(64)).await;
    let tokens = prompt(8, 150);
    let to_peer = DecodeSide::start(&model, 60, &peer).await;
    to_peer
        .receive(to_peer.request(&tokens[..120]))
        .await
        .expect("landed");
    let decode = DecodeSide::start(&model, 60, &node).await;
    let dead = v1::PrefixSource {
        grpc_endpoint: "127.0.0.1:1".into(),
        ..peer.source(15)
    };
    let start = v1::PrefillStart {
        sources: vec![dead, peer.source(15)],
        ..decode.request(&tokens)
    };
    let received = decode.receive(start).await.expect("landed");
    let (bytes, token) = reference.prefill(&tokens, tokens.len(), &sampled(0.0, 0));
    assert_eq!(received.landed.cached_tokens, 120);
    assert_eq!(received.landed.fetched_bytes, 15 * bytes[0].len() as u64);
    assert!(received.bytes == bytes, "fetched and computed KV together");
    assert_eq!(received.landed.first_token, token);
    node.idle().await;
    peer.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_shares_a_pool_that_holds_two_of_them() {
    let model = tiny_model();
    // 13 blocks each: two fit, and nobody may hold blocks while it waits for more.
    let node = PrefillNode::start(&model, 30, config(32)).await;
    let decode = DecodeSide::start(&model, 300, &node).await;
    let prompts: Vec<Vec<Token>> = (0..16).map(|seed| prompt(seed, 100)).collect();
    let received = join_all(
        prompts
            .iter()
            .map(|tokens| decode.receive(decode.request(tokens))),
    )
    .await;
    let tokens: BTreeSet<_> = received
        .into_iter()
        .map(|one| one.expect("landed").landed.checksums)
        .collect();
    assert_eq!(tokens.len(), prompts.len(), "everyone got its own KV");
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wait_for_an_offer_holds_nobody_else_up() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 100, config(8)).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let mut slow = decode.open(decode.request(&prompt(1, 200))).await;
    let blocks = slow.started().await.expect("started");
    for seed in 2..6 {
        decode
            .receive(decode.request(&prompt(seed, 50)))
            .await
            .expect("landed");
    }
    // By now its own prompt is computed too; the slices waited.
    let grant = decode.grant(blocks);
    slow.offer(1, &grant).await;
    let landed = slow.landed().await.expect("landed");
    let checksums: Vec<u64> = grant
        .blocks()
        .iter()
        .map(|block| decode.store.checksum(*block).0)
        .collect();
    assert_eq!(landed.checksums, checksums);
    assert!(landed.handoff_exposed_ms > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_node_that_holds_all_blocks_gets_the_token_alone() {
    let model = tiny_model();
    let mut reference = Reference::new(&model);
    let node = PrefillNode::start(&model, 50, config(64)).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let tokens = prompt(3, 48);
    let start = v1::PrefillStart {
        held_blocks: 6,
        ..decode.request(&tokens)
    };
    let mut conversation = decode.open(start).await;
    assert_eq!(conversation.started().await.expect("started"), 0);
    let landed = conversation.landed().await.expect("landed");
    assert!(landed.checksums.is_empty());
    assert_eq!(
        landed.first_token,
        reference.prefill(&tokens, 48, &sampled(0.0, 0)).1
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_come_with_their_texts() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 50, config(64)).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let params = types::SamplingParams {
        logprobs: Some(3),
        ..sampled(0.0, 0)
    };
    let start = v1::PrefillStart {
        sampling: to_wire(&params),
        ..decode.request(&prompt(2, 20))
    };
    let landed = decode.receive(start).await.expect("landed").landed;
    let logprob = landed.logprob.expect("asked for");
    assert_eq!(logprob.top.len(), 3);
    assert_eq!(
        logprob.top[0].token, landed.first_token,
        "greedy takes the most likely one"
    );
    assert_eq!(
        logprob.top[0].text,
        model.tokenizer().token_bytes(landed.first_token)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_load_report_and_metrics_tell_what_was_done() {
    use node::LoadSource as _;
    let model = tiny_model();
    let node = PrefillNode::start(&model, 100, config(64)).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let before = node.handle.load();
    let measured = before.prefill_ms_per_token + before.prefill_ms_per_token_kilocontext;
    assert!(measured > 0.0, "a node knows its speed before its first request");
    assert_eq!(before.transfer_bytes_per_ms, 0.0, "nothing has moved yet");
    decode
        .receive(decode.request(&prompt(1, 300)))
        .await
        .expect("landed");
    decode
        .receive(decode.request(&prompt(1, 300)))
        .await
        .expect("landed");
    node.idle().await;
    let load = node.handle.load();
    assert!(load.prefill_ms_per_token + load.prefill_ms_per_token_kilocontext > 0.0);
    assert!(load.transfer_bytes_per_ms > 0.0);
    assert_eq!((load.queued_requests, load.queued_prefill_tokens), (0, 0));
    assert_eq!(load.free_blocks + load.evictable_blocks, 100);
    let text = node.metrics.encode();
    let has = |line: &str| {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is missing in\n{text}"
        )
    };
    has("perigee_prefill_requests_total{outcome=\"landed\"} 2");
    has("perigee_prefill_computed_tokens_total 304");
    has("perigee_prefill_cached_tokens_total 296");
    has("perigee_prefill_queued_requests 0");
    has("perigee_prefill_handoff_exposed_seconds_count 2");
}
