use proptest::prelude::*;

use super::*;

const TRANSFER: TransferId = TransferId(7);
const BLOCKS: usize = 3;

fn error(code: ErrorCode) -> Error {
    Error::new(code, "scripted")
}

fn landed() -> Event {
    Event::Landed {
        transfer: TRANSFER,
        checksums: BLOCKS,
    }
}

/// A shell that carries out actions late and in any order with the world's events, and what is true of the memory.
#[derive(Default)]
struct Shell {
    /// The action that is under way.
    pending: Option<Action>,
    allocated: bool,
    granted: bool,
    fenced: bool,
    offered: bool,
    outcome: Option<Outcome>,
}

impl Shell {
    fn perform(&mut self, action: Action) {
        assert!(
            self.outcome.is_none() || action == Action::Wait,
            "{action:?} after the end"
        );
        match &action {
            Action::Wait => return,
            Action::Allocate => assert!(!self.allocated, "allocated twice"),
            Action::Offer => {
                assert!(self.granted && !self.offered, "an offer needs a grant, once");
                self.offered = true;
                return;
            }
            Action::Fence { .. } => assert!(self.granted && !self.fenced, "the fence closes a grant, once"),
            Action::Verify => assert!(
                self.fenced && !self.granted,
                "bytes are read only behind the fence"
            ),
            Action::End(outcome) => {
                assert!(!self.granted, "memory is freed while a peer may write to it");
                assert!(self.pending.is_none(), "the end overtakes {:?}", self.pending);
                if *outcome == Outcome::Adopted {
                    assert!(self.allocated && self.fenced && self.offered);
                }
                self.outcome = Some(outcome.clone());
                return;
            }
        }
        assert!(
            self.pending.is_none(),
            "{action:?} while {:?} is under way",
            self.pending
        );
        self.pending = Some(action);
    }

    /// Ends the action under way, in the way that `dice` says.
    fn complete(&mut self, dice: u8) -> Option<Event> {
        Some(match self.pending.take()? {
            Action::Allocate => match dice % 4 {
                0 => Event::Short,
                1 => Event::AllocationFailed(error(ErrorCode::Overloaded)),
                _ => {
                    (self.allocated, self.granted) = (true, true);
                    Event::Allocated
                }
            },
            // The shell keeps the grant until its fence has closed: what matters here is that nothing is read or freed.
            Action::Fence { .. } if dice.is_multiple_of(6) => {
                self.granted = false;
                Event::FenceSlow(error(ErrorCode::Unavailable))
            }
            Action::Fence { .. } => {
                (self.granted, self.fenced) = (false, true);
                Event::Fenced
            }
            Action::Verify if dice.is_multiple_of(5) => Event::Corrupt(error(ErrorCode::Corrupt)),
            Action::Verify if dice % 5 == 1 => Event::Unverified(error(ErrorCode::Internal)),
            Action::Verify => Event::Verified,
            other => panic!("{other:?} has no answer"),
        })
    }
}

/// What may come from outside at any time.
fn world(kind: u8) -> Event {
    match kind {
        0 => Event::Started {
            blocks: BLOCKS as u64,
        },
        1 => Event::Started { blocks: 99 },
        2 | 3 => landed(),
        4 => Event::Landed {
            transfer: TransferId(8),
            checksums: BLOCKS,
        },
        5 => Event::Landed {
            transfer: TRANSFER,
            checksums: BLOCKS + 1,
        },
        6 => Event::Failed(error(ErrorCode::Unavailable)),
        7 => Event::Quiesced,
        8 => Event::Closed(error(ErrorCode::Unavailable)),
        9 => Event::DeadlinePassed,
        10 => Event::Stalled(error(ErrorCode::Unavailable)),
        _ => Event::Cancelled,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn offered_memory_is_used_again_only_behind_the_fence_and_every_handoff_ends(
        well_behaved_start in any::<bool>(),
        script in prop::collection::vec((0..24_u8, any::<u8>()), 0..25),
    ) {
        let mut handoff = Handoff::new(TRANSFER, BLOCKS);
        let mut shell = Shell::default();
        if well_behaved_start {
            shell.perform(handoff.on(Event::Started { blocks: BLOCKS as u64 }));
        }
        for (kind, dice) in script {
            // Half of the steps let the action under way end; the others are news from outside.
            let event = if kind >= 12 { shell.complete(dice) } else { Some(world(kind)) };
            if let Some(event) = event {
                shell.perform(handoff.on(event));
            }
            prop_assert!(!shell.granted || handoff.exposed() || shell.pending.is_some());
        }
        // The deadline comes in the end, and every action is answered: then it is over.
        shell.perform(handoff.on(Event::DeadlinePassed));
        for _ in 0..3 {
            if let Some(event) = shell.complete(2) {
                shell.perform(handoff.on(event));
            }
        }
        prop_assert!(shell.outcome.is_some());
        prop_assert!(!shell.granted);
        // Whatever still comes changes nothing.
        for kind in 0..12 {
            prop_assert_eq!(handoff.on(world(kind)), Action::Wait);
        }
    }
}

/// Plays events and returns the actions.
fn play(events: impl IntoIterator<Item = Event>) -> Vec<Action> {
    let mut handoff = Handoff::new(TRANSFER, BLOCKS);
    events.into_iter().map(|event| handoff.on(event)).collect()
}

fn started() -> Event {
    Event::Started {
        blocks: BLOCKS as u64,
    }
}

#[test]
fn the_good_way_fences_before_it_verifies() {
    let actions = play([
        started(),
        Event::Allocated,
        landed(),
        Event::Fenced,
        Event::Verified,
    ]);
    let expected = [
        Action::Allocate,
        Action::Offer,
        Action::Fence { abort: false },
        Action::Verify,
        Action::End(Outcome::Adopted),
    ];
    assert_eq!(actions, expected);
}

#[test]
fn landed_after_the_deadline_does_not_revive_a_handoff() {
    let actions = play([
        started(),
        Event::Allocated,
        Event::DeadlinePassed,
        landed(),
        Event::Fenced,
        landed(),
    ]);
    let expected = [
        Action::Allocate,
        Action::Offer,
        Action::Fence { abort: true },
        Action::Wait,
        Action::End(Outcome::TimedOut),
        Action::Wait,
    ];
    assert_eq!(actions, expected);
}

#[test]
fn a_second_landed_changes_nothing() {
    let actions = play([
        started(),
        Event::Allocated,
        landed(),
        landed(),
        Event::Fenced,
        landed(),
        Event::Verified,
    ]);
    assert_eq!(actions[3], Action::Wait);
    assert_eq!(actions[5], Action::Wait);
    assert_eq!(actions[6], Action::End(Outcome::Adopted));
}

#[test]
fn a_cancel_while_blocks_are_sought_still_closes_the_grant() {
    let actions = play([started(), Event::Cancelled, Event::Allocated, Event::Fenced]);
    let expected = [
        Action::Allocate,
        Action::Wait,
        Action::Fence { abort: true },
        Action::End(Outcome::Cancelled),
    ];
    assert_eq!(actions, expected);
}

#[test]
fn a_handoff_that_only_queues_gives_way_to_those_who_need_memory() {
    assert_eq!(
        play([Event::Short, started()]),
        [Action::End(Outcome::Short), Action::Wait]
    );
}

#[test]
fn a_fence_that_is_slow_ends_the_handoff_without_a_look_at_the_bytes() {
    let slow = error(ErrorCode::Unavailable);
    let actions = play([
        started(),
        Event::Allocated,
        landed(),
        Event::FenceSlow(slow.clone()),
        Event::Fenced,
    ]);
    assert_eq!(actions[2], Action::Fence { abort: false });
    assert_eq!(actions[3], Action::End(Outcome::Failed(slow.clone())));
    assert_eq!(actions[4], Action::Wait);
    let cancelled = play([
        started(),
        Event::Allocated,
        Event::Cancelled,
        Event::FenceSlow(slow),
    ]);
    assert_eq!(cancelled[3], Action::End(Outcome::Cancelled));
}

#[test]
fn a_prefill_node_that_stalls_is_told_and_fenced() {
    let silent = error(ErrorCode::Unavailable);
    let stalled = || Event::Stalled(silent.clone());
    assert_eq!(play([stalled()]), [Action::End(Outcome::Failed(silent.clone()))]);
    let actions = play([started(), Event::Allocated, stalled(), Event::Fenced]);
    assert_eq!(actions[2], Action::Fence { abort: true });
    assert_eq!(actions[3], Action::End(Outcome::Failed(silent.clone())));
}

#[test]
fn a_stream_that_breaks_while_writing_fences_first() {
    let broken = error(ErrorCode::Unavailable);
    let actions = play([
        started(),
        Event::Allocated,
        Event::Closed(broken.clone()),
        Event::Fenced,
    ]);
    assert_eq!(actions[2], Action::Fence { abort: false });
    assert_eq!(actions[3], Action::End(Outcome::Failed(broken)));
}
