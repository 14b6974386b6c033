//! Sends planned requests at their time, with a bound on how many run.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use types::Error;

use super::plan::Planned;
use super::target::{Answer, Shape, Target};

/// How much is sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most requests that run at a time.
    pub(super) running_max: usize,
    /// Nothing is sent after it.
    pub(super) duration: Option<Duration>,
}

/// What became of one request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    pub(super) number: u64,
    /// When it was sent, from the start of the run.
    pub(super) sent: Duration,
    /// When it ended, from the start of the run.
    pub(super) ended: Duration,
    /// How long after its time it was sent: more than a millisecond or two means that this end was the bottleneck.
    pub(super) lag: Duration,
    pub(super) outcome: Result<Answer, Error>,
}

/// Sends what `plan` gives, and waits for all ends. Each request has a deadline of its own, so this ends.
pub(super) async fn drive(
    target: &Arc<Target>,
    shape: &Arc<Shape>,
    mut plan: impl Iterator<Item = Planned>,
    limits: Limits,
    mut on_end: impl FnMut(&Sample),
) -> Vec<Sample> {
    let start = Instant::now();
    let (mut running, mut samples) = (JoinSet::new(), Vec::new());
    let mut next = plan.next();
    loop {
        let has_room = running.len() < limits.running_max;
        let due = match &next {
            Some(request) if has_room => Some(due(start, request)),
            Some(_) | None => None,
        };
        tokio::select! {
            // An end makes room, so it comes first.
            biased;
            Some(sample) = running.join_next() => {
                // A panic of a task is a defect, and no result.
                let sample: Sample = sample.expect("sending does not panic");
                on_end(&sample);
                samples.push(sample);
            }
            () = sleep_until(due.unwrap_or(start)), if due.is_some() => {
                let over = limits.duration.is_some_and(|duration| start.elapsed() >= duration);
                let Some(request) = next.take().filter(|_| !over) else {
                    continue;
                };
                running.spawn(send(Arc::clone(target), Arc::clone(shape), start, request));
                next = plan.next();
            }
            else => break,
        }
    }
    samples
}

/// What never comes is due in a day, when no run goes on.
fn due(start: Instant, request: &Planned) -> Instant {
    const NEVER: Duration = Duration::from_secs(24 * 3600);
    start + request.at.unwrap_or_default().min(NEVER)
}

async fn send(target: Arc<Target>, shape: Arc<Shape>, start: Instant, request: Planned) -> Sample {
    let sent = start.elapsed();
    let outcome = target.send(&shape, &request).await;
    Sample {
        number: request.number,
        sent,
        ended: start.elapsed(),
        lag: request.at.map_or(Duration::ZERO, |at| sent.saturating_sub(at)),
        outcome,
    }
}
