use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn sampling_round_trips(
        temperature in 0f32..2.0,
        top_k in any::<u32>(),
        seed in any::<u64>(),
        max_tokens in any::<u32>(),
        bias in prop::collection::btree_map(any::<u32>(), -100f32..100.0, 0..4),
        stop in prop::collection::vec("[a-z]{1,4}", 0..3),
        logprobs in prop::option::of(0u8..20),
    ) {
        let params = SamplingParams {
            temperature, top_k, seed, max_tokens, logit_bias: bias, stop, logprobs,
            ..SamplingParams::default()
        };
        prop_assert_eq!(sampling(Some(sampling_to_wire(&params))), Ok(params));
    }

    #[test]
    fn log_events_round_trip(bytes in any::<[u8; 16]>(), parent in any::<[u8; 16]>()) {
        let (hash, parent) = (BlockHash(bytes), BlockHash(parent));
        for tier in [Tier::Device, Tier::Host, Tier::Disk] {
            for wanted in [
                BlockEvent::Stored { hash, parent, tier },
                BlockEvent::Moved { hash, tier },
                BlockEvent::Removed { hash },
            ] {
                prop_assert_eq!(event(&event_to_wire(&wanted)), Ok(wanted));
            }
        }
    }
}

#[test]
fn max_tokens_beyond_any_context_is_capped_by_the_context_later() {
    let wire = v1::Sampling {
        max_tokens: Some(1 << 63),
        ..v1::Sampling::default()
    };
    assert_eq!(sampling(Some(wire)).expect("accepted").max_tokens, u32::MAX);
}

#[test]
fn a_hash_of_the_wrong_length_is_named() {
    let error = hash("kv_root", &[0; 15]).expect_err("must be refused");
    assert_eq!(error.param.as_deref(), Some("kv_root"));
}

#[test]
fn facts_of_a_newer_or_older_node_can_be_read() {
    let facts = HostFacts {
        boot_id: "9a11".into(),
        memlock_bytes: Some(65_536),
        ..HostFacts::default()
    };
    assert_eq!(host(&host_to_json(&facts)).unwrap(), facts);
    let other = host(r#"{"boot_id": "9a11", "memlock_bytes": 65536, "moons": 2}"#);
    assert_eq!(other.unwrap(), facts);
    assert_eq!(host("no JSON").unwrap_err().code, ErrorCode::Invalid);
}
