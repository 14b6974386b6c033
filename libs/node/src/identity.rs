//! Who this process is, and which start of it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use types::{Epoch, Error, NodeId, Role};

/// Bounds a node's name in registry keys, labels and logs; a Kubernetes pod name has at most 253.
pub const NODE_ID_BYTES_MAX: usize = 253;

/// A process's name, incarnation and role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The node's name.
    pub id: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// What it does.
    pub role: Role,
}

/// The epoch of a process that starts at `now`: nanoseconds since 1970, but always above `previous`, the epoch of
/// an earlier start if one is known, so that a clock that was set back cannot bring an old epoch into use again.
pub fn epoch(now: SystemTime, previous: Option<Epoch>) -> Epoch {
    let elapsed = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    let floor = previous.map_or(1, |Epoch(previous)| previous.saturating_add(1));
    Epoch(nanos.max(floor))
}

/// Checks a node's name: it becomes part of registry keys, metric labels and file names.
///
/// # Errors
///
/// [`types::ErrorCode::Invalid`], if it is empty, too long, or has other than letters, digits, `-`, `_` and `.`.
pub fn node_id(name: &str) -> Result<NodeId, Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > NODE_ID_BYTES_MAX {
        return Err(Error::invalid(
            "node_id",
            format!(
                "a node's name has 1 to {NODE_ID_BYTES_MAX} bytes, but this one has {}",
                name.len()
            ),
        ));
    }
    if !name.bytes().all(allowed) {
        return Err(Error::invalid(
            "node_id",
            format!("node name {name:?} has other characters than letters, digits, '-', '_' and '.'"),
        ));
    }
    Ok(NodeId::new(name))
}

/// The name of a node that was given none: its role and `host`, which is a pod's own name in Kubernetes. Whatever
/// a name must not have becomes `-`.
pub fn default_node_id(role: Role, host: &str) -> NodeId {
    let clean = |char: char| {
        if char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.') {
            char
        } else {
            '-'
        }
    };
    let host: String = host
        .trim()
        .chars()
        .map(clean)
        .take(NODE_ID_BYTES_MAX / 2)
        .collect();
    let host = if host.is_empty() { "local" } else { &host };
    if host.starts_with(role.as_str()) {
        return NodeId::new(host);
    }
    NodeId::new(format!("{role}-{host}"))
}

/// This machine's name, or "local" where it has none.
pub fn hostname() -> String {
    let file = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = std::env::var("HOSTNAME").ok().or_else(file).unwrap_or_default();
    match name.trim() {
        "" => "local".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn epochs_grow_even_if_the_clock_is_set_back() {
        let now = UNIX_EPOCH + Duration::from_secs(100);
        let first = epoch(now, None);
        assert_eq!(first, Epoch(100_000_000_000));
        assert!(epoch(now + Duration::from_nanos(1), Some(first)) > first);
        assert!(epoch(UNIX_EPOCH, Some(first)) > first);
        assert!(epoch(UNIX_EPOCH - Duration::from_secs(1), None) > Epoch::default());
    }

    #[rstest]
    #[case(Role::Decode, "host-1", "decode-host-1")]
    #[case(Role::Decode, "decode-3", "decode-3")]
    #[case(Role::Router, "my host/é\n", "router-my-host--")]
    #[case(Role::Store, "", "store-local")]
    fn a_default_name_is_the_role_and_the_host(#[case] role: Role, #[case] host: &str, #[case] name: &str) {
        let id = default_node_id(role, host);
        assert_eq!(id.as_str(), name);
        assert_eq!(node_id(id.as_str()), Ok(id));
    }

    #[rstest]
    #[case("")]
    #[case("a/b")]
    #[case("a b")]
    #[case("é")]
    #[case(&"x".repeat(254))]
    fn a_name_that_breaks_keys_is_refused(#[case] name: &str) {
        assert!(node_id(name).is_err());
    }
}
