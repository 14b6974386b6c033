//! A decode node by itself: prompts are prefilled on it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::*;
use decode_node::Config;
use proto::v1;
use types::{ErrorCode, SamplingParams, Token};

/// Random requests, some of which share prefixes, with what a monolith answers.
fn cases(
    seed: u64,
    count: usize,
    prompt_max: usize,
    output_max: usize,
) -> Vec<(Vec<Token>, SamplingParams, Vec<Token>)> {
    let mut dice = Dice(seed);
    let shared = dice.tokens(prompt_max);
    let mut monolith = monolith();
    let mut cases = Vec::new();
    for _ in 0..count {
        let length = dice.between(1, prompt_max);
        let common = dice.below(length + 1) * dice.below(2);
        let mut prompt = shared[..common].to_vec();
        prompt.extend(dice.tokens(length - common));
        let params = dice.params(output_max);
        let expected = monolith.generate(&prompt, &params).unwrap();
        cases.push((prompt, params, expected));
    }
    cases
}

async fn all_equal(node: &Node, cases: &[(Vec<Token>, SamplingParams, Vec<Token>)]) {
    let answers = cases
        .iter()
        .map(|(prompt, params, _)| node.decode(node.request(prompt, params)));
    let answers = futures::future::join_all(answers).await;
    for ((prompt, params, expected), answer) in cases.iter().zip(answers) {
        let answer = answer.unwrap_or_else(|error| panic!("{error} for {params:?}"));
        assert_eq!(
            &answer.tokens,
            expected,
            "{} prompt tokens, {params:?}",
            prompt.len()
        );
        let usage = answer.finished.usage.unwrap();
        assert_eq!(usage.completion_tokens as usize, expected.len());
        assert_eq!(usage.prompt_tokens as usize, prompt.len());
        assert!(usage.cached_tokens <= usage.prompt_tokens);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_equal_the_monoliths_whoever_shares_the_batch() {
    let node = Node::start(400, config()).await;
    let cases = cases(1, 60, 150, 30);
    all_equal(&node, &cases).await;
    // Once more, now that all prefixes are cached.
    all_equal(&node, &cases).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_the_same_when_memory_is_so_short_that_sequences_are_preempted() {
    let node = Node::start(14, config()).await;
    assert_eq!(node.handle.context_tokens_max(), 14 * BLOCK_TOKENS);
    let cases = cases(2, 40, 40, 60);
    all_equal(&node, &cases).await;
    assert!(
        node.metric("perigee_decode_preemptions_total") > 0.0,
        "memory was not short"
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_of_two_blocks_serves_one_after_the_other() {
    let node = Node::start(2, config()).await;
    let cases = cases(3, 12, 12, 4);
    all_equal(&node, &cases).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_are_cancelled_at_any_moment_leave_nothing_behind() {
    let node = Node::start(40, config()).await;
    let mut dice = Dice(4);
    let mut cancelled = Vec::new();
    for _ in 0..60 {
        let prompt_tokens = dice.between(1, 100);
        let prompt = dice.tokens(prompt_tokens);
        let request = node.request(
            &prompt,
            &SamplingParams {
                ignore_eos: true,
                max_tokens: 200,
                ..Default::default()
            },
        );
        let messages = dice.below(6);
        let mut client = node.client();
        cancelled.push(tokio::spawn(async move {
            let mut stream = client.decode(request).await.unwrap().into_inner();
            for _ in 0..messages {
                stream.message().await.unwrap();
            }
        }));
    }
    for task in cancelled {
        task.await.unwrap();
    }
    node.at_rest().await;
    all_equal(&node, &cases(5, 5, 50, 10)).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_could_wait_forever_ends_with_its_client() {
    let node = Node::start(200, config()).await;
    let outside = node.store.allocate(200).unwrap();
    let request = node.request(&[5; 9], &SamplingParams::default());
    let waiting = node.open(request).await.unwrap();
    assert_eq!(node.handle.requests(), 1);
    drop(waiting);
    eventually("nobody waits", || node.handle.requests() == 0).await;
    drop(outside);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_turn_finds_every_full_block_of_the_conversation() {
    let node = Node::start(200, config()).await;
    let mut monolith = monolith();
    let mut dice = Dice(6);
    for _ in 0..20 {
        let prompt_tokens = dice.between(1, 60);
        let mut conversation = dice.tokens(prompt_tokens);
        for _ in 0..3 {
            let params = SamplingParams {
                ignore_eos: true,
                ..dice.params(20)
            };
            let answer = node.decode(node.request(&conversation, &params)).await.unwrap();
            conversation.extend(&answer.tokens);
            let full = conversation.len() / BLOCK_TOKENS * BLOCK_TOKENS;
            // The next turn says one token more, so that what is cached is what the last one left.
            conversation.extend(dice.tokens(1));
            let short = SamplingParams {
                max_tokens: 1,
                ..Default::default()
            };
            let next = node.decode(node.request(&conversation, &short)).await.unwrap();
            assert_eq!(next.cached_tokens(), full, "{} tokens", conversation.len());
            assert_eq!(next.tokens, monolith.generate(&conversation, &short).unwrap());
        }
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_resumed_after_any_token_continues_tokens_and_text() {
    let node = Node::start(200, config()).await;
    let mut dice = Dice(7);
    for _ in 0..6 {
        let prompt = dice.tokens(30);
        let params = SamplingParams {
            stop: vec!["e".into()],
            ..dice.params(24)
        };
        let whole = node.decode(node.request(&prompt, &params)).await.unwrap();
        let mut stream = node.open(node.request(&prompt, &params)).await.unwrap();
        // Every message is a moment at which the first node may be lost.
        let (mut ids, mut text) = (Vec::new(), String::new());
        while let Some(message) = stream.message().await.unwrap() {
            let Some(v1::decode_event::Event::Tokens(tokens)) = message.event else {
                break;
            };
            ids.extend(tokens.ids);
            text.push_str(&tokens.text);
            let request = v1::DecodeRequest {
                resumed: ids.clone(),
                ..node.request(&prompt, &params)
            };
            let rest = node.decode(request).await.unwrap();
            assert_eq!([ids.as_slice(), &rest.tokens].concat(), whole.tokens);
            assert_eq!(format!("{text}{}", rest.text), whole.text);
            assert_eq!(rest.finished.reason, whole.finished.reason);
            assert_eq!(
                rest.finished.usage.unwrap().completion_tokens as usize,
                whole.tokens.len()
            );
        }
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_come_with_every_token() {
    let node = Node::start(50, config()).await;
    let params = SamplingParams {
        logprobs: Some(3),
        max_tokens: 9,
        ignore_eos: true,
        ..Default::default()
    };
    let answer = node.decode(node.request(&[5, 6, 7], &params)).await.unwrap();
    assert_eq!(answer.logprobs.len(), 9);
    for (token, logprob) in answer.tokens.iter().zip(&answer.logprobs) {
        assert_eq!(logprob.top.len(), 3);
        assert_eq!(logprob.top[0].token, *token, "greedy takes the most likely one");
        assert_eq!(logprob.top[0].text, model().tokenizer().token_bytes(*token));
        assert!(logprob.logprob <= 0.0);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_stalls_nobody() {
    let node = Node::start(200, config()).await;
    // So much text that no buffer on the way takes it all.
    let long = SamplingParams {
        max_tokens: 1000,
        ignore_eos: true,
        logprobs: Some(20),
        ..Default::default()
    };
    let unread = node.open(node.request(&[9; 20], &long)).await.unwrap();
    all_equal(&node, &cases(8, 8, 60, 30)).await;
    // It ends too, and holds nothing, while nobody has read a token of it.
    node.at_rest().await;
    // All of it is there when the client comes back.
    let answer = collect(unread).await.unwrap();
    assert_eq!(answer.tokens, expected(&[9; 20], &long));
    assert_eq!(answer.logprobs.len(), 1000);
    node.stop().await;
}

type Change = fn(&mut v1::DecodeRequest);

const BAD_REQUESTS: [(ErrorCode, Option<&str>, Change); 11] = [
    (ErrorCode::Conflict, None, |request| request.kv_root[0] ^= 1),
    (ErrorCode::Invalid, Some("kv_root"), |request| {
        request.kv_root.clear()
    }),
    (ErrorCode::Invalid, Some("request_id"), |request| {
        request.request_id = "x".into()
    }),
    (ErrorCode::Invalid, Some("prompt"), |request| {
        request.prompt.clear()
    }),
    (ErrorCode::Invalid, Some("prompt"), |request| {
        request.prompt = vec![5; 20 * BLOCK_TOKENS]
    }),
    (ErrorCode::Invalid, Some("prompt"), |request| {
        request.prompt.push(VOCABULARY as u32)
    }),
    (ErrorCode::Invalid, Some("resumed"), |request| {
        request.resumed.push(u32::MAX)
    }),
    (ErrorCode::Invalid, Some("resumed"), |request| {
        request.resumed = vec![5; 5]
    }),
    (ErrorCode::Invalid, Some("sources"), |request| {
        request.sources = vec![v1::PrefixSource::default(); 65]
    }),
    (ErrorCode::Invalid, Some("temperature"), |request| {
        request.sampling.as_mut().unwrap().temperature = Some(9.0);
    }),
    (ErrorCode::Invalid, Some("max_tokens"), |request| {
        request.sampling.as_mut().unwrap().max_tokens = Some(0);
    }),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_request_is_refused_and_named() {
    let node = Node::start(20, config()).await;
    let params = SamplingParams {
        max_tokens: 4,
        ..Default::default()
    };
    for (code, param, change) in BAD_REQUESTS {
        let mut request = node.request(&[5, 6, 7], &params);
        change(&mut request);
        let error = node.decode(request).await.unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (code, param), "{error}");
    }
    let answer = node.decode(node.request(&[5, 6, 7], &params)).await.unwrap();
    assert_eq!(answer.tokens, expected(&[5, 6, 7], &params));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_prompt_and_output_end_at_the_context() {
    let node = Node::start(5, config()).await;
    let context = 5 * BLOCK_TOKENS;
    for prompt_tokens in [1, context - 2, context - 1] {
        let prompt = Dice(9).tokens(prompt_tokens);
        let params = SamplingParams {
            ignore_eos: true,
            ..Default::default()
        };
        let answer = node.decode(node.request(&prompt, &params)).await.unwrap();
        assert_eq!(answer.tokens.len(), context - prompt_tokens);
        assert_eq!(answer.finished.reason, "length");
        node.at_rest().await;
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_there_are_places_are_refused_with_a_time() {
    let node = Node::start(
        200,
        Config {
            requests_max: 2,
            ..config()
        },
    )
    .await;
    let long = SamplingParams {
        max_tokens: 1500,
        ignore_eos: true,
        ..Default::default()
    };
    let running = [
        node.open(node.request(&[5; 9], &long)).await.unwrap(),
        node.open(node.request(&[6; 9], &long)).await.unwrap(),
    ];
    let error = node.decode(node.request(&[7; 9], &long)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.retry_after_ms.is_some_and(|ms| ms > 0));
    drop(running);
    node.at_rest().await;
    node.decode(node.request(
        &[7; 9],
        &SamplingParams {
            max_tokens: 1,
            ..long
        },
    ))
    .await
    .unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deadline_ends_a_request() {
    let node = Node::start(200, config()).await;
    // Nobody gives these blocks back in time, so the request can only wait.
    let outside = node.store.allocate(200).unwrap();
    let request = v1::DecodeRequest {
        deadline_ms: 50,
        ..node.request(&[5; 9], &SamplingParams::default())
    };
    let error = node.decode(request).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Timeout);
    drop(outside);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_finishes_what_runs_and_refuses_the_rest() {
    let node = Node::start(200, config()).await;
    let params = SamplingParams {
        max_tokens: 300,
        ignore_eos: true,
        ..Default::default()
    };
    let running = node.open(node.request(&[5; 9], &params)).await.unwrap();
    node.handle.drain();
    let error = node.decode(node.request(&[5; 9], &params)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(node::LoadSource::load(&node.handle).draining);
    assert_eq!(collect(running).await.unwrap().tokens, expected(&[5; 9], &params));
    node.handle.resume();
    assert!(!node::LoadSource::load(&node.handle).draining);
    let resumed = node.decode(node.request(&[5; 9], &params)).await.unwrap();
    assert_eq!(resumed.tokens, expected(&[5; 9], &params));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_outlast_the_drain_end_in_an_error() {
    let node = Node::start(
        200,
        Config {
            drain_timeout: Duration::from_millis(10),
            ..config()
        },
    )
    .await;
    let outside = node.store.allocate(200).unwrap();
    let waiting = node
        .open(node.request(&[5; 9], &SamplingParams::default()))
        .await
        .unwrap();
    node.shutdown.cancel();
    assert_eq!(collect(waiting).await.unwrap_err().code, ErrorCode::Unavailable);
    drop(outside);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_is_measured_while_the_node_works() {
    let node = Node::start(200, config()).await;
    all_equal(&node, &cases(10, 10, 100, 30)).await;
    let load = node::LoadSource::load(&node.handle);
    assert!(
        load.decode_step_ms > 0.0 && load.prefill_ms_per_token > 0.0,
        "{load:?}"
    );
    node.at_rest().await;
    // The engine's thread tells after the step that ended the last one.
    eventually("nothing runs", || {
        node::LoadSource::load(&node.handle).running_sequences == 0
    })
    .await;
    let load = node::LoadSource::load(&node.handle);
    assert_eq!(
        (
            load.queued_requests,
            load.queued_prefill_tokens,
            load.resident_tokens
        ),
        (0, 0, 0)
    );
    assert_eq!(load.free_blocks + load.evictable_blocks, 200);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_is_fetched_from_the_peer_that_the_router_names() {
    let (first, second) = (Node::start(100, config()).await, Node::start(100, config()).await);
    let prompt = Dice(11).tokens(50);
    let params = SamplingParams {
        max_tokens: 6,
        ..Default::default()
    };
    first.decode(first.request(&prompt, &params)).await.unwrap();
    let source = v1::PrefixSource {
        node_id: "decode-0".into(),
        grpc_endpoint: first.endpoint.clone(),
        blocks: 6,
    };
    let request = v1::DecodeRequest {
        sources: vec![source],
        ..second.request(&prompt, &params)
    };
    let answer = second.decode(request).await.unwrap();
    assert_eq!(answer.tokens, expected(&prompt, &params));
    assert_eq!(answer.cached_tokens(), 48);
    let block_bytes = second.store.layout().block_bytes() as u64;
    assert_eq!(answer.report().fetched_bytes, 6 * block_bytes);
    first.at_rest().await;
    second.stop().await;
    first.stop().await;
}
