//! `perigee node flip`: makes a prefill node a decode node, or the other way round.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use types::{Error, NodeId, Role};

use super::drain::check_not_last;
use super::{connect, find, members};
use crate::arguments::{EngineRole, FlipArgs};
use crate::output::{Format, View};
use crate::reach::Router;

/// What a node takes at most beside its requests' grace: starting an engine, moving requests, registering again.
const FLIP_DEADLINE: Duration = Duration::from_secs(60);

/// Flips, and prints what the node was and is.
pub(super) async fn run(flags: &FlipArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let members = members(router).await?;
    let found = find(&members, &flags.node)?;
    let id = &found.record.id;
    let to = target(found.record.role, flags.to)?;
    if !flags.force && to != Role::Decode {
        check_not_last(found, &members)?;
    }
    let node = connect(router, &found.record)?.with_deadline(FLIP_DEADLINE);
    let began = Instant::now();
    let was = node.flip(to, flags.grace.into()).await?;
    format.print(&view(id, was, to, began.elapsed()))
}

fn view(id: &NodeId, was: Role, to: Role, took: Duration) -> View {
    let took_ms = took.as_millis();
    let line = match was == to {
        true => format!("{id} is a {to} node already"),
        false => format!("{id} was a {was} node and is a {to} node, after {took_ms} ms"),
    };
    let document = json!({ "node": id, "was": was.as_str(), "role": to.as_str(), "took_ms": took_ms });
    View::line(document, line).named([id])
}

/// What a node of this role is to be.
fn target(role: Role, to: Option<EngineRole>) -> Result<Role, Error> {
    match (role, to) {
        (Role::Prefill | Role::Decode, Some(EngineRole::Prefill)) | (Role::Decode, None) => Ok(Role::Prefill),
        (Role::Prefill | Role::Decode, Some(EngineRole::Decode)) | (Role::Prefill, None) => Ok(Role::Decode),
        (Role::Router | Role::Store, _) => Err(Error::invalid(
            "node",
            format!("a {role} has no engine, so that it cannot take another role"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::golden;

    #[test]
    fn a_change_of_role_is_told() {
        let took = Duration::from_millis(1234);
        let flipped = view(&NodeId::new("prefill-0"), Role::Prefill, Role::Decode, took);
        golden::check("node-flip", &flipped);
    }

    #[test]
    fn a_node_becomes_what_it_is_not_unless_it_is_told_what() {
        assert_eq!(target(Role::Prefill, None), Ok(Role::Decode));
        assert_eq!(target(Role::Decode, None), Ok(Role::Prefill));
        assert_eq!(target(Role::Decode, Some(EngineRole::Decode)), Ok(Role::Decode));
        for role in [Role::Router, Role::Store] {
            assert!(target(role, None).is_err(), "{role} has no engine");
        }
    }
}
