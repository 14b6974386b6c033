use rstest::rstest;

use super::keys::{KeyRole, digest, line};
use super::*;

const NOW: u64 = 1_795_760_684;

fn keys() -> Keys {
    let lines = [
        line(&digest("client"), "a", KeyRole::Client, None),
        line(&digest("old"), "a", KeyRole::Client, Some("2020-01-01")),
        line(&digest("admin"), "", KeyRole::Admin, None),
    ];
    Keys::parse(&lines.join("\n")).expect("valid")
}

fn policy(keys_on: bool, tls: bool, certificates_required: bool) -> Policy {
    Policy {
        keys: keys_on.then(keys),
        tls,
        certificates_required,
    }
}

fn shown(key: Option<&str>, member: bool) -> Shown<'_> {
    Shown { key, member }
}

#[test]
fn a_call_that_nobody_thought_of_needs_an_administrator() {
    for (path, expected) in [
        ("/grpc.health.v1.Health/Check", Need::Nothing),
        (
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            Need::Nothing,
        ),
        ("/perigee.v1.Inference/Generate", Need::Client),
        ("/perigee.v1.Inference/ListModels", Need::Client),
        ("/perigee.v1.Inference/ClusterStatus", Need::Admin),
        ("/perigee.v1.Inference/GenerateMore", Need::Admin),
        ("/perigee.v1.Node/Drain", Need::Admin),
        ("/perigee.v1.Node/Info", Need::Admin),
        ("/perigee.v1.Routing/Explain", Need::Admin),
        ("/perigee.v9.Unknown/Call", Need::Admin),
        ("/", Need::Admin),
        ("", Need::Admin),
    ] {
        assert_eq!(need(path), expected, "{path}");
    }
}

#[test]
fn every_service_of_ours_is_closed_but_for_the_calls_of_clients() {
    // The services of nodes are served by no router; were they, they would be an administrator's.
    for service in [
        "Cache", "Decode", "KvStore", "Node", "Prefill", "Registry", "Routing", "Transfer",
    ] {
        assert_eq!(need(&format!("/perigee.v1.{service}/Any")), Need::Admin);
    }
}

#[rstest]
// Without keys and without TLS nobody is asked for anything.
#[case(
    policy(false, false, false),
    Need::Client,
    shown(None, false),
    Ok(Caller::Anyone)
)]
#[case(
    policy(false, false, false),
    Need::Admin,
    shown(Some("any"), false),
    Ok(Caller::Anyone)
)]
// With TLS alone members are administrators, and anyone is a client.
#[case(
    policy(false, true, false),
    Need::Client,
    shown(None, false),
    Ok(Caller::Anyone)
)]
#[case(
    policy(false, true, false),
    Need::Client,
    shown(Some("any"), false),
    Ok(Caller::Anyone)
)]
#[case(
    policy(false, true, false),
    Need::Admin,
    shown(None, false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(policy(false, true, false), Need::Admin, shown(None, true), Ok(Caller::Admin))]
// With keys, a key decides.
#[case(
    policy(true, false, false),
    Need::Client,
    shown(None, false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(
    policy(true, false, false),
    Need::Client,
    shown(Some("wrong"), false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(
    policy(true, false, false),
    Need::Client,
    shown(Some("old"), false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(policy(true, false, false), Need::Client, shown(Some("client"), false), Ok(Caller::Tenant("a".to_owned())))]
#[case(
    policy(true, false, false),
    Need::Client,
    shown(Some("admin"), false),
    Ok(Caller::Admin)
)]
#[case(
    policy(true, false, false),
    Need::Admin,
    shown(None, false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(
    policy(true, false, false),
    Need::Admin,
    shown(Some("client"), false),
    Err(ErrorCode::Denied)
)]
#[case(
    policy(true, false, false),
    Need::Admin,
    shown(Some("admin"), false),
    Ok(Caller::Admin)
)]
// A member needs no key, but one that it shows counts.
#[case(policy(true, true, false), Need::Client, shown(None, true), Ok(Caller::Admin))]
#[case(policy(true, true, false), Need::Client, shown(Some("client"), true), Ok(Caller::Tenant("a".to_owned())))]
#[case(
    policy(true, true, false),
    Need::Admin,
    shown(Some("client"), true),
    Err(ErrorCode::Denied)
)]
#[case(
    policy(true, true, false),
    Need::Client,
    shown(Some("wrong"), true),
    Err(ErrorCode::Unauthenticated)
)]
// Where certificates are required, a key alone is not enough.
#[case(
    policy(true, true, true),
    Need::Client,
    shown(Some("client"), false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(
    policy(false, true, true),
    Need::Client,
    shown(None, false),
    Err(ErrorCode::Unauthenticated)
)]
#[case(policy(false, true, true), Need::Client, shown(None, true), Ok(Caller::Admin))]
// Health needs nothing in any case.
#[case(
    policy(true, true, true),
    Need::Nothing,
    shown(None, false),
    Ok(Caller::Anyone)
)]
fn who_calls_is_told_by_what_is_shown(
    #[case] policy: Policy,
    #[case] need: Need,
    #[case] shown: Shown<'_>,
    #[case] expected: Result<Caller, ErrorCode>,
) {
    let admitted = policy.admit(need, shown, NOW);
    let admitted = admitted.map_err(|error| {
        for secret in ["wrong", "old", "client", "admin"] {
            let key = shown.key == Some(secret) && secret == "wrong";
            assert!(!key || !error.message.contains(secret), "{error}");
        }
        error.code
    });
    assert_eq!(admitted, expected);
}

#[test]
fn a_key_ends_at_its_very_second() {
    let keys = Keys::parse(&line(
        &digest("k"),
        "a",
        KeyRole::Client,
        Some("2026-11-27T06:24:44Z"),
    ));
    let policy = Policy {
        keys: Some(keys.expect("valid")),
        ..Policy::default()
    };
    let admit = |now| policy.admit(Need::Client, shown(Some("k"), false), now);
    assert!(admit(NOW - 1).is_ok());
    assert_eq!(admit(NOW).expect_err("over").message, "the API key has expired");
}

#[test]
fn a_request_is_of_the_tenant_of_its_key() {
    let tenant = Caller::Tenant("a".to_owned());
    assert_eq!(tenant.tenant(String::new()).expect("its own"), "a");
    assert_eq!(tenant.tenant("a".to_owned()).expect("its own"), "a");
    let error = tenant.tenant("b".to_owned()).expect_err("another's");
    assert_eq!(
        (error.code, error.param.as_deref()),
        (ErrorCode::Denied, Some("tenant"))
    );
    for free in [Caller::Admin, Caller::Anyone] {
        assert_eq!(free.tenant("b".to_owned()).expect("any"), "b");
    }
}
