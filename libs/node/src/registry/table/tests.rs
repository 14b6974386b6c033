use std::collections::BTreeSet;

use proptest::prelude::*;
use types::ErrorCode;

use super::*;
use crate::registry::tests::record;

const TTL: Duration = Duration::from_secs(10);

#[test]
fn a_lease_that_is_kept_alive_lives_and_another_ends_in_time() {
    let start = Instant::now();
    let mut table = MemberTable::new(100);
    let kept = table
        .register(record("a", 1, "m", 32), TTL, start)
        .expect("joins");
    let left = table
        .register(record("b", 1, "m", 32), TTL, start)
        .expect("joins");
    assert!(table.keep_alive(kept, start + TTL / 2));
    assert!(!table.expire(start + TTL - Duration::from_nanos(1)));
    assert_eq!(table.next_expiry(), Some(start + TTL));
    let revision = table.revision();
    assert!(table.expire(start + TTL));
    assert!(table.revision() > revision);
    assert!(!table.keep_alive(left, start + TTL));
    assert!(table.keep_alive(kept, start + TTL));
    assert!(table.unregister(kept) && !table.unregister(kept));
    assert!(table.members().is_empty());
}

#[test]
fn a_lease_that_ended_unnoticed_is_not_prolonged() {
    let start = Instant::now();
    let mut table = MemberTable::new(1);
    let lease = table
        .register(record("a", 1, "m", 32), TTL, start)
        .expect("joins");
    assert!(!table.keep_alive(lease, start + TTL));
    assert!(table.members().is_empty());
}

#[test]
fn the_settings_of_a_model_are_free_once_its_nodes_are_gone() {
    let start = Instant::now();
    let mut table = MemberTable::new(1);
    table
        .register(record("a", 1, "m", 32), TTL, start)
        .expect("joins");
    let refused = table
        .register(record("b", 1, "m", 64), TTL, start)
        .expect_err("disagrees");
    assert_eq!(refused.code, ErrorCode::Conflict);
    table
        .register(record("b", 1, "m", 64), TTL, start + TTL)
        .expect("nobody disagrees any more");
}

#[test]
fn the_table_is_bounded() {
    let now = Instant::now();
    let mut table = MemberTable::new(1);
    for index in 0..NODES_MAX {
        table
            .register(record(&format!("n{index}"), 1, "m", 32), TTL, now)
            .expect("joins");
    }
    let refused = table
        .register(record("more", 1, "m", 32), TTL, now)
        .expect_err("is full");
    assert_eq!(refused.code, ErrorCode::Overloaded);
    table
        .register(record("n0", 2, "m", 32), TTL, now)
        .expect("a replacement needs no room");
    let refused = table
        .register(record("n0", 3, "m", 32), Duration::ZERO, now)
        .expect_err("no lease");
    assert_eq!(refused.code, ErrorCode::Invalid);
}

#[derive(Debug, Clone)]
enum Step {
    Register {
        node: u8,
        epoch: u64,
        block_tokens: usize,
    },
    KeepAlive {
        nth: usize,
    },
    Unregister {
        nth: usize,
    },
    Expire,
    Pass {
        millis: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u8..4, 0_u64..4, prop_oneof![9 => Just(32), 1 => Just(64)])
            .prop_map(|(node, epoch, block_tokens)| Step::Register { node, epoch, block_tokens }),
        3 => (0_usize..20).prop_map(|nth| Step::KeepAlive { nth }),
        1 => (0_usize..20).prop_map(|nth| Step::Unregister { nth }),
        1 => Just(Step::Expire),
        3 => (0_u64..6_000).prop_map(|millis| Step::Pass { millis }),
    ]
}

/// The same, naively: one entry per node, looked through at every question.
#[derive(Default)]
struct Model {
    /// Node, epoch, block size, lease, end.
    entries: Vec<(String, u64, usize, LeaseId, Instant)>,
}

impl Model {
    fn expire(&mut self, now: Instant) {
        self.entries.retain(|entry| entry.4 > now);
    }

    fn admits(&self, node: &str, epoch: u64, block_tokens: usize) -> bool {
        self.entries.iter().all(|entry| match entry.0 == node {
            true => entry.1 <= epoch,
            false => entry.2 == block_tokens,
        })
    }
}

proptest! {
    #[test]
    fn the_table_does_as_its_naive_model(steps in prop::collection::vec(step(), 1..80)) {
        let mut now = Instant::now();
        let mut table = MemberTable::new(1);
        let mut model = Model::default();
        let mut leases = Vec::new();
        for step in steps {
            let revision = table.revision();
            let before = table.members().clone();
            match step {
                Step::Register { node, epoch, block_tokens } => {
                    model.expire(now);
                    let name = format!("n{node}");
                    let admitted = model.admits(&name, epoch, block_tokens);
                    let result = table.register(record(&name, epoch, "m", block_tokens), TTL, now);
                    prop_assert_eq!(result.is_ok(), admitted);
                    if let Ok(lease) = result {
                        prop_assert!(!leases.contains(&lease), "a lease was given twice");
                        leases.push(lease);
                        model.entries.retain(|entry| entry.0 != name);
                        model.entries.push((name, epoch, block_tokens, lease, now + TTL));
                    }
                }
                Step::KeepAlive { nth } => if let Some(lease) = leases.get(nth) {
                    model.expire(now);
                    let entry = model.entries.iter_mut().find(|entry| entry.3 == *lease);
                    prop_assert_eq!(table.keep_alive(*lease, now), entry.is_some());
                    if let Some(entry) = entry {
                        entry.4 = now + TTL;
                    }
                }
                Step::Unregister { nth } => if let Some(lease) = leases.get(nth) {
                    let held = model.entries.iter().any(|entry| entry.3 == *lease);
                    prop_assert_eq!(table.unregister(*lease), held);
                    model.entries.retain(|entry| entry.3 != *lease);
                }
                Step::Expire => {
                    model.expire(now);
                    table.expire(now);
                }
                Step::Pass { millis } => now += Duration::from_millis(millis),
            }
            table.check_integrity();
            let held: BTreeSet<_> = table.members().iter().map(|(id, record)| (id.to_string(), record.epoch.0)).collect();
            let expected: BTreeSet<_> = model.entries.iter().map(|entry| (entry.0.clone(), entry.1)).collect();
            prop_assert_eq!(held, expected);
            prop_assert!(table.revision() > revision || *table.members() == before, "a change without a number");
        }
    }
}
