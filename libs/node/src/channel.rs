//! Connections to peers.
//!
//! Invariant: every channel pings its peer over HTTP/2, also while idle. Without that a channel whose peer
//! vanished behind a partition waits for TCP to give up, which takes many minutes, and stays dead long after the
//! partition has healed.
//!
//! A [`Connector`] says how: over TLS or not, and with which key. A process makes one, and all its channels from it.
//!
//! Deadlines are each call's own; see the `client` crate for calls that have them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{self, Endpoint, Uri};
use tonic::{Request, Status};
use types::Error;

use crate::tls::Tls;
use crate::tls::connect::Target;

/// A peer in the same cluster answers in milliseconds; a host that is gone does not answer at all.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a quiet connection is probed.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a probe may go unanswered before every call on the connection fails. Long enough for a machine whose
/// cores are all busy computing.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Channels that [`Channels`] keeps. A larger cluster still works; its coldest peers are reconnected to.
pub const CHANNELS_MAX: usize = 1024;

/// What the URL of an endpoint begins with.
const PLAIN: &str = "http://";
/// Likewise, over TLS.
const SECURE: &str = "https://";

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

/// A connection to a process, which is made when it is first used, and again when it broke. Clones share it.
pub type Channel = InterceptedService<transport::Channel, Credentials>;

/// What every call of a channel carries: the key of its caller, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Credentials(Option<MetadataValue<Ascii>>);

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = &self.0 {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

/// The secret that a client shows to a router. Never shown otherwise.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key as it was given to a client.
    ///
    /// # Errors
    ///
    /// It is empty, or no header can carry it.
    pub fn new(key: impl Into<String>) -> Result<Self, Error> {
        let key = key.into();
        match key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Err(Error::invalid(
                "api_key",
                "the API key is not printable ASCII without spaces",
            )),
            false => Ok(Self(key)),
        }
    }

    /// The key, for the header of a request.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// How a process connects to others. The default is without TLS and without a key.
#[derive(Debug, Clone, Default)]
pub struct Connector {
    tls: Option<Tls>,
    credentials: Credentials,
}

impl Connector {
    /// Connects with `tls`, if there is any.
    pub fn new(tls: Option<Tls>) -> Self {
        Self {
            tls,
            credentials: Credentials::default(),
        }
    }

    /// Shows this key with every call.
    #[must_use]
    pub fn with_key(mut self, key: &ApiKey) -> Self {
        let bearer = MetadataValue::try_from(format!("Bearer {}", key.secret()));
        let mut bearer = bearer.expect("an API key is printable ASCII");
        bearer.set_sensitive(true);
        self.credentials = Credentials(Some(bearer));
        self
    }

    /// What it connects with.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// A channel to `endpoint`: `host:port`, or a URL of it. Who has TLS uses it with everyone; who has none uses it for `https://`, and
    /// then trusts whom this machine trusts.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`] if the endpoint cannot be an address, or names another scheme than there is TLS for. An unreachable
    /// peer is the first call's error. Must be called within a tokio runtime.
    pub fn channel(&self, endpoint: &str) -> Result<Channel, Error> {
        let configured = configure(endpoint, KEEP_ALIVE)?;
        let secure = endpoint.starts_with(SECURE);
        if self.tls.is_some() && endpoint.starts_with(PLAIN) {
            return Err(refuse(endpoint, &"TLS is set up, and http is without"));
        }
        let channel = match secure || self.tls.is_some() {
            false => configured.connect_lazy(),
            true => {
                let target = Target::new(endpoint, self.tls.as_ref())?;
                let connect = move |_: Uri| target.clone().connect_for_channel();
                // A proxy in between may hold requests over TLS to their scheme.
                configured
                    .origin(origin(endpoint)?)
                    .connect_with_connector_lazy(tower::service_fn(connect))
            }
        };
        Ok(InterceptedService::new(channel, self.credentials.clone()))
    }
}

/// A channel without TLS to `endpoint`, as [`Connector::channel`].
///
/// # Errors
///
/// As there.
pub fn channel(endpoint: &str) -> Result<Channel, Error> {
    Connector::default().channel(endpoint)
}

fn refuse(endpoint: &str, reason: &dyn fmt::Display) -> Error {
    Error::invalid(
        "endpoint",
        format!("endpoint {endpoint:?} is not host:port: {reason}"),
    )
}

/// The address within an endpoint.
fn address(endpoint: &str) -> Result<&str, Error> {
    let address = endpoint.strip_prefix(PLAIN).or(endpoint.strip_prefix(SECURE));
    let address = address.unwrap_or(endpoint);
    let address = address.strip_suffix('/').unwrap_or(address);
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0) => {
            Ok(address)
        }
        Some(_) | None => Err(refuse(endpoint, &"a host and a port from 1 to 65535 are needed")),
    }
}

/// The two parts of an endpoint's address, the host as names are looked up: without the brackets of IPv6.
pub(crate) fn host_and_port(endpoint: &str) -> Result<(String, u16), Error> {
    let (host, port) = address(endpoint)?
        .rsplit_once(':')
        .expect("an address has a port");
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let port = port.parse().expect("an address has a port");
    Ok((bare.unwrap_or(host).to_owned(), port))
}

/// What requests over TLS name as their target.
fn origin(endpoint: &str) -> Result<Uri, Error> {
    let origin = format!("{SECURE}{}", address(endpoint)?);
    origin.parse().map_err(|error| refuse(endpoint, &error))
}

fn configure(endpoint: &str, keep_alive: KeepAlive) -> Result<Endpoint, Error> {
    let address = address(endpoint)?;
    let configured = Endpoint::from_shared(format!("{PLAIN}{address}"));
    let configured = configured.map_err(|error| refuse(endpoint, &error))?;
    Ok(configured
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
    connector: Connector,
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
        Self::over(Connector::default())
    }
}

impl Channels {
    /// An empty set of channels without TLS.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty set of channels that `connector` makes.
    pub fn over(connector: Connector) -> Self {
        Self::with_capacity(connector, CHANNELS_MAX)
    }

    /// An empty set that holds at most `capacity` channels, at least one.
    pub fn with_capacity(connector: Connector, capacity: usize) -> Self {
        let cache = Cache {
            capacity: capacity.max(1),
            clock: 0,
            entries: HashMap::new(),
        };
        Self {
            connector,
            shared: Arc::new(Mutex::new(cache)),
        }
    }

    /// The channel to `endpoint`, made if there is none.
    ///
    /// # Errors
    ///
    /// As [`Connector::channel`]. Must be called within a tokio runtime.
    pub fn get(&self, endpoint: &str) -> Result<Channel, Error> {
        let mut cache = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        cache.clock += 1;
        let now = cache.clock;
        if let Some((channel, used)) = cache.entries.get_mut(endpoint) {
            *used = now;
            return Ok(channel.clone());
        }
        let channel = self.connector.channel(endpoint)?;
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
