//! Who may register. Pure; both registries obey it.

use std::collections::BTreeMap;

use types::{Epoch, Error, ErrorCode, KvLayout, KvSpace, NodeId, NodeRecord};

use crate::identity;

/// Differences that a refusal names; the first ones tell enough.
const DIFFERENCES_MAX: usize = 4;

/// Why a node may not register.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The record itself cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// Another node of the model makes other blocks.
    #[error(
        "{node} and {other}, which is a member, would serve {model} with different KV: {differences}; \
             start it with the same settings, or stop all nodes of {model} first"
    )]
    Conflict {
        node: NodeId,
        other: NodeId,
        model: String,
        differences: String,
    },
    /// A newer incarnation of the node lives.
    #[error("{node} has epoch {epoch}, but epoch {newer} of it is a member")]
    Fenced {
        node: NodeId,
        epoch: Epoch,
        newer: Epoch,
    },
    /// The cluster is as large as it may be.
    #[error("{node} would be one more than the {limit} nodes that the registry holds")]
    Full { node: NodeId, limit: usize },
}

impl Refusal {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Invalid(_) => ErrorCode::Invalid,
            Self::Conflict { .. } => ErrorCode::Conflict,
            Self::Fenced { .. } => ErrorCode::Fenced,
            Self::Full { .. } => ErrorCode::Overloaded,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code(), refusal.to_string())
    }
}

/// Whether `record` may join `members` or replace its own earlier incarnation there.
///
/// Comparing with living members, rather than with a setting kept for the model, means that a deliberate change needs
/// nothing but that the old nodes are gone.
pub(crate) fn admit(members: &BTreeMap<NodeId, NodeRecord>, record: &NodeRecord) -> Result<(), Refusal> {
    identity::node_id(record.id.as_str()).map_err(|error| Refusal::Invalid(error.message))?;
    if let Some(known) = members.get(&record.id)
        && known.epoch > record.epoch
    {
        return Err(Refusal::Fenced {
            node: record.id.clone(),
            epoch: record.epoch,
            newer: known.epoch,
        });
    }
    let Some(space) = &record.kv_space else {
        return Ok(());
    };
    let others = members
        .values()
        .filter(|other| other.id != record.id && other.model == record.model);
    for other in others {
        let differences = other.kv_space.as_ref().map(|theirs| differences(theirs, space));
        if let Some(differences) = differences
            && !differences.is_empty()
        {
            return Err(Refusal::Conflict {
                node: record.id.clone(),
                other: other.id.clone(),
                model: record.model.clone(),
                differences: differences[..differences.len().min(DIFFERENCES_MAX)].join(", "),
            });
        }
    }
    Ok(())
}

/// Every setting in which the spaces differ, as "name is x there and y here".
fn differences(there: &KvSpace, here: &KvSpace) -> Vec<String> {
    let KvSpace {
        model_digest,
        arithmetic,
        layout,
        adapter,
        tenant_salt,
    } = there;
    let KvLayout {
        layers,
        kv_heads,
        head_dim,
        block_tokens,
        dtype,
    } = layout;
    let shown = |adapter: &Option<String>| adapter.clone().unwrap_or_else(|| "none".to_owned());
    let salted = |salt: &str| format!("{salt:?}");
    let settings = [
        ("model_digest", model_digest.clone(), here.model_digest.clone()),
        ("arithmetic", arithmetic.clone(), here.arithmetic.clone()),
        ("layers", layers.to_string(), here.layout.layers.to_string()),
        ("kv_heads", kv_heads.to_string(), here.layout.kv_heads.to_string()),
        ("head_dim", head_dim.to_string(), here.layout.head_dim.to_string()),
        (
            "block_tokens",
            block_tokens.to_string(),
            here.layout.block_tokens.to_string(),
        ),
        ("dtype", format!("{dtype:?}"), format!("{:?}", here.layout.dtype)),
        ("adapter", shown(adapter), shown(&here.adapter)),
        ("tenant_salt", salted(tenant_salt), salted(&here.tenant_salt)),
    ];
    settings
        .into_iter()
        .filter(|(_, there, here)| there != here)
        .map(|(name, there, here)| format!("{name} is {there} there and {here} here"))
        .collect()
}
