//! Who may call what at a router, and as which tenant. Pure: `guard.rs` asks here with what a connection and a request show.
//!
//! Invariants: a call that nobody has thought of needs what an administrator has; a key that is shown decides, also on the connection
//! of a member, so that who passes on a client's request cannot lend it more than the client's key is worth.
//!
//! Elsewhere: the list of keys (`keys.rs`).

pub mod keys;

use types::{Error, ErrorCode};

use keys::{KeyRole, Keys};

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: health, and which calls there are.
    Nothing,
    /// A client: it uses the model as a tenant.
    Client,
    /// An administrator: it shows or changes the cluster.
    Admin,
}

/// Calls that need nothing, by the beginning of their paths.
const OPEN: &[&str] = &[
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];
/// Calls of clients.
const OF_CLIENTS: &[&str] = &[
    "/perigee.v1.Inference/Generate",
    "/perigee.v1.Inference/ListModels",
];

/// What the gRPC call of this path needs.
pub fn need(path: &str) -> Need {
    if OPEN.iter().any(|open| path.starts_with(open)) {
        return Need::Nothing;
    }
    match OF_CLIENTS.contains(&path) {
        true => Need::Client,
        false => Need::Admin,
    }
}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Nobody was asked.
    Anyone,
    /// The holder of a tenant's key.
    Tenant(String),
    /// A member of the cluster, or the holder of an administrator's key.
    Admin,
}

impl Caller {
    /// The tenant of a request that names `requested`, which is empty where it names none.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Denied`]: it names another one than the key's.
    pub fn tenant(&self, requested: String) -> Result<String, Error> {
        match self {
            Self::Anyone | Self::Admin => Ok(requested),
            Self::Tenant(own) if requested.is_empty() || requested == *own => Ok(own.clone()),
            Self::Tenant(own) => Err(Error {
                param: Some("tenant".to_owned()),
                ..Error::new(
                    ErrorCode::Denied,
                    format!("the API key is of tenant {own:?}, but the request names {requested:?}"),
                )
            }),
        }
    }
}

/// What holds at a router.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The keys that count; `None` asks for none.
    pub keys: Option<Keys>,
    /// Whether members show certificates.
    pub tls: bool,
    /// Whether clients have to show one, too.
    pub certificates_required: bool,
}

/// What a caller shows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shown<'a> {
    /// The secret of `Authorization: Bearer`.
    pub key: Option<&'a str>,
    /// Whether the connection showed a certificate of the cluster.
    pub member: bool,
}

impl Policy {
    /// Whether anything is asked of callers.
    pub fn asks(&self) -> bool {
        self.keys.is_some() || self.tls
    }

    /// Who calls, if it may.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Unauthenticated`]: what is shown is missing, unknown or expired. [`ErrorCode::Denied`]: it is not enough.
    pub fn admit(&self, need: Need, shown: Shown<'_>, now_unix_s: u64) -> Result<Caller, Error> {
        if need == Need::Nothing {
            return Ok(Caller::Anyone);
        }
        if self.certificates_required && !shown.member {
            return Err(unauthenticated(
                "a certificate of the cluster is needed (router.client_certificates)",
            ));
        }
        match (&self.keys, shown.key) {
            (Some(keys), Some(key)) => by_key(keys, key, need, now_unix_s),
            (None, Some(_) | None) | (Some(_), None) if shown.member => Ok(Caller::Admin),
            (Some(_), None) => Err(unauthenticated(match need {
                Need::Nothing | Need::Client => "no API key was given: send it as Authorization: Bearer KEY",
                Need::Admin => "an administrator's API key or a certificate of the cluster is needed",
            })),
            (None, _) if self.tls && need == Need::Admin => {
                Err(unauthenticated("a certificate of the cluster is needed"))
            }
            (None, _) => Ok(Caller::Anyone),
        }
    }
}

fn by_key(keys: &Keys, key: &str, need: Need, now_unix_s: u64) -> Result<Caller, Error> {
    let entry = keys
        .find(key)
        .ok_or_else(|| unauthenticated("the API key is not known"))?;
    if entry.expires_unix_s.is_some_and(|end| end <= now_unix_s) {
        return Err(unauthenticated("the API key has expired"));
    }
    match (entry.role, need) {
        (KeyRole::Admin, _) => Ok(Caller::Admin),
        (KeyRole::Client, Need::Client | Need::Nothing) => Ok(Caller::Tenant(entry.tenant.clone())),
        (KeyRole::Client, Need::Admin) => Err(Error::new(
            ErrorCode::Denied,
            "the API key is a client's, but this call needs an administrator's",
        )),
    }
}

fn unauthenticated(message: &str) -> Error {
    Error::new(ErrorCode::Unauthenticated, message)
}

#[cfg(test)]
mod tests;
