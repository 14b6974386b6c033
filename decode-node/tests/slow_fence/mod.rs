//! A transport whose fences close only when the test lets them, as over hardware that takes long to settle.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::Instant;
use transfer::{
    RegionId, RemoteRegion, StatsSnapshot, TcpTransport, TransferBatch, TransferError, TransferStats,
    Transport,
};
use types::{Epoch, Memory};

pub(crate) struct SlowFence {
    inner: Arc<TcpTransport>,
    open: watch::Sender<bool>,
    revocations: AtomicUsize,
}

impl SlowFence {
    pub(crate) fn new(inner: Arc<TcpTransport>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            open: watch::Sender::new(false),
            revocations: AtomicUsize::new(0),
        })
    }

    pub(crate) fn let_fences_close(&self) {
        self.open.send_replace(true);
    }

    pub(crate) fn revocations(&self) -> usize {
        self.revocations.load(Ordering::Relaxed)
    }
}

impl Transport for SlowFence {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn endpoint(&self) -> String {
        self.inner.endpoint()
    }

    fn epoch(&self) -> Epoch {
        self.inner.epoch()
    }

    fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError> {
        self.inner.register(memory)
    }

    fn unregister(&self, region: RegionId) -> BoxFuture<'static, ()> {
        self.inner.unregister(region)
    }

    fn expose_read(&self, region: RegionId) -> Result<RemoteRegion, TransferError> {
        self.inner.expose_read(region)
    }

    fn grant_write(&self, region: RegionId, ranges: Vec<Range<u64>>) -> Result<RemoteRegion, TransferError> {
        self.inner.grant_write(region, ranges)
    }

    fn revoke(&self, grant: &RemoteRegion) -> BoxFuture<'static, ()> {
        self.revocations.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.subscribe();
        let (inner, grant) = (self.inner.clone(), grant.clone());
        async move {
            open.wait_for(|open| *open).await.expect("the transport lives");
            inner.revoke(&grant).await;
        }
        .boxed()
    }

    fn write(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.inner.write(batch, deadline)
    }

    fn read(
        &self,
        batch: TransferBatch,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<TransferStats, TransferError>> {
        self.inner.read(batch, deadline)
    }

    fn flush(&self, endpoint: &str, deadline: Instant) -> BoxFuture<'static, Result<(), TransferError>> {
        self.inner.flush(endpoint, deadline)
    }

    fn call(
        &self,
        call: transfer::Call,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<transfer::Answered, TransferError>> {
        self.inner.call(call, deadline)
    }

    fn serve_calls(&self, calls: std::sync::Weak<dyn transfer::Calls>) {
        self.inner.serve_calls(calls);
    }

    fn tear_down(&self, endpoint: &str) {
        self.inner.tear_down(endpoint);
    }

    fn stats(&self) -> StatsSnapshot {
        self.inner.stats()
    }
}
