//! What requests are sent to, and what comes back, measured at this end.

use std::time::{Duration, Instant};

use types::{Error, ErrorCode};

use super::flags::Api;
use super::grpc;
use super::http;
use super::plan::Planned;

/// Where requests go.
#[derive(Debug)]
pub(super) enum Target {
    Http(http::Client),
    Grpc(grpc::Client),
}

/// How all requests of a run are alike.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) api: Api,
    pub(super) model: String,
    /// Longest time of a request.
    pub(super) timeout: Duration,
}

/// An answer that came to its end.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Answer {
    /// To the first piece with content.
    pub(super) ttft_ms: f64,
    /// To the last piece with content.
    pub(super) latency_ms: f64,
    /// Between pieces with content.
    pub(super) gaps_ms: Vec<f32>,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
}

/// Measures one answer, as its pieces come.
#[derive(Debug)]
pub(super) struct Stopwatch {
    start: Instant,
    first: Option<Instant>,
    last: Instant,
    gaps_ms: Vec<f32>,
}

impl Target {
    /// Sends a request, and waits for its end within the deadline of `shape`.
    ///
    /// # Errors
    ///
    /// It was refused, failed, or did not end in time.
    pub(super) async fn send(&self, shape: &Shape, request: &Planned) -> Result<Answer, Error> {
        let answer = async {
            match self {
                Self::Http(client) => client.send(shape, request).await,
                Self::Grpc(client) => client.send(shape, request).await,
            }
        };
        let late = |_| Error::new(ErrorCode::Timeout, format!("no end within {:?}", shape.timeout));
        tokio::time::timeout(shape.timeout, answer).await.map_err(late)?
    }
}

impl Stopwatch {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            start: now,
            first: None,
            last: now,
            gaps_ms: Vec::new(),
        }
    }

    /// A piece with content came.
    pub(super) fn content(&mut self, now: Instant) {
        match self.first {
            None => self.first = Some(now),
            Some(_) => self.gaps_ms.push((now - self.last).as_secs_f32() * 1e3),
        }
        self.last = now;
    }

    /// The answer, if there was content. Without `output_tokens`, pieces are counted instead.
    pub(super) fn answer(
        self,
        prompt_tokens: u64,
        cached_tokens: u64,
        output_tokens: Option<u64>,
    ) -> Result<Answer, Error> {
        let Some(first) = self.first else {
            return Err(Error::internal("the answer has no content"));
        };
        let ms = |at: Instant| (at - self.start).as_secs_f64() * 1e3;
        Ok(Answer {
            ttft_ms: ms(first),
            latency_ms: ms(self.last),
            prompt_tokens,
            cached_tokens,
            output_tokens: output_tokens.unwrap_or(self.gaps_ms.len() as u64 + 1),
            gaps_ms: self.gaps_ms,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_measured_from_the_start_and_from_each_other() {
        let start = Instant::now();
        let mut watch = Stopwatch::new(start);
        for ms in [100, 110, 130] {
            watch.content(start + Duration::from_millis(ms));
        }
        let answer = watch.answer(5, 2, None).expect("content");
        assert_eq!((answer.ttft_ms, answer.latency_ms), (100.0, 130.0));
        assert_eq!(answer.gaps_ms, [10.0, 20.0]);
        assert_eq!(
            (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens),
            (5, 2, 3)
        );
    }

    #[test]
    fn an_answer_without_content_is_none() {
        assert!(Stopwatch::new(Instant::now()).answer(1, 0, Some(1)).is_err());
    }
}
