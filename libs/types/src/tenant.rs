//! What a tenant may have of the cluster's pools.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Longest name of a tenant that can have a quota, in bytes: it is part of a key in the registry.
const NAME_BYTES_MAX: usize = 256;

/// What an operator has set for one tenant. Each part that is there comes before the settings of every node.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantQuota {
    /// Most bytes of its blocks in each node's pool; 0 is no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_max: Option<u64>,
    /// Its part of a pool when memory is short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<NonZeroU32>,
}

impl TenantQuota {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the name of a tenant that is to have one. The empty name is for requests without a tenant.
    ///
    /// # Errors
    ///
    /// `invalid` for a name that is too long, or has control characters.
    pub fn check_name(tenant: &str) -> Result<(), Error> {
        if tenant.len() > NAME_BYTES_MAX {
            let message = format!(
                "tenant has {} bytes, but at most {NAME_BYTES_MAX} are allowed",
                tenant.len()
            );
            return Err(Error::invalid("tenant", message));
        }
        match tenant.chars().any(char::is_control) {
            true => Err(Error::invalid(
                "tenant",
                format!("tenant {tenant:?} has control characters"),
            )),
            false => Ok(()),
        }
    }
}
