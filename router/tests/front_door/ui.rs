//! The live page: what is served, and how soon it shows what happens.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::harness::{Fixture, MODEL, PATIENCE, Router, Step, config, greeting};

/// An open page.
struct Page(BufReader<TcpStream>);

impl Page {
    /// Opens the events. The status is that of the answer.
    async fn open(router: &Router) -> (u16, Self) {
        let mut stream = TcpStream::connect(router.http).await.expect("the router listens");
        let head = b"GET /ui/events HTTP/1.1\r\nhost: router\r\n\r\n";
        stream.write_all(head).await.expect("sent");
        let mut page = Self(BufReader::new(stream));
        let status = page.line().await;
        let status = status.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("a status"), page)
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_line(&mut line));
        read.await.expect("in time").expect("UTF-8");
        line
    }

    /// The next snapshot.
    async fn snapshot(&mut self) -> Value {
        loop {
            let line = self.line().await;
            assert!(!line.is_empty(), "the events have ended");
            if let Some(data) = line.strip_prefix("data: ") {
                return serde_json::from_str(data).expect("JSON");
            }
        }
    }

    /// Waits for the end of the stream.
    async fn ended(mut self) {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut rest));
        read.await.expect("in time").expect("ended well");
    }
}

fn body(prompt: &str, stream: bool) -> String {
    json!({ "model": MODEL, "prompt": prompt, "stream": stream, "ttft_slo_ms": 60_000 }).to_string()
}

#[tokio::test]
async fn the_page_may_load_nothing_from_elsewhere() {
    let fixture = Fixture::new();
    let router = Router::start(&fixture, config(), &[]).await;
    let page = router.get("/ui").await;
    assert_eq!(page.status, 200);
    let mut files = vec!["/ui".to_owned()];
    for (at, _) in page.body.match_indices("\"/ui/") {
        let (name, _) = page.body[at + 1..].split_once('"').expect("quotes close");
        files.push(name.to_owned());
    }
    assert!(files.len() >= 4, "{files:?}");
    files.push("/ui/draw.js".to_owned());
    for file in files {
        let answer = router.get(&file).await;
        assert_eq!(answer.status, 200, "{file}");
        let policy = &answer.headers["content-security-policy"];
        assert!(
            policy.starts_with("default-src 'none'") && !policy.contains("unsafe"),
            "{policy}"
        );
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
        // No address but the namespace of SVG, which is a name.
        let text = answer.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http://") && !text.contains("https://"), "{file}");
    }
    let without = router::Config {
        ui: false,
        ..config()
    };
    let router = Router::start(&fixture, without, &[]).await;
    for path in ["/ui", "/ui/events"] {
        assert_eq!(router.get(path).await.status, 404);
    }
}

#[tokio::test]
async fn a_request_shows_within_a_second_and_can_be_looked_at() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |request| match request.prompt.len() {
        // Too short for a block.
        1..8 => vec![Step::Tokens(vec![72], "H"), Step::Hang],
        _ => greeting(),
    });
    let router = Router::start(&fixture, config(), &[&decode]).await;
    let (status, mut page) = Page::open(&router).await;
    assert_eq!(status, 200);
    let first = page.snapshot().await;
    assert_eq!(
        (&first["model"], &first["router"]),
        (&json!(MODEL), &json!("router-0"))
    );
    assert_eq!(first["nodes"][0]["id"], "d0");
    assert_eq!(first["requests"], json!([]));

    let _runs = router.open("/v1/completions", &body("Hi", true)).await;
    let began = Instant::now();
    let shown = loop {
        let snapshot = page.snapshot().await;
        if snapshot["requests"][0]["state"] == "decoding" {
            break snapshot;
        }
    };
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(shown["running"], 1);
    assert_eq!(
        shown["links"][0],
        json!({
            "from": "", "to": "d0", "running": 1,
            "requests_per_s": shown["links"][0]["requests_per_s"], "bytes_per_s": 0.0,
        })
    );

    let prompt = "a prompt that is longer than one block of the model ".repeat(4);
    let answer = router.post("/v1/completions", body(&prompt, false)).await;
    let ended = loop {
        let snapshot = page.snapshot().await;
        if snapshot["requests"][1]["state"] == "finished" {
            break snapshot;
        }
    };
    let met: u64 = ended["steps"]["slo_met"]
        .as_array()
        .expect("steps")
        .iter()
        .map(|met| met.as_u64().expect("a count"))
        .sum();
    assert_eq!(met, 1);
    let prefix = &ended["prefixes"][0];
    assert_eq!((&prefix["requests"], &prefix["holders"]), (&json!(1), &json!([])));
    assert!(
        prefix["shared_tokens"].as_u64().expect("a count") >= 8,
        "{prefix}"
    );
    let one = router
        .get(&format!("/ui/requests/{}", answer.headers["x-request-id"]))
        .await
        .json();
    assert_eq!(
        (&one["state"], &one["slo_met"]),
        (&json!("finished"), &json!(true))
    );
    assert_eq!(one["parts"][0]["name"], "request");
    for unknown in ["7", &"7".repeat(32)] {
        assert_eq!(router.get(&format!("/ui/requests/{unknown}")).await.status, 404);
    }
}

#[tokio::test]
async fn pages_are_bounded_and_do_not_hold_up_the_end() {
    let fixture = Fixture::new();
    let router = Router::start(&fixture, config(), &[]).await;
    let mut pages = Vec::new();
    for _ in 0..16 {
        let (status, page) = Page::open(&router).await;
        assert_eq!(status, 200);
        pages.push(page);
    }
    let (status, _) = Page::open(&router).await;
    assert_eq!(status, 503);
    router.stop().await;
    for page in pages {
        page.ended().await;
    }
}
