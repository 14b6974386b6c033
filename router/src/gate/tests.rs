use std::num::NonZeroU32;
use std::time::Duration;

use futures::FutureExt;
use types::{Priority, Slo};

use super::*;

const ASKS: Asks<'static> = Asks {
    tenant: "",
    terms: Terms {
        weight: NonZeroU32::MIN,
        priority: Priority::Normal,
        slo: Slo {
            ttft: None,
            tbt: None,
        },
    },
    prompt_tokens: 1,
};

fn gate() -> Gate {
    Gate::new(Limits {
        running_max: 1,
        waiting_max: 2,
        ..Limits::default()
    })
}

fn in_an_hour() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

#[tokio::test]
async fn a_dropped_permit_wakes_the_next_in_line() {
    let gate = gate();
    let first = gate.enter(&ASKS, in_an_hour()).await.expect("the gate is empty");
    let mut second = Box::pin(gate.enter(&ASKS, in_an_hour()));
    assert!(second.as_mut().now_or_never().is_none());
    assert_eq!(gate.counts(), (1, 1));
    drop(first);
    let second = second.await.expect("the place is free");
    assert_eq!(gate.counts(), (1, 0));
    drop(second);
    assert_eq!(gate.counts(), (0, 0));
}

#[tokio::test]
async fn giving_up_while_waiting_leaves_no_trace() {
    let gate = gate();
    let first = gate.enter(&ASKS, in_an_hour()).await.expect("the gate is empty");
    let mut second = Box::pin(gate.enter(&ASKS, in_an_hour()));
    let mut third = Box::pin(gate.enter(&ASKS, in_an_hour()));
    assert!(second.as_mut().now_or_never().is_none());
    assert!(third.as_mut().now_or_never().is_none());
    assert!(matches!(
        gate.enter(&ASKS, in_an_hour()).await,
        Err(Refused::Rejected(Rejection::QueueFull { waiting: 2, .. }))
    ));
    drop(second);
    assert_eq!(gate.counts(), (1, 1));
    drop(first);
    third.await.expect("the place passed over the one that left");
    assert_eq!(gate.counts(), (0, 0));
}

#[tokio::test]
async fn a_place_given_to_one_that_just_left_goes_on() {
    let gate = gate();
    let first = gate.enter(&ASKS, in_an_hour()).await.expect("the gate is empty");
    let mut second = Box::pin(gate.enter(&ASKS, in_an_hour()));
    let mut third = Box::pin(gate.enter(&ASKS, in_an_hour()));
    assert!(second.as_mut().now_or_never().is_none());
    assert!(third.as_mut().now_or_never().is_none());
    drop(first);
    // Woken, but never polled again.
    drop(second);
    third.await.expect("the place is free");
}

#[tokio::test]
async fn a_wait_ends_with_the_deadline() {
    let gate = gate();
    let _first = gate.enter(&ASKS, in_an_hour()).await.expect("the gate is empty");
    let refused = gate.enter(&ASKS, Instant::now()).await;
    assert!(matches!(refused, Err(Refused::Deadline)));
    assert_eq!(gate.counts(), (1, 0));
}

#[tokio::test]
async fn who_is_displaced_hears_of_it() {
    let gate = gate();
    let _first = gate.enter(&ASKS, in_an_hour()).await.expect("the gate is empty");
    let mut second = Box::pin(gate.enter(&ASKS, in_an_hour()));
    let mut third = Box::pin(gate.enter(&ASKS, in_an_hour()));
    assert!(second.as_mut().now_or_never().is_none());
    assert!(third.as_mut().now_or_never().is_none());
    let urgent = Asks {
        terms: Terms {
            priority: Priority::High,
            ..ASKS.terms
        },
        ..ASKS
    };
    let mut fourth = Box::pin(gate.enter(&urgent, in_an_hour()));
    assert!(fourth.as_mut().now_or_never().is_none());
    assert!(matches!(
        third.await,
        Err(Refused::Rejected(Rejection::Displaced { .. }))
    ));
    assert_eq!(gate.counts(), (1, 2));
}

#[tokio::test]
async fn room_lets_in_who_waited_for_it() {
    let gate = gate();
    gate.make_room(Room { prompt_tokens: 0 });
    let mut first = Box::pin(gate.enter(&ASKS, in_an_hour()));
    assert!(first.as_mut().now_or_never().is_none());
    gate.make_room(Room { prompt_tokens: 100 });
    first.await.expect("there is room");
}
