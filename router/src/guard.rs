//! Holds the two front doors to `access.rs`, with the keys as their file has them.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use node::reload::{self, Contents};
use node::serve::Peer;
use proto::status::to_status;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use types::{Error, ErrorCode};

use crate::access::keys::Keys;
use crate::access::{Caller, Need, Policy, Shown, need};
use crate::config::{ClientCertificates, Config};
use crate::dispatch::Dispatcher;
use crate::openai;

/// Who may call. Clones are one and the same.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The file of keys and what it held when it was first read.
    file: Option<(PathBuf, Contents)>,
    policy: RwLock<Policy>,
}

impl Guard {
    /// Reads the keys, if there are any. Blocks for as long as that takes. `tls` says whether members show certificates.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or something else stands in it.
    pub fn new(config: &Config, tls: bool) -> Result<Self, Error> {
        let mut policy = Policy {
            keys: None,
            tls,
            certificates_required: config.client_certificates == ClientCertificates::Required,
        };
        let mut file = None;
        if !config.api_keys_file.is_empty() {
            let path = PathBuf::from(&config.api_keys_file);
            let contents = reload::read(std::slice::from_ref(&path))?;
            policy.keys = Some(parse(&path, &contents)?);
            file = Some((path, contents));
        }
        Ok(Self {
            shared: Arc::new(Shared {
                file,
                policy: RwLock::new(policy),
            }),
        })
    }

    /// Reads the keys again when their file changes, until `until`.
    pub async fn follow(self, until: CancellationToken) -> Result<(), Infallible> {
        let Some((path, known)) = self.shared.file.clone() else {
            return Ok(());
        };
        let apply = |contents: &Contents| {
            let keys = parse(&path, contents)?;
            let mut policy = self.shared.policy.write().unwrap_or_else(PoisonError::into_inner);
            policy.keys = Some(keys);
            Ok(())
        };
        reload::follow("API keys", vec![path.clone()], known, until, apply).await
    }

    fn admit(&self, need: Need, key: Option<&str>, peer: Option<Peer>) -> Result<Caller, Error> {
        let shown = Shown {
            key,
            member: peer.is_some_and(|peer| peer.member),
        };
        let now_unix_s = node::clock::unix_s(SystemTime::now());
        let policy = self.shared.policy.read().unwrap_or_else(PoisonError::into_inner);
        policy.admit(need, shown, now_unix_s)
    }
}

fn parse(path: &std::path::Path, contents: &Contents) -> Result<Keys, Error> {
    let name = path.display();
    let text = contents.first().and_then(|bytes| std::str::from_utf8(bytes).ok());
    let text = text.ok_or_else(|| Error::new(ErrorCode::Invalid, format!("{name} is not UTF-8")))?;
    Keys::parse(text).map_err(|error| Error::new(error.code, format!("{name}, {}", error.message)))
}

/// The secret of `Authorization: Bearer`. Schemes are spelt in any case.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, secret) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
}

/// The password of `Authorization: Basic`, whoever's it is: a browser asks its user for one, and cannot be told a key otherwise.
fn password(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, credentials) = value.split_once(' ')?;
    let basic = scheme.eq_ignore_ascii_case("basic");
    let credentials = basic.then(|| STANDARD.decode(credentials.trim()).ok())??;
    let (_, password) = std::str::from_utf8(&credentials).ok()?.split_once(':')?;
    Some(password.to_owned())
}

/// What both doors need to judge a request, and to count it if it is refused.
#[derive(Debug, Clone)]
struct Door {
    guard: Guard,
    dispatcher: Dispatcher,
}

impl Door {
    /// Lets the request in with its caller among its extensions.
    fn open(&self, need: Need, peer: Option<Peer>, request: &mut Request) -> Result<(), Error> {
        let caller = self.guard.admit(need, bearer(request.headers()), peer);
        self.enter(caller, request)
    }

    /// The same for a browser, which may show the key as a password.
    fn open_page(&self, peer: Option<Peer>, request: &mut Request) -> Result<(), Error> {
        let headers = request.headers();
        let key = bearer(headers).map(str::to_owned).or_else(|| password(headers));
        let caller = self.guard.admit(Need::Admin, key.as_deref(), peer);
        self.enter(caller, request)
    }

    fn enter(&self, caller: Result<Caller, Error>, request: &mut Request) -> Result<(), Error> {
        let caller = caller.inspect_err(|error| self.dispatcher.refused(error.code))?;
        request.extensions_mut().insert(caller);
        Ok(())
    }
}

/// These services, each call for those who may make it.
pub(crate) fn grpc(routes: Routes, guard: Guard, dispatcher: Dispatcher) -> Routes {
    let door = Door { guard, dispatcher };
    let routes = routes.into_axum_router();
    routes
        .layer(middleware::from_fn_with_state(door, grpc_call))
        .into()
}

async fn grpc_call(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    match door.open(need(request.uri().path()), peer, &mut request) {
        Ok(()) => next.run(request).await,
        Err(error) => to_status(&error).into_http::<Body>(),
    }
}

/// These routes of OpenAI's API, for clients.
pub(crate) fn http(routes: axum::Router, guard: Guard, dispatcher: Dispatcher) -> axum::Router {
    let door = Door { guard, dispatcher };
    routes.layer(middleware::from_fn_with_state(door, http_request))
}

/// What is known of the other side of an HTTP connection.
fn http_peer(request: &Request) -> Option<Peer> {
    let info = request.extensions().get::<ConnectInfo<Peer>>();
    info.map(|ConnectInfo(peer)| *peer)
}

async fn http_request(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let peer = http_peer(&request);
    match door.open(Need::Client, peer, &mut request) {
        Ok(()) => next.run(request).await,
        Err(error) => openai::refused(error).into_response(),
    }
}

/// These pages, which show the cluster, for administrators.
pub(crate) fn pages(routes: axum::Router, guard: Guard, dispatcher: Dispatcher) -> axum::Router {
    let door = Door { guard, dispatcher };
    routes.layer(middleware::from_fn_with_state(door, page_request))
}

async fn page_request(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let peer = http_peer(&request);
    match door.open_page(peer, &mut request) {
        Ok(()) => next.run(request).await,
        Err(error) if error.code == ErrorCode::Unauthenticated => {
            let ask = (
                header::WWW_AUTHENTICATE,
                "Basic realm=\"perigee: an administrator's key as password\"",
            );
            ([ask], openai::refused(error)).into_response()
        }
        Err(error) => openai::refused(error).into_response(),
    }
}

/// Who sent a request that came through a door.
pub(crate) fn caller(found: Option<&Caller>) -> Caller {
    found.cloned().expect("a request has come through a door")
}
