//! The object tier: long-lived prefixes in a bucket that all nodes of a model share, or in a folder.
//!
//! Invariants:
//! - Nothing that comes from a bucket is believed: see [`segment`].
//! - Serving never depends on it. What is asked of it goes through a breaker, has a deadline, and ends in a miss where the bucket is
//!   slow, failing, silent, or holds something else.
//! - It is no part of what a node announces. A bucket belongs to nobody, so no log could be the authority on it: objects are a place to
//!   promote from, and a prompt that might continue there costs one request to find out.
//!
//! Where things are, the pure modules first: [`segment`]: which blocks share an object, and its bytes; [`history`]: which segments
//! are written, and which ones are known to be missing; `http.rs`: what S3 is spoken over.
//!
//! Elsewhere: what moves between the pool and the bucket (`tiers/objects.rs`), the breaker ([`crate::disk::breaker`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout_at;
use types::{BlockHash, ErrorCode};

pub mod history;
mod http;
pub mod segment;

use crate::disk::breaker::{Breaker, Change, Limits, Outcome, Reason};
use crate::disk::throttle::Throttle;
use history::History;
use segment::{Grid, SegmentError};

/// Tries after the first one, within the request's timeout: stores answer 503 where a burst meets a cold partition.
const RETRIES_MAX: usize = 2;
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// What can be set of an object tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `file:///folder` or `s3://bucket/prefix`.
    pub url: String,
    /// Bounds of use.
    pub bounds: Bounds,
}

/// How a bucket is used, and when it is passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes per second that are written at most; 0 is no bound.
    pub write_rate_max: u64,
    /// Requests under way at a time, at least 1; each one holds a segment in memory.
    pub requests_max: usize,
    /// Longest time of a request to the bucket, and of a prompt that waits for blocks from there.
    pub timeout: Duration,
    /// Requests that had a segment before it is written, the one that computed it included.
    pub uses_min: u32,
    /// How long a segment that was not there is not asked for again.
    pub missing_ttl: Duration,
    /// Errors in a row after which the bucket is passed over.
    pub errors_max: u32,
    /// First time of a bypass. It doubles with every probe that fails.
    pub bypass_min: Duration,
    /// Longest time of a bypass.
    pub bypass_max: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            // Four segments per second: a tenth of a cent per hour at the usual price of writes.
            write_rate_max: 16 << 20,
            // What it takes to fill 10 Gbit/s with segments of 4 MiB at 30 ms each; 32 MiB of memory.
            requests_max: 8,
            // A healthy bucket answers within a tenth of it.
            timeout: Duration::from_secs(2),
            // Half of all prompts never come again; those that do are what a bucket is for.
            uses_min: 2,
            // Another node that writes a segment is noticed within it.
            missing_ttl: Duration::from_secs(60),
            // As for a disk.
            errors_max: 3,
            // Long against a hiccup.
            bypass_min: Duration::from_secs(5),
            // A bucket that is well again is found within it.
            bypass_max: Duration::from_secs(60),
        }
    }
}

impl Config {
    /// Whether the URL names a place for objects.
    ///
    /// # Errors
    ///
    /// [`OpenError::Url`].
    pub fn check_url(&self) -> Result<(), OpenError> {
        Place::parse(&self.url).map(drop)
    }
}

/// What a URL names.
enum Place<'a> {
    Folder(&'a str),
    Bucket { name: &'a str, prefix: &'a str },
}

impl<'a> Place<'a> {
    fn parse(url: &'a str) -> Result<Self, OpenError> {
        if let Some(folder) = url
            .strip_prefix("file://")
            .filter(|folder| folder.starts_with('/'))
        {
            return Ok(Self::Folder(folder));
        }
        let bucket = url.strip_prefix("s3://").unwrap_or_default();
        let (name, prefix) = bucket.split_once('/').unwrap_or((bucket, ""));
        if name.is_empty() {
            return Err(OpenError::Url { url: url.to_owned() });
        }
        Ok(Self::Bucket { name, prefix })
    }
}

/// Why there is no object tier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Neither a folder nor a bucket.
    #[error("object tier: {url} is no place for objects: use file:///folder or s3://bucket/prefix")]
    Url {
        /// What was given.
        url: String,
    },
    /// The store's words.
    #[error("object tier: {url}: {reason}")]
    Store {
        /// What was given.
        url: String,
        /// The store's words.
        reason: String,
    },
}

impl OpenError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Url { .. } | Self::Store { .. } => ErrorCode::Invalid,
        }
    }
}

impl From<OpenError> for types::Error {
    fn from(error: OpenError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Why the bucket did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ObjectError {
    /// It is passed over at the moment.
    #[error("the bucket is passed over")]
    Bypassed,
    /// It did not answer in time.
    #[error("the bucket did not answer in time")]
    Timeout,
    /// The store's words.
    #[error("{0}")]
    Store(#[from] object_store::Error),
    /// What it gave is no good.
    #[error("{0}")]
    Segment(#[from] SegmentError),
}

/// A bucket in use. Clones are handles of the same one.
#[derive(Clone)]
pub struct Objects {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn ObjectStore>,
    /// Where this space's segments are.
    folder: Path,
    /// Requests that are dropped end at once; those of a folder are threads that wait for the file system.
    ends_when_dropped: bool,
    grid: Grid,
    bounds: Bounds,
    permits: Arc<Semaphore>,
    breaker: Mutex<Breaker>,
    throttle: Mutex<Throttle>,
    history: Mutex<History>,
}

impl Objects {
    /// Opens a folder or a bucket for the space with this root. A bucket is not asked for anything yet, and its credentials come from the
    /// environment: `AWS_ACCESS_KEY_ID` and the like.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(config: &Config, root: BlockHash, block_bytes: usize) -> Result<Self, OpenError> {
        let url = &config.url;
        let fail = |error: &dyn std::fmt::Display| OpenError::Store {
            url: url.clone(),
            reason: error.to_string(),
        };
        let grid = Grid::new(root, block_bytes);
        let bounds = config.bounds.clone();
        let (bucket, prefix) = match Place::parse(url)? {
            Place::Folder(folder) => {
                std::fs::create_dir_all(folder).map_err(|error| fail(&error))?;
                let store = LocalFileSystem::new_with_prefix(folder).map_err(|error| fail(&error))?;
                return Ok(Self::on(Arc::new(store), "", false, bounds, grid));
            }
            Place::Bucket { name, prefix } => (name, prefix),
        };
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: RETRY_AFTER,
                ..BackoffConfig::default()
            },
            max_retries: RETRIES_MAX,
            retry_timeout: bounds.timeout,
        };
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_http_connector(http::Connector)
            .with_retry(retry)
            .build()
            .map_err(|error| fail(&error))?;
        Ok(Self::on(Arc::new(store), prefix, true, bounds, grid))
    }

    /// The segments below `prefix` of any store.
    pub(crate) fn on(
        store: Arc<dyn ObjectStore>,
        prefix: &str,
        ends_when_dropped: bool,
        bounds: Bounds,
        grid: Grid,
    ) -> Self {
        let limits = Limits {
            errors_max: bounds.errors_max,
            // Requests of a bucket end by their own timeout, which counts as an error.
            stall_max: 2 * bounds.timeout,
            // What is too slow does not come in time.
            rate_min: 0,
            bypass_min: bounds.bypass_min,
            bypass_max: bounds.bypass_max,
        };
        // One folder per space: what a model left that is not used any more can be removed as a whole.
        let folder = Path::from(prefix).join(grid.root().to_string());
        Self {
            inner: Arc::new(Inner {
                store,
                folder,
                ends_when_dropped,
                permits: Arc::new(Semaphore::new(bounds.requests_max.max(1))),
                breaker: Mutex::new(Breaker::new(limits)),
                throttle: Mutex::new(Throttle::new(bounds.write_rate_max)),
                history: Mutex::new(History::new(grid, bounds.uses_min, bounds.missing_ttl)),
                grid,
                bounds,
            }),
        }
    }

    /// How chains are cut into segments.
    pub fn grid(&self) -> Grid {
        self.inner.grid
    }

    /// How the bucket is used.
    pub fn bounds(&self) -> &Bounds {
        &self.inner.bounds
    }

    /// Whether the bucket is asked for anything at the moment.
    pub fn is_usable(&self) -> bool {
        self.breaker().allows_reads()
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        // A guess at worst, so a panic in between does no harm.
        lock(&self.inner.history)
    }

    /// The object with this name, if there is one. One that cannot be a segment is not read.
    pub(crate) async fn get(&self, name: BlockHash) -> Result<Option<Bytes>, ObjectError> {
        let (store, path) = (self.inner.store.clone(), self.path(name));
        let expected = self.inner.grid.object_bytes();
        let answer = self.ask(async move {
            let found = match store.get(&path).await {
                Err(object_store::Error::NotFound { .. }) => return Ok((None, 0)),
                found => found?,
            };
            if found.meta.size != expected {
                return Ok((Some(Err(found.meta.size)), 0));
            }
            let bytes = found.bytes().await?;
            let moved = bytes.len() as u64;
            Ok((Some(Ok(bytes)), moved))
        });
        match answer.await? {
            Some(Err(found)) => Err(SegmentError::Length { found, expected }.into()),
            Some(Ok(bytes)) => Ok(Some(bytes)),
            None => Ok(None),
        }
    }

    /// Whether there is an object with this name that could be a segment.
    pub(crate) async fn contains(&self, name: BlockHash) -> Result<bool, ObjectError> {
        let (store, path) = (self.inner.store.clone(), self.path(name));
        let expected = self.inner.grid.object_bytes();
        let asking = async move {
            match store.head(&path).await {
                Ok(meta) => Ok((meta.size == expected, 0)),
                Err(object_store::Error::NotFound { .. }) => Ok((false, 0)),
                Err(error) => Err(error),
            }
        };
        self.ask(asking).await
    }

    /// Writes an object, in place of what may be there.
    pub(crate) async fn put(&self, name: BlockHash, parts: Vec<Bytes>) -> Result<(), ObjectError> {
        let (store, path) = (self.inner.store.clone(), self.path(name));
        let payload: PutPayload = parts.into_iter().collect();
        let bytes = payload.content_length() as u64;
        self.ask(async move { store.put(&path, payload).await.map(|_| ((), bytes)) })
            .await
    }

    /// Waits until another segment may be written without exceeding the rate.
    pub(crate) async fn pace_write(&self) {
        let wait = lock(&self.inner.throttle).take(self.inner.grid.object_bytes(), now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Notices a bucket that is silent, and tries one that is passed over. Call it every now and then within the runtime.
    pub(crate) fn check(&self) {
        let change = self.breaker().check(now());
        report(change, "it does not answer");
        if !self.breaker().begin_probe(now()) {
            return;
        }
        let objects = self.clone();
        let started = now();
        // One at a time, and bounded as every request; the breaker waits for its outcome.
        tokio::spawn(async move {
            let (store, path) = (
                objects.inner.store.clone(),
                objects.path(objects.inner.grid.root()),
            );
            // The root is no block: an empty answer from a bucket that is well.
            let probing = async move {
                match store.head(&path).await {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(((), 0)),
                    Err(error) => Err(error),
                }
            };
            let result = objects.bounded(Box::pin(probing)).await;
            let cause = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let moved = result.is_ok().then_some(0);
            let change = objects.breaker().probed(moved, now() - started, now());
            report(Some(change), &cause);
        });
    }

    /// Makes one request within the bounds, and tells the breaker how it went, also where the caller has stopped waiting. Gives what
    /// `request` gives; the second value is how many bytes it moved.
    async fn ask<T: Send + 'static>(
        &self,
        request: impl Future<Output = object_store::Result<(T, u64)>> + Send + 'static,
    ) -> Result<T, ObjectError> {
        let deadline = tokio::time::Instant::now() + self.inner.bounds.timeout;
        if !self.is_usable() {
            return Err(ObjectError::Bypassed);
        }
        let permit = timeout_at(deadline, self.inner.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| ObjectError::Timeout)?;
        let permit = permit.map_err(|_| ObjectError::Bypassed)?;
        // Those who waited behind the failure are not to repeat it.
        if !self.is_usable() {
            return Err(ObjectError::Bypassed);
        }
        let (answer_tx, answer_rx) = oneshot::channel();
        let objects = self.clone();
        objects.breaker().begin(now());
        // Bounded by its permit: a request that nobody waits for any more still says whether the bucket is well.
        tokio::spawn(async move {
            let result = objects.bounded(Box::pin(request)).await;
            let (outcome, cause) = match &result {
                Ok((_, bytes)) => (Outcome::Moved(*bytes), String::new()),
                Err(error) => (Outcome::Failed, error.to_string()),
            };
            let change = objects.breaker().end(outcome, now());
            report(change, &cause);
            drop(permit);
            // Nobody may be waiting.
            let _ = answer_tx.send(result.map(|(answer, _)| answer));
        });
        match timeout_at(deadline, answer_rx).await {
            Ok(Ok(answer)) => answer,
            // The runtime ends.
            Ok(Err(_)) => Err(ObjectError::Bypassed),
            Err(_) => Err(ObjectError::Timeout),
        }
    }

    /// Ends a request with its timeout, where ending it frees what it holds. A thread that waits for a file system goes on, and so does
    /// its permit: the breaker finds it stalled.
    async fn bounded<T>(
        &self,
        request: BoxFuture<'static, object_store::Result<T>>,
    ) -> Result<T, ObjectError> {
        if !self.inner.ends_when_dropped {
            return Ok(request.await?);
        }
        let answer = tokio::time::timeout(self.inner.bounds.timeout, request).await;
        Ok(answer.map_err(|_| ObjectError::Timeout)??)
    }

    /// Spread over folders, since file systems are slow with very large ones.
    fn path(&self, name: BlockHash) -> Path {
        let name = name.to_string();
        self.inner.folder.clone().join(&name[..2]).join(name)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        lock(&self.inner.breaker)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is valid after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clock that tests may pause.
fn now() -> Instant {
    crate::store::now()
}

/// One line per change.
fn report(change: Option<Change>, cause: &str) {
    match change {
        Some(Change::Bypassed(reason, time)) => {
            let seconds = time.as_secs_f32();
            match reason {
                Reason::Errors => tracing::warn!(seconds, cause, "object tier bypassed: the bucket fails"),
                Reason::Slow { .. } | Reason::Stalled => {
                    tracing::warn!(seconds, cause, "object tier bypassed: the bucket does not answer");
                }
            }
        }
        Some(Change::Restored) => tracing::info!("object tier in use again"),
        Some(Change::WritesHeld(_)) | None => {}
    }
}

#[cfg(test)]
mod tests;
