//! Load for an OpenAI server, over HTTP connections that are kept: completions of short prompts.
//!
//! `front_door_load ADDRESS CONNECTIONS SECONDS STREAM [RATE]` asks on every connection again and again, or, with a rate, so many times a
//! second, whatever the answers take. It prints a line of JSON: requests in all, those per second, and percentiles of the time from sending a
//! request to its last byte. One thread.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Different prompts, of which each shares its first half with others.
const PROMPTS: usize = 256;
const FAMILIES: usize = 8;
/// Words of a prompt.
const LENGTH: usize = 24;
const WORDS: [&str; 32] = [
    "the", "river", "where", "people", "of", "a", "small", "town", "meet", "every", "morning", "and", "talk",
    "about", "weather", "while", "boats", "go", "by", "with", "what", "they", "carry", "from", "one", "bank",
    "to", "another", "until", "night", "comes", "again",
];
/// Nothing is counted before.
const WARM_UP: Duration = Duration::from_millis(500);

#[derive(Clone)]
struct Load {
    address: String,
    connections: usize,
    /// When counting starts and ends.
    from: Instant,
    until: Instant,
    /// Between two requests of one connection.
    interval: Option<Duration>,
    requests: std::sync::Arc<Vec<Vec<u8>>>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, connections, seconds, stream, rate @ ..] = arguments.as_slice() else {
        panic!("usage: front_door_load ADDRESS CONNECTIONS SECONDS STREAM [RATE]");
    };
    let number = |text: &String| text.parse::<f64>().expect("a number");
    let connections = number(connections) as usize;
    let from = Instant::now() + WARM_UP;
    let load = Load {
        address: address.clone(),
        connections,
        from,
        until: from + Duration::from_secs_f64(number(seconds)),
        interval: rate
            .first()
            .map(|rate| Duration::from_secs_f64(connections as f64 / number(rate))),
        requests: std::sync::Arc::new((0..PROMPTS).map(|n| request(n, stream == "true")).collect()),
    };
    let running: Vec<_> = (0..connections)
        .map(|number| tokio::spawn(drive(load.clone(), number)))
        .collect();
    let (mut took, mut asked) = (Vec::new(), 0);
    for connection in running {
        let (counted, all) = connection.await.expect("every answer was a good one");
        took.extend(counted);
        asked += all;
    }
    took.sort_unstable();
    let rank = |share: usize| took[(took.len() - 1) * share / 100].as_secs_f64() * 1e6;
    let per_second = took.len() as f64 / number(seconds);
    let figures = json!({
        "requests": asked, "requests_per_second": per_second, "p50_us": rank(50), "p99_us": rank(99),
    });
    println!("{figures}");
}

fn request(number: usize, stream: bool) -> Vec<u8> {
    let word = |at: usize| match at < LENGTH / 2 {
        true => WORDS[(number % FAMILIES * 7 + at * 3) % WORDS.len()],
        false => WORDS[(number * 11 + at * (5 + number % 3)) % WORDS.len()],
    };
    let prompt = (0..LENGTH).map(word).collect::<Vec<_>>().join(" ");
    let body =
        json!({ "model": "tiny", "prompt": prompt, "max_tokens": 8, "stream": stream, "temperature": 0 });
    let body = body.to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n";
    format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// One connection. How long those answers took that were asked for while it counted, and how many there were in all.
async fn drive(load: Load, number: usize) -> (Vec<Duration>, usize) {
    let mut stream = TcpStream::connect(&load.address)
        .await
        .expect("something listens");
    stream.set_nodelay(true).expect("TCP");
    let mut next = Instant::now();
    if let Some(interval) = load.interval {
        next += interval.mul_f64(number as f64 / load.connections as f64);
    }
    let (mut took, mut asked, mut buffer) = (Vec::new(), 0, Vec::new());
    loop {
        if let Some(interval) = load.interval {
            tokio::time::sleep_until(next.into()).await;
            next += interval;
        }
        let begun = Instant::now();
        if begun >= load.until {
            return (took, asked);
        }
        let request = &load.requests[(number + asked * load.connections) % PROMPTS];
        stream.write_all(request).await.expect("sent");
        answer(&mut stream, &mut buffer).await;
        if begun >= load.from {
            took.push(begun.elapsed());
        }
        asked += 1;
    }
}

/// Reads one answer to its end.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) {
    buffer.clear();
    loop {
        let count = stream.read_buf(buffer).await.expect("read");
        let so_far = String::from_utf8_lossy(buffer);
        assert!(count > 0, "closed after {so_far:?}");
        let Some((head, body)) = so_far.split_once("\r\n\r\n") else {
            continue;
        };
        assert!(head.starts_with("HTTP/1.1 200"), "{so_far}");
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.parse::<usize>().expect("a length"))
        });
        let is_whole = match length {
            Some(length) => body.len() == length,
            None => body.ends_with("\r\n0\r\n\r\n"),
        };
        if is_whole {
            return;
        }
    }
}
