//! Connections to peers.
//!
//! Invariant: every channel pings its peer over HTTP/2, also while idle. Without that a channel whose peer
//! vanished behind a partition waits for TCP to give up, which takes many minutes, and stays dead long after the
//! partition has healed.
//!
//! Deadlines are each call's own; see the `client` crate for calls that have them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use types::Error;

/// A peer in the same cluster answers in milliseconds; a host that is gone does not answer at all.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a quiet connection is probed.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a probe may go unanswered before every call on the connection fails. Long enough for a machine whose
/// cores are all busy computing.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Channels that [`Channels`] keeps. A larger cluster still works; its coldest peers are reconnected to.
pub const CHANNELS_MAX: usize = 1024;

/// When a connection counts as dead.
#[derive(Debug, Clone, Copy)]
struct KeepAlive {
    interval: Duration,
    timeout: Duration,
}

const KEEP_ALIVE: KeepAlive = KeepAlive {
    interval: KEEP_ALIVE_INTERVAL,
    timeout: KEEP_ALIVE_TIMEOUT,
};

/// A channel to `endpoint`, which is `host:port` or an `http://` URL. Connects at its first call, and again by
/// itself after it broke.
///
/// # Errors
///
/// [`types::ErrorCode::Invalid`] if the endpoint cannot be an address. An unreachable peer is the first call's error.
pub fn channel(endpoint: &str) -> Result<Channel, Error> {
    Ok(configure(endpoint, KEEP_ALIVE)?.connect_lazy())
}

fn configure(endpoint: &str, keep_alive: KeepAlive) -> Result<Endpoint, Error> {
    let refuse = |reason: &dyn std::fmt::Display| {
        Error::invalid(
            "endpoint",
            format!("endpoint {endpoint:?} is not host:port: {reason}"),
        )
    };
    if endpoint.starts_with("https://") {
        return Err(refuse(&"TLS between nodes is not supported"));
    }
    let address = endpoint.strip_prefix("http://").unwrap_or(endpoint);
    let address = address.strip_suffix('/').unwrap_or(address);
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0) => {}
        Some(_) | None => return Err(refuse(&"a host and a port from 1 to 65535 are needed")),
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| refuse(&error))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(keep_alive.interval)
        .keep_alive_timeout(keep_alive.timeout)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

/// Channels by endpoint, shared by all that call peers in this process: clones share one set. Holds at most
/// [`CHANNELS_MAX`] and lets go of the one that was unused for longest; calls that run on it go on.
#[derive(Debug, Clone)]
pub struct Channels {
    shared: Arc<Mutex<Cache>>,
}

#[derive(Debug)]
struct Cache {
    capacity: usize,
    /// Counts lookups, so that the entry with the smallest mark is the one unused for longest.
    clock: u64,
    entries: HashMap<String, (Channel, u64)>,
}

impl Default for Channels {
    fn default() -> Self {
        Self::with_capacity(CHANNELS_MAX)
    }
}

impl Channels {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty set that holds at most `capacity` channels, at least one.
    pub fn with_capacity(capacity: usize) -> Self {
        let cache = Cache {
            capacity: capacity.max(1),
            clock: 0,
            entries: HashMap::new(),
        };
        Self {
            shared: Arc::new(Mutex::new(cache)),
        }
    }

    /// The channel to `endpoint`, made if there is none.
    ///
    /// # Errors
    ///
    /// As [`channel`]. Must be called within a tokio runtime.
    pub fn get(&self, endpoint: &str) -> Result<Channel, Error> {
        let mut cache = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        cache.clock += 1;
        let now = cache.clock;
        if let Some((channel, used)) = cache.entries.get_mut(endpoint) {
            *used = now;
            return Ok(channel.clone());
        }
        let channel = channel(endpoint)?;
        if cache.entries.len() >= cache.capacity {
            cache.drop_coldest();
        }
        cache.entries.insert(endpoint.to_owned(), (channel.clone(), now));
        Ok(channel)
    }

    /// Lets go of the channel to a peer that has left.
    pub fn forget(&self, endpoint: &str) {
        let mut cache = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        cache.entries.remove(endpoint);
    }

    /// Channels held.
    pub fn len(&self) -> usize {
        let cache = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        cache.entries.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Cache {
    fn drop_coldest(&mut self) {
        let coldest = self.entries.iter().min_by_key(|(_, (_, used))| *used);
        if let Some(endpoint) = coldest.map(|(endpoint, _)| endpoint.clone()) {
            self.entries.remove(&endpoint);
        }
    }
}

#[cfg(test)]
mod tests;
