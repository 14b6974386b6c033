//! The live page: what the cluster does now, in a browser.
//!
//! It is read-only and shows nothing of what clients say. Everything it needs is in the binary, and its policy forbids it to load
//! anything from elsewhere.
//!
//! Invariants:
//! - a snapshot is made at most every [`INTERVAL`] however many look, and none while nobody does;
//! - at most [`VIEWERS_MAX`] pages are open at a time.
//!
//! Elsewhere: what a snapshot is (`ui/snapshot.rs`), the page itself (`router/ui`).

mod snapshot;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use types::{NodeId, RequestId};

use crate::dispatch::Dispatcher;
use snapshot::Snapshot;

/// How often a page is told what is new: a request shows within a second.
const INTERVAL: Duration = Duration::from_millis(500);
/// Pages that are open at a time. Each costs some 100 KiB per second.
const VIEWERS_MAX: usize = 16;

/// What the page may do: show itself, and ask the router that it is from.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'",
);

const PAGE: Asset = Asset {
    content_type: "text/html; charset=utf-8",
    text: include_str!("../ui/index.html"),
};
const SCRIPT: Asset = Asset {
    content_type: "text/javascript; charset=utf-8",
    text: include_str!("../ui/app.js"),
};
const CHARTS: Asset = Asset {
    content_type: "text/javascript; charset=utf-8",
    text: include_str!("../ui/draw.js"),
};
const STYLE: Asset = Asset {
    content_type: "text/css; charset=utf-8",
    text: include_str!("../ui/style.css"),
};
const ICON: Asset = Asset {
    content_type: "image/svg+xml",
    text: include_str!("../ui/icon.svg"),
};

/// A file of the page.
struct Asset {
    content_type: &'static str,
    text: &'static str,
}

/// The page and its events. Clones are one and the same.
#[derive(Debug, Clone)]
pub(crate) struct Ui {
    dispatcher: Dispatcher,
    router: NodeId,
    viewers: Arc<Semaphore>,
    latest: Arc<watch::Sender<Arc<str>>>,
    /// Ends the events, which would end by nothing else.
    shutdown: CancellationToken,
}

impl Ui {
    /// The page of `router`.
    pub(crate) fn new(dispatcher: Dispatcher, router: NodeId, shutdown: CancellationToken) -> Self {
        Self {
            dispatcher,
            router,
            viewers: Arc::new(Semaphore::new(VIEWERS_MAX)),
            latest: Arc::new(watch::Sender::new(Arc::from(""))),
            shutdown,
        }
    }

    /// Its routes; none, if it is not to be served.
    pub(crate) fn routes(&self) -> Router {
        if !self.dispatcher.config().ui {
            return Router::new();
        }
        Router::new()
            .route("/ui", get(|| async { PAGE }))
            .route("/ui/app.js", get(|| async { SCRIPT }))
            .route("/ui/draw.js", get(|| async { CHARTS }))
            .route("/ui/style.css", get(|| async { STYLE }))
            .route("/ui/icon.svg", get(|| async { ICON }))
            .route("/ui/events", get(events))
            .route("/ui/requests/{id}", get(request))
            .with_state(self.clone())
    }

    /// Makes snapshots for whoever looks, until `shutdown`.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
            if self.latest.receiver_count() > 0 {
                self.latest.send_replace(self.snapshot());
            }
        }
    }

    fn snapshot(&self) -> Arc<str> {
        let snapshot = Snapshot::take(&self.dispatcher, &self.router);
        let text = serde_json::to_string(&snapshot).expect("a snapshot has string keys only");
        text.into()
    }
}

impl IntoResponse for Asset {
    fn into_response(self) -> Response {
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static(self.content_type)),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (
                header::X_CONTENT_TYPE_OPTIONS,
                HeaderValue::from_static("nosniff"),
            ),
            (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            // Another version of the router has other files.
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        ];
        (headers, self.text).into_response()
    }
}

/// One who looks.
struct Viewer {
    news: watch::Receiver<Arc<str>>,
    /// What the page shows at first, before there are news.
    first: Option<Arc<str>>,
    shutdown: CancellationToken,
    _place: OwnedSemaphorePermit,
}

async fn events(State(ui): State<Ui>) -> Response {
    let Ok(place) = ui.viewers.clone().try_acquire_owned() else {
        let message = format!("{VIEWERS_MAX} pages are open already");
        return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    };
    let viewer = Viewer {
        news: ui.latest.subscribe(),
        first: Some(ui.snapshot()),
        shutdown: ui.shutdown.clone(),
        _place: place,
    };
    let events = stream::unfold(viewer, |mut viewer| async move {
        let snapshot = viewer.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(&*snapshot)), viewer))
    });
    let mut response = Sse::new(events).into_response();
    // A proxy that buffers would hold back what is new.
    let headers = response.headers_mut();
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl Viewer {
    async fn next(&mut self) -> Option<Arc<str>> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        tokio::select! {
            // A router that ends waits for nobody who only looks.
            biased;
            () = self.shutdown.cancelled() => None,
            changed = self.news.changed() => {
                changed.ok()?;
                Some(self.news.borrow_and_update().clone())
            }
        }
    }
}

async fn request(State(ui): State<Ui>, Path(id): Path<String>) -> Response {
    let found = RequestId::parse(&id).map(|id| ui.dispatcher.requests().of_id(id));
    match found.and_then(|found| found.into_iter().next()) {
        Some(found) => axum::Json(snapshot::Request::whole(&found)).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
