//! Keys at the two front doors.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use node::{ApiKey, Connector};
use proto::v1;
use proto::v1::inference_client::InferenceClient;
use proto::v1::routing_client::RoutingClient;
use router::access::keys::{KeyRole, digest, line};
use serde_json::json;
use tonic::Code;

use crate::harness::{FakeNode, Fixture, PATIENCE, Router, config, greeting};

fn write(file: &Path, lines: &[(&str, &str, KeyRole)]) {
    let lines = lines
        .iter()
        .map(|(key, tenant, role)| line(&digest(key), tenant, *role, None));
    let next = file.with_extension("next");
    fs::write(&next, lines.collect::<Vec<_>>().join("\n")).expect("written");
    fs::rename(next, file).expect("renamed");
}

struct Guarded {
    router: Router,
    node: FakeNode,
    _fixture: Fixture,
    folder: tempfile::TempDir,
}

async fn guarded() -> Guarded {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    write(
        &file,
        &[("of-a", "a", KeyRole::Client), ("of-admin", "", KeyRole::Admin)],
    );
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |_| greeting());
    let config = router::Config {
        api_keys_file: file.display().to_string(),
        ..config()
    };
    let router = Router::start(&fixture, config, &[&node]).await;
    Guarded {
        router,
        node,
        _fixture: fixture,
        folder,
    }
}

impl Guarded {
    async fn chat(&self, headers: &[(&str, &str)]) -> crate::harness::HttpResponse {
        let body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello" }] });
        let path = "/v1/chat/completions";
        self.router
            .send("POST", path, headers, body.to_string().as_bytes())
            .await
    }

    fn channel(&self, key: Option<&str>) -> node::Channel {
        let connector = match key {
            Some(key) => Connector::default().with_key(&ApiKey::new(key).expect("a key")),
            None => Connector::default(),
        };
        connector
            .channel(&self.router.grpc.to_string())
            .expect("an address")
    }

    fn tenants(&self) -> Vec<String> {
        let requests = self.node.requests();
        requests.into_iter().map(|request| request.tenant).collect()
    }
}

#[tokio::test]
async fn without_a_key_http_answers_as_openai_does() {
    let guarded = guarded().await;
    for (path, headers, message) in [
        ("/v1/models", &[][..], "no API key was given"),
        (
            "/v1/models/tiny",
            &[("authorization", "Bearer sk-wrong")][..],
            "the API key is not known",
        ),
        (
            "/v1/models",
            &[("authorization", "Basic b2YtYTo=")][..],
            "no API key was given",
        ),
        ("/v1/else", &[][..], "no API key was given"),
    ] {
        let response = guarded.router.send("GET", path, headers, b"").await;
        assert_eq!(response.status, 401, "{}", response.body);
        assert_eq!(response.headers["www-authenticate"], "Bearer");
        let error = &response.json()["error"];
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["code"], "invalid_api_key");
        let said = error["message"].as_str().expect("text");
        assert!(said.contains(message) && !said.contains("sk-wrong"), "{said}");
    }
    for path in ["/livez", "/metrics"] {
        assert_eq!(guarded.router.get(path).await.status, 200, "{path}");
    }
    let metrics = guarded.router.get("/metrics").await.body;
    assert!(metrics.contains("unauthenticated"), "{metrics}");
    assert!(guarded.tenants().is_empty());
}

#[tokio::test]
async fn the_live_page_is_an_administrators_and_a_browser_asks_for_the_key() {
    let guarded = guarded().await;
    // "anyone:of-admin" and "anyone:of-a".
    let (admin, client) = ("Basic YW55b25lOm9mLWFkbWlu", "Basic YW55b25lOm9mLWE=");
    for path in ["/ui", "/ui/events", "/ui/requests/0"] {
        let asked = guarded.router.get(path).await;
        assert_eq!(asked.status, 401, "{path}: {}", asked.body);
        let scheme = &asked.headers["www-authenticate"];
        assert!(scheme.starts_with("Basic realm="), "{scheme}");
        let denied = guarded
            .router
            .send("GET", path, &[("authorization", client)], b"")
            .await;
        assert_eq!(denied.status, 403, "{path}: {}", denied.body);
    }
    for key in [admin, "Bearer of-admin"] {
        let page = guarded
            .router
            .send("GET", "/ui", &[("authorization", key)], b"")
            .await;
        assert_eq!(page.status, 200, "{}", page.body);
    }
}

#[tokio::test]
async fn a_request_over_http_is_of_the_tenant_of_its_key() {
    let guarded = guarded().await;
    let bearer = ("authorization", "bearer of-a");
    assert_eq!(guarded.chat(&[bearer]).await.status, 200);
    assert_eq!(
        guarded.chat(&[bearer, ("x-perigee-tenant", "a")]).await.status,
        200
    );
    let denied = guarded.chat(&[bearer, ("x-perigee-tenant", "b")]).await;
    assert_eq!(denied.status, 403, "{}", denied.body);
    assert_eq!(denied.json()["error"]["type"], "permission_error");
    assert_eq!(denied.json()["error"]["param"], "tenant");
    let admin = [("authorization", "Bearer of-admin"), ("x-perigee-tenant", "b")];
    assert_eq!(guarded.chat(&admin).await.status, 200);
    assert_eq!(guarded.tenants(), ["a", "a", "b"]);
}

#[tokio::test]
async fn grpc_asks_each_call_for_what_it_needs() {
    let guarded = guarded().await;
    let generate = |key: Option<&str>, tenant: &str| {
        let mut client = InferenceClient::new(guarded.channel(key));
        let request = v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Prompt("hello".into())),
            tenant: tenant.to_owned(),
            ..v1::GenerateRequest::default()
        };
        async move {
            let answer = client.generate(request).await;
            answer.map(|_| ()).map_err(|status| status.code())
        }
    };
    assert_eq!(generate(None, "").await, Err(Code::Unauthenticated));
    assert_eq!(generate(Some("wrong"), "").await, Err(Code::Unauthenticated));
    assert_eq!(generate(Some("of-a"), "b").await, Err(Code::PermissionDenied));
    assert_eq!(generate(Some("of-a"), "").await, Ok(()));
    assert_eq!(generate(Some("of-admin"), "b").await, Ok(()));
    assert_eq!(guarded.tenants(), ["a", "b"]);

    for (key, expected) in [
        (None, Some(Code::Unauthenticated)),
        (Some("of-a"), Some(Code::PermissionDenied)),
        (Some("of-admin"), None),
    ] {
        let mut inference = InferenceClient::new(guarded.channel(key));
        let status = inference.cluster_status(v1::ClusterStatusRequest {}).await;
        assert_eq!(status.err().map(|status| status.code()), expected, "{key:?}");
        let mut routing = RoutingClient::new(guarded.channel(key));
        let decisions = routing.list_decisions(v1::ListDecisionsRequest::default()).await;
        assert_eq!(decisions.err().map(|status| status.code()), expected, "{key:?}");
    }
    let mut health = tonic_health::pb::health_client::HealthClient::new(guarded.channel(None));
    let asked = tonic_health::pb::HealthCheckRequest::default();
    health.check(asked).await.expect("health needs no key");
}

#[tokio::test]
async fn keys_come_and_go_with_their_file() {
    let guarded = guarded().await;
    let file = guarded.folder.path().join("keys.toml");
    let status = async |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("authorization", bearer.as_str())];
        guarded
            .router
            .send("GET", "/v1/models", &headers, b"")
            .await
            .status
    };
    assert_eq!((status("of-a").await, status("of-b").await), (200, 401));
    write(&file, &[("of-b", "b", KeyRole::Client)]);
    let start = Instant::now();
    while (status("of-a").await, status("of-b").await) != (401, 200) {
        assert!(start.elapsed() < PATIENCE, "the new keys do not count");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
