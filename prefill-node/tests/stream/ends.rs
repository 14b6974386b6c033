//! How a request ends that does not land: typed, in time, and without a trace.

use std::time::Duration;

use prefill_node::Config;
use proto::v1;
use proto::v1::prefill_command::Command;
use proto::v1::prefill_event::Event;
use rstest::rstest;
use transfer::Transport as _;
use types::ErrorCode;

use crate::harness::*;

fn config() -> Config {
    Config {
        step_tokens: 16,
        ..Config::default()
    }
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    Started,
    /// Memory was offered, and writes have reached this many of its blocks.
    Pushing(usize),
}

/// Opens a request, lets it come to `stage`, and returns it with what was granted.
async fn at_stage(decode: &DecodeSide, seed: u32, stage: Stage) -> (Conversation, Option<kv_store::Grant>) {
    let mut conversation = decode.open(decode.request(&prompt(seed, 900))).await;
    let blocks = conversation.started().await.expect("started");
    match stage {
        Stage::Started => (conversation, None),
        Stage::Pushing(reached) => {
            let grant = decode.grant(blocks);
            conversation.offer(3, &grant).await;
            eventually("writes arrive", || decode.blocks_reached(&grant) >= reached).await;
            (conversation, Some(grant))
        }
    }
}

fn bytes_granted(decode: &DecodeSide, grant: &kv_store::Grant) -> Vec<Vec<u8>> {
    grant
        .blocks()
        .iter()
        .map(|block| bytes_of(&decode.store, *block))
        .collect()
}

#[rstest]
#[case::before_the_offer(Stage::Started)]
#[case::with_the_offer(Stage::Pushing(0))]
#[case::at_the_first_write(Stage::Pushing(1))]
#[case::early(Stage::Pushing(20))]
#[case::late(Stage::Pushing(100))]
#[case::at_the_last_block(Stage::Pushing(113))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_abort_no_byte_changes_and_nothing_is_held(#[case] stage: Stage) {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 300, config()).await;
    let decode = DecodeSide::start(&model, 400, &node).await;
    let (mut conversation, grant) = at_stage(&decode, 1, stage).await;
    conversation.abort().await;
    let last = conversation.last().await;
    match (&last, stage) {
        (Event::Quiesced(_), _) | (Event::Landed(_), Stage::Pushing(_)) => {}
        (other, _) => panic!("{other:?} after an abort"),
    }
    let before = grant.as_ref().map(|grant| bytes_granted(&decode, grant));
    // Whatever was on its way to this peer would land before what comes after it.
    decode
        .receive(decode.request(&prompt(2, 300)))
        .await
        .expect("the node serves on");
    node.idle().await;
    assert!(
        before == grant.as_ref().map(|grant| bytes_granted(&decode, grant)),
        "written after the end"
    );
}

#[rstest]
#[case::before_the_offer(Stage::Started)]
#[case::with_the_offer(Stage::Pushing(0))]
#[case::in_the_middle(Stage::Pushing(20))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_vanishes_leaves_nothing_behind(#[case] stage: Stage) {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 300, config()).await;
    let decode = DecodeSide::start(&model, 400, &node).await;
    let (conversation, grant) = at_stage(&decode, 1, stage).await;
    drop(conversation);
    node.idle().await;
    drop(grant);
    decode
        .receive(decode.request(&prompt(2, 30)))
        .await
        .expect("the node serves on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_while_waiting_for_memory_is_answered() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 20, config()).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let mut first = decode.open(decode.request(&prompt(1, 100))).await;
    let blocks = first.started().await.expect("started");
    let mut second = decode.open(decode.request(&prompt(2, 100))).await;
    let queued = second.event().await.expect("goes on").expect("no error");
    assert!(matches!(queued, Event::Queued(_)), "{queued:?}");
    second.abort().await;
    assert!(matches!(second.last().await, Event::Quiesced(_)));
    let grant = decode.grant(blocks);
    first.offer(1, &grant).await;
    first.landed().await.expect("the first one is not disturbed");
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_waits_too_long_for_memory_times_out() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 20, config()).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let mut first = decode.open(decode.request(&prompt(1, 100))).await;
    first.started().await.expect("started");
    let start = v1::PrefillStart {
        deadline_ms: 30,
        ..decode.request(&prompt(2, 100))
    };
    let error = decode.open(start).await.failed().await;
    assert_eq!(error.code, ErrorCode::Timeout, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_offers_nothing_times_out() {
    let model = tiny_model();
    let config = Config {
        offer_timeout: Duration::from_millis(30),
        ..config()
    };
    let node = PrefillNode::start(&model, 50, config).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let error = decode.open(decode.request(&prompt(1, 100))).await.failed().await;
    assert_eq!(error.code, ErrorCode::Timeout, "{error}");
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_whose_memory_is_gone_fails_the_request() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 300, config()).await;
    let decode = DecodeSide::start(&model, 300, &node).await;
    let mut conversation = decode.open(decode.request(&prompt(1, 900))).await;
    let blocks = conversation.started().await.expect("started");
    let grant = decode.grant(blocks);
    decode.transport.close().await;
    conversation.offer(1, &grant).await;
    let error = conversation.failed().await;
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_ends_the_writes_of_a_request_that_was_not_aborted() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 300, config()).await;
    let decode = DecodeSide::start(&model, 400, &node).await;
    let (mut conversation, grant) = at_stage(&decode, 1, Stage::Pushing(5)).await;
    let grant = grant.expect("granted");
    decode.transport.revoke(grant.region()).await;
    let before = bytes_granted(&decode, &grant);
    match conversation.last().await {
        Event::Failure(_) | Event::Landed(_) => {}
        other => panic!("{other:?} after a fence"),
    }
    node.idle().await;
    assert!(
        before == bytes_granted(&decode, &grant),
        "written behind the fence"
    );
}

#[rstest]
#[case::other_space(v1::PrefillStart { kv_root: vec![1; 16], ..Default::default() }, ErrorCode::Conflict)]
#[case::restarted(v1::PrefillStart { prefill_epoch: EPOCH.0 - 1, ..Default::default() }, ErrorCode::Fenced)]
#[case::unknown_token(v1::PrefillStart { tokens: vec![1, 999_999], ..Default::default() }, ErrorCode::Invalid)]
#[case::longer_than_the_pool(v1::PrefillStart { tokens: vec![1; 500], ..Default::default() }, ErrorCode::Invalid)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_cannot_be_served_is_a_typed_error(
    #[case] change: v1::PrefillStart,
    #[case] code: ErrorCode,
) {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 20, config()).await;
    let decode = DecodeSide::start(&model, 20, &node).await;
    let mut start = decode.request(&prompt(1, 30));
    if !change.kv_root.is_empty() {
        start.kv_root = change.kv_root;
    }
    if change.prefill_epoch != 0 {
        start.prefill_epoch = change.prefill_epoch;
    }
    if !change.tokens.is_empty() {
        start.prompt_tokens = change.tokens.len() as u64;
        start.tokens = change.tokens;
    }
    let error = decode.open(start).await.failed().await;
    assert_eq!(error.code, code, "{error}");
    decode
        .receive(decode.request(&prompt(1, 30)))
        .await
        .expect("the node serves on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_breaks_the_protocol_is_told() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 50, config()).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let request = || decode.request(&prompt(1, 60));

    let mut twice = decode.open(request()).await;
    twice.send(Command::Start(request())).await;
    assert_eq!(twice.failed().await.code, ErrorCode::Invalid);

    let mut small = decode.open(request()).await;
    let blocks = small.started().await.expect("started");
    small.offer(1, &decode.grant(blocks - 1)).await;
    assert_eq!(small.failed().await.param.as_deref(), Some("offer"));

    let mut nowhere = decode.open(request()).await;
    nowhere.started().await.expect("started");
    let block_offsets = vec![0; blocks as usize];
    nowhere
        .send(Command::Offer(v1::PrefillOffer {
            transfer_id: 1,
            region: None,
            block_offsets,
        }))
        .await;
    assert_eq!(nowhere.failed().await.param.as_deref(), Some("offer"));

    let mut empty = decode.open(request()).await;
    let _ = empty.commands.send(v1::PrefillCommand { command: None }).await;
    assert_eq!(empty.failed().await.code, ErrorCode::Invalid);
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_may_close_its_side_after_the_offer_and_not_before() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 50, config()).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let mut early = decode.open(decode.request(&prompt(1, 60))).await;
    early.started().await.expect("started");
    drop(early.commands);
    let ended = in_time(early.events.message()).await.expect("no broken stream");
    assert!(
        ended.is_none(),
        "{ended:?} for a peer that can offer nothing any more"
    );

    let mut late = decode.open(decode.request(&prompt(2, 60))).await;
    let grant = decode.grant(late.started().await.expect("started"));
    late.offer(1, &grant).await;
    let Conversation { commands, events } = late;
    drop(commands);
    let mut late = Conversation {
        commands: tokio::sync::mpsc::channel(1).0,
        events,
    };
    late.landed().await.expect("landed");
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_back() {
    let model = tiny_model();
    let config = Config {
        queue_requests_max: 1,
        ..config()
    };
    let node = PrefillNode::start(&model, 20, config).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    // The first one keeps its blocks until it is offered memory, so the second one stays in the queue.
    let mut first = decode.open(decode.request(&prompt(1, 100))).await;
    first.started().await.expect("started");
    eventually("the first one is computed", || {
        use node::LoadSource as _;
        node.handle.load().queued_requests == 0
    })
    .await;
    let mut second = decode.open(decode.request(&prompt(2, 100))).await;
    assert!(matches!(second.event().await, Some(Ok(Event::Queued(_)))));
    let error = decode.open(decode.request(&prompt(3, 100))).await.failed().await;
    assert_eq!(error.code, ErrorCode::Overloaded, "{error}");
    assert!(error.retry_after_ms.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_what_runs_and_refuses_the_rest() {
    let model = tiny_model();
    let node = PrefillNode::start(&model, 50, config()).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let mut running = decode.open(decode.request(&prompt(1, 100))).await;
    let blocks = running.started().await.expect("started");
    node.shutdown.cancel();
    eventually("the node drains", || {
        use node::LoadSource as _;
        node.handle.load().draining
    })
    .await;
    // Whoever resumes it comes too late.
    node.handle.resume();
    let channel = node::channel(&node.grpc_endpoint).expect("an endpoint");
    let mut client = v1::prefill_client::PrefillClient::new(channel);
    let refused = client.prefill(tokio_stream::empty()).await.expect_err("refused");
    assert_eq!(proto::status::from_status(&refused).code, ErrorCode::Unavailable);
    let grant = decode.grant(blocks);
    running.offer(1, &grant).await;
    running.landed().await.expect("what ran has finished");
    in_time(node.running)
        .await
        .expect("no panic")
        .expect("an orderly end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_stops_what_does_not_finish() {
    let model = tiny_model();
    let config = Config {
        drain_timeout: Duration::from_millis(20),
        ..config()
    };
    let node = PrefillNode::start(&model, 50, config).await;
    let decode = DecodeSide::start(&model, 50, &node).await;
    let mut stuck = decode.open(decode.request(&prompt(1, 100))).await;
    stuck.started().await.expect("started");
    node.shutdown.cancel();
    let error = stuck.failed().await;
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    in_time(node.running)
        .await
        .expect("no panic")
        .expect("an orderly end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_waits_says_that_it_lives_and_never_crowds_its_own_end_out() {
    let model = tiny_model();
    let settings = Config {
        heartbeat_interval: Duration::from_millis(5),
        ..config()
    };
    let node = PrefillNode::start(&model, 100, settings).await;
    let decode = DecodeSide::start(&model, 100, &node).await;
    let mut conversation = decode.open(decode.request(&prompt(7, 100))).await;
    let first = conversation.event().await.expect("an event").expect("no failure");
    assert!(matches!(first, Event::Queued(queued) if queued.heartbeat_ms == 5));
    let blocks = conversation.started().await.expect("started");
    // It waits for the offer, and so has nothing else to say.
    for _ in 0..20 {
        let alive = conversation.event().await.expect("an event").expect("no failure");
        assert!(matches!(alive, Event::Alive(_)), "{alive:?}");
    }
    let grant = decode.grant(blocks);
    conversation.offer(7, &grant).await;
    // Nobody reads for many heartbeats, and then everything that counts is there.
    eventually("it has landed", || node.store.stats().blocks.owned == 0).await;
    conversation.landed().await.expect("landed");
    grant.fence().await;
    node.idle().await;
}
