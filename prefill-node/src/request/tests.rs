use rstest::rstest;
use types::KvDtype;

use super::*;

const ACCEPTS: Accepts = Accepts {
    kv_root: BlockHash([7; 16]),
    epoch: Epoch(3),
    vocabulary: 100,
    context_tokens_max: 64,
    capacity_blocks: 5,
    layout: KvLayout {
        layers: 1,
        kv_heads: 1,
        head_dim: 8,
        block_tokens: 8,
        dtype: KvDtype::F16,
    },
    timeout_max: Duration::from_secs(60),
};

fn start() -> v1::PrefillStart {
    v1::PrefillStart {
        request_id: RequestId(5).to_string(),
        kv_root: vec![7; 16],
        tokens: vec![1; 20],
        prompt_tokens: 18,
        held_blocks: 2,
        sampling: None,
        sources: Vec::new(),
        deadline_ms: 1000,
        prefill_epoch: 3,
        tenant: String::new(),
    }
}

#[test]
fn a_good_request_is_read_as_it_is() {
    let prompt = ACCEPTS.prompt(start()).expect("good");
    assert_eq!(prompt.tokens.len(), 20);
    assert_eq!((prompt.prompt_tokens, prompt.held_blocks), (18, 2));
    assert_eq!(prompt.blocks(&ACCEPTS.layout), 3);
    assert_eq!(prompt.timeout, Duration::from_secs(1));
}

#[rstest]
#[case::other_model(v1::PrefillStart { kv_root: vec![8; 16], ..start() }, ErrorCode::Conflict)]
#[case::no_hash(v1::PrefillStart { kv_root: vec![7; 15], ..start() }, ErrorCode::Invalid)]
#[case::restarted(v1::PrefillStart { prefill_epoch: 2, ..start() }, ErrorCode::Fenced)]
#[case::no_time_left(v1::PrefillStart { deadline_ms: 0, ..start() }, ErrorCode::Timeout)]
#[case::empty(v1::PrefillStart { tokens: Vec::new(), ..start() }, ErrorCode::Invalid)]
#[case::unknown_token(v1::PrefillStart { tokens: vec![100; 20], ..start() }, ErrorCode::Invalid)]
#[case::longer_than_the_pool(v1::PrefillStart { tokens: vec![1; 41], ..start() }, ErrorCode::Invalid)]
#[case::no_prompt(v1::PrefillStart { prompt_tokens: 0, ..start() }, ErrorCode::Invalid)]
#[case::prompt_beyond_tokens(v1::PrefillStart { prompt_tokens: 21, ..start() }, ErrorCode::Invalid)]
#[case::holds_a_partial_block(v1::PrefillStart { held_blocks: 3, ..start() }, ErrorCode::Invalid)]
#[case::holds_everything(v1::PrefillStart { held_blocks: u64::MAX, ..start() }, ErrorCode::Invalid)]
#[case::no_request_id(v1::PrefillStart { request_id: "x".into(), ..start() }, ErrorCode::Invalid)]
#[case::long_tenant(v1::PrefillStart { tenant: "x".repeat(257), ..start() }, ErrorCode::Invalid)]
#[case::hot(
    v1::PrefillStart { sampling: Some(v1::Sampling { temperature: Some(9.0), ..Default::default() }), ..start() },
    ErrorCode::Invalid
)]
fn a_bad_request_is_a_typed_error(#[case] start: v1::PrefillStart, #[case] code: ErrorCode) {
    let error = ACCEPTS.prompt(start).expect_err("must be refused");
    assert_eq!(error.code, code, "{error}");
}

#[test]
fn time_and_sources_are_bounded() {
    let source = v1::PrefixSource {
        node_id: "peer".into(),
        grpc_endpoint: "127.0.0.1:1".into(),
        blocks: u64::MAX,
    };
    let prompt = ACCEPTS
        .prompt(v1::PrefillStart {
            deadline_ms: u64::MAX,
            sources: vec![source; 20],
            ..start()
        })
        .expect("good");
    assert_eq!(prompt.timeout, ACCEPTS.timeout_max);
    assert_eq!(prompt.sources.len(), SOURCES_MAX);
}
