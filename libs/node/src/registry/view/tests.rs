use proptest::prelude::*;
use types::NodeId;

use super::*;
use crate::registry::tests::record;

const GRACE: Duration = Duration::from_secs(10);

fn all(revision: u64, ids: &[&str]) -> Change {
    let records = ids.iter().map(|id| record(id, 1, "m", 32)).collect();
    Change::All {
        revision,
        records,
        quotas: BTreeMap::new(),
    }
}

fn ids(view: &View) -> Vec<&str> {
    view.members().nodes.keys().map(NodeId::as_str).collect()
}

#[test]
fn quotas_are_what_the_registry_said_last() {
    let now = Instant::now();
    let mut view = View::new(GRACE);
    let quota = |bytes| TenantQuota {
        bytes_max: Some(bytes),
        weight: None,
    };
    let said = |revision, tenant: &str, quota| Change::Quota {
        revision,
        tenant: tenant.to_owned(),
        quota,
    };
    view.apply(all(1, &[]), now);
    view.apply(said(2, "a", quota(1)), now);
    view.apply(said(3, "b", quota(2)), now);
    view.apply(said(4, "a", quota(3)), now);
    let both = [("a".to_owned(), quota(3)), ("b".to_owned(), quota(2))];
    assert_eq!(view.members().quotas, BTreeMap::from(both));
    view.disconnect();
    assert_eq!(view.members().quotas.len(), 2, "silence says nothing");
    view.apply(said(5, "b", TenantQuota::default()), now);
    assert_eq!(view.members().quotas.len(), 1);
    view.apply(all(6, &[]), now);
    assert!(view.members().quotas.is_empty());
}

#[test]
fn news_are_followed() {
    let now = Instant::now();
    let mut view = View::new(GRACE);
    assert!(!view.members().connected);
    view.apply(all(7, &["a"]), now);
    assert!(view.members().connected);
    let record = Box::new(record("b", 1, "m", 32));
    view.apply(Change::Joined { revision: 8, record }, now);
    assert_eq!((ids(&view), view.members().revision), (vec!["a", "b"], 8));
    let left = NodeId::new("a");
    view.apply(
        Change::Left {
            revision: 9,
            id: left,
        },
        now,
    );
    assert_eq!((ids(&view), view.members().revision), (vec!["b"], 9));
    view.apply(all(10, &["c"]), now);
    assert_eq!(
        ids(&view),
        ["c"],
        "a connected registry that names a member no more has dropped it"
    );
}

#[test]
fn members_stay_while_the_registry_is_away() {
    let now = Instant::now();
    let mut view = View::new(GRACE);
    view.apply(all(1, &["a", "b"]), now);
    view.disconnect();
    assert!(!view.members().connected);
    assert!(!view.expire(now + 100 * GRACE));
    assert_eq!(ids(&view), ["a", "b"]);
}

#[test]
fn members_that_a_returned_registry_does_not_name_have_one_lease_to_register_again() {
    let start = Instant::now();
    let mut view = View::new(GRACE);
    view.apply(all(1, &["a", "b", "c"]), start);
    view.disconnect();
    let back = start + GRACE * 3;
    view.apply(all(1, &["a"]), back);
    assert_eq!(ids(&view), ["a", "b", "c"]);
    assert_eq!(view.expires_at(), Some(back + GRACE));
    // A registry that tells all of its members at every change tells that b is back.
    view.apply(all(2, &["a", "b"]), back + GRACE / 2);
    assert_eq!(ids(&view), ["a", "b", "c"]);
    assert!(!view.expire(back + GRACE - Duration::from_nanos(1)));
    assert!(view.expire(back + GRACE));
    assert_eq!(ids(&view), ["a", "b"]);
    assert_eq!(view.expires_at(), None);
}

#[test]
fn a_member_that_leaves_in_the_grace_is_gone_at_once() {
    let now = Instant::now();
    let mut view = View::new(GRACE);
    view.apply(all(1, &["a", "b"]), now);
    view.disconnect();
    view.apply(all(2, &["a"]), now);
    view.apply(
        Change::Left {
            revision: 3,
            id: NodeId::new("b"),
        },
        now,
    );
    view.apply(all(4, &[]), now);
    assert!(ids(&view).is_empty());
}

proptest! {
    /// Whatever happens, a member is lost only by a word of the registry or by the end of the grace.
    #[test]
    fn silence_loses_nobody(steps in prop::collection::vec((0_u8..5, 0_u8..4, any::<u8>(), 0_u64..8_000), 1..60)) {
        let mut now = Instant::now();
        let mut view = View::new(GRACE);
        let mut back_at = now;
        for (revision, (kind, node, named, millis)) in (1..).zip(steps) {
            now += Duration::from_millis(millis);
            let before = view.members().clone();
            let id = NodeId::new(format!("n{node}"));
            let mut may_lose = Vec::new();
            match kind {
                0 => {
                    let records: Vec<_> = (0..4_u8)
                        .filter(|node| named & (1 << node) != 0)
                        .map(|node| record(&format!("n{node}"), 1, "m", 32))
                        .collect();
                    if before.connected {
                        may_lose.extend(before.nodes.keys().cloned());
                    } else {
                        back_at = now;
                    }
                    view.apply(Change::All { revision, records, quotas: BTreeMap::new() }, now);
                }
                1 if before.connected => {
                    let record = Box::new(record(id.as_str(), 1, "m", 32));
                    view.apply(Change::Joined { revision, record }, now);
                }
                2 if before.connected => {
                    may_lose.push(id.clone());
                    view.apply(Change::Left { revision, id }, now);
                }
                3 => view.disconnect(),
                _ => {
                    if view.expire(now) {
                        prop_assert!(before.connected && now >= back_at + GRACE);
                        may_lose.extend(before.nodes.keys().cloned());
                    }
                }
            }
            view.check_integrity();
            for id in before.nodes.keys() {
                prop_assert!(view.members().nodes.contains_key(id) || may_lose.contains(id), "{id} was lost");
            }
        }
    }
}
