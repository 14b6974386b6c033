//! `perigee node flip`: makes a prefill node a decode node, or the other way round. `perigee model load` and `unload` are the way from
//! a store to one of them, and back.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use types::{Error, NodeId, Role};

use super::drain::check_not_last;
use super::{connect, find, members};
use crate::arguments::{EngineRole, FlipArgs, LoadArgs, UnloadArgs};
use crate::output::{Format, View};
use crate::reach::Router;

/// What a node takes at most beside its requests' grace, if its model is loaded: starting an engine, moving requests, registering
/// again.
const FLIP_DEADLINE: Duration = Duration::from_secs(60);

/// A node's role as it was and as it is.
struct Change {
    id: NodeId,
    was: Role,
    role: Role,
    took: Duration,
}

/// Flips, and prints what the node was and is.
pub(super) async fn run(flags: &FlipArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let change = change(
        &flags.node,
        router,
        FLIP_DEADLINE,
        flags.grace.into(),
        flags.force,
        |role| target(role, flags.to),
    );
    format.print(&change.await?.flipped())
}

/// `perigee model load`.
pub(crate) async fn load(flags: &LoadArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let to = flags.role.role();
    let of_store = |role| match role {
        Role::Store => Ok(to),
        role if role == to => Ok(to),
        role => Err(Error::invalid(
            "node",
            format!("a {role} has its model loaded: perigee node flip changes what it does"),
        )),
    };
    // Nothing runs on a store that would need a grace.
    let change = change(
        &flags.node,
        router,
        flags.timeout.into(),
        Duration::ZERO,
        true,
        of_store,
    );
    format.print(&change.await?.loaded())
}

/// `perigee model unload`.
pub(crate) async fn unload(flags: &UnloadArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let change = change(
        &flags.node,
        router,
        FLIP_DEADLINE,
        flags.grace.into(),
        flags.force,
        |_| Ok(Role::Store),
    );
    format.print(&change.await?.unloaded())
}

/// Has a node take the role that `target` names, given the one that it has.
async fn change(
    node: &str,
    router: &Router,
    deadline: Duration,
    grace: Duration,
    force: bool,
    target: impl Fn(Role) -> Result<Role, Error>,
) -> anyhow::Result<Change> {
    let members = members(router).await?;
    let found = find(&members, node)?;
    let id = found.record.id.clone();
    if found.record.role == Role::Router {
        let message = format!("{id} is a router, which has neither blocks nor an engine");
        return Err(Error::invalid("node", message).into());
    }
    let to = target(found.record.role)?;
    if !force && to != Role::Decode {
        check_not_last(found, &members)?;
    }
    let began = Instant::now();
    let node = connect(router, &found.record)?.with_deadline(deadline + grace);
    let was = node.flip(to, grace).await?;
    Ok(Change {
        id,
        was,
        role: to,
        took: began.elapsed(),
    })
}

impl Change {
    fn flipped(&self) -> View {
        let Self { was, role, .. } = self;
        self.view(
            &format!("is a {role} node"),
            &format!("was a {was} node and is a {role} node"),
        )
    }

    fn loaded(&self) -> View {
        let role = self.role;
        self.view(
            &format!("is a {role} node"),
            &format!("has loaded its model and is a {role} node"),
        )
    }

    fn unloaded(&self) -> View {
        let was = self.was;
        self.view(
            "has no model loaded",
            &format!("was a {was} node and holds blocks alone, its model's memory free"),
        )
    }

    /// Says of the node what it is, where that is nothing new, or what it has become.
    fn view(&self, unchanged: &str, changed: &str) -> View {
        let Self { id, was, role, took } = self;
        let took_ms = took.as_millis();
        let line = match was == role {
            true => format!("{id} {unchanged} already"),
            false => format!("{id} {changed}, after {took_ms} ms"),
        };
        let document = json!({ "node": id, "was": was.as_str(), "role": role.as_str(), "took_ms": took_ms });
        View::line(document, line).named([id])
    }
}

/// What a node of this role is to be.
fn target(role: Role, to: Option<EngineRole>) -> Result<Role, Error> {
    match (role, to) {
        (Role::Prefill | Role::Decode, Some(to)) => Ok(to.role()),
        (Role::Decode, None) => Ok(Role::Prefill),
        (Role::Prefill, None) => Ok(Role::Decode),
        (Role::Store, _) => Err(Error::invalid(
            "node",
            "a store has no model loaded: perigee model load does that",
        )),
        (Role::Router, _) => Err(Error::invalid("node", "a router has no engine")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::golden;

    #[test]
    fn a_change_of_role_is_told() {
        let change = |was, role| Change {
            id: NodeId::new("prefill-0"),
            was,
            role,
            took: Duration::from_millis(1234),
        };
        golden::check("node-flip", &change(Role::Prefill, Role::Decode).flipped());
        golden::check("model-load", &change(Role::Store, Role::Decode).loaded());
        golden::check("model-unload", &change(Role::Prefill, Role::Store).unloaded());
        let nothing = change(Role::Store, Role::Store).unloaded();
        assert_eq!(nothing.documents()[0]["was"], "store");
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
