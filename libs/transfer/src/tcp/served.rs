//! What peers ask of UCX on this side: links, and bytes that move through them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::time::timeout;

use super::Shared;
use super::link::{Link, Pull};
use super::messages::{Introduced, Introduction, Source, Visit};
use super::server::admit as admitted;
use super::stream::Moved;
use super::wire::{RequestHead, Status};
use crate::ucx::{Addresses, Choice, Exposed, Peer, Ucx, UcxError, Way};

/// Links over which peers have bytes moved here, by the number that names them.
#[derive(Default)]
pub(super) struct Links {
    inner: Mutex<Inner>,
}

/// Keeps a link.
pub(super) struct Lifeline<'a> {
    links: &'a Links,
    id: u64,
}

impl Drop for Lifeline<'_> {
    fn drop(&mut self) {
        self.links.remove(self.id);
    }
}

#[derive(Default)]
struct Inner {
    made: u64,
    by_id: HashMap<u64, Arc<Link>>,
    closed: bool,
}

impl Links {
    /// Forgets the link when the result is dropped: its peer is gone, or has given it up.
    pub(super) fn lifeline(&self, id: u64) -> Lifeline<'_> {
        Lifeline { links: self, id }
    }

    fn remove(&self, id: u64) {
        // Dropped outside of the lock.
        let _link = self.inner().by_id.remove(&id);
    }

    pub(super) fn clear(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        inner.by_id.clear();
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Link>> {
        let link = self.inner().by_id.get(&id).cloned();
        link.filter(|link| link.is_alive())
    }

    fn next_id(&self) -> u64 {
        let mut inner = self.inner();
        inner.made += 1;
        inner.made
    }

    /// Keeps a link. It takes the place of an older one of the same peer, which is an earlier incarnation or has given
    /// the older link up, and of those that broke.
    fn insert(&self, link: Link, limit: usize) -> Result<(), UcxError> {
        let mut inner = self.inner();
        inner
            .by_id
            .retain(|_, known| known.is_alive() && known.endpoint != link.endpoint);
        if inner.closed {
            return Err(UcxError::new("the transport closed".to_owned()));
        }
        if inner.by_id.len() >= limit {
            return Err(UcxError::new(format!("{limit} peers have links already")));
        }
        inner.by_id.insert(link.id, Arc::new(link));
        Ok(())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at what UCX offers for a peer, and makes a link if that is worth it.
pub(super) async fn introduce(shared: &Shared, introduction: Introduction) -> Introduced {
    match make_link(shared, introduction).await {
        Ok(introduced) => introduced,
        Err(error) => {
            tracing::debug!(%error, "a peer gets no ucx link");
            Introduced {
                obstacle: error.to_string(),
                ..Introduced::default()
            }
        }
    }
}

async fn make_link(shared: &Shared, introduction: Introduction) -> Result<Introduced, UcxError> {
    let none = |reason: &String| UcxError::new(format!("the peer has no UCX: {reason}"));
    let ucx = shared.ucx.as_ref().map_err(none)?;
    let memory = introduction
        .memory
        .ok_or_else(|| UcxError::new("an introduction without memory".into()))?;
    let (memory, addresses) = (memory, introduction.workers.unwrap_or_default());
    let same_host = !introduction.host.is_empty() && crate::ucx::host() == Some(introduction.host);
    let within = shared.config.connect_timeout;
    let mut mapped = None;
    if same_host {
        match timeout(within, map(ucx, &addresses, &memory)).await {
            Ok(Ok(peer)) => mapped = Some(peer),
            Ok(Err(error)) => tracing::debug!(%error, "a peer on this host cannot be mapped"),
            Err(_) => tracing::debug!("a peer on this host could not be mapped in time"),
        }
    }
    let peer = match mapped {
        Some(peer) => peer,
        None => {
            let forced = introduction.forced || shared.config.ucx.choice == Choice::Ucx;
            timeout(within, reach(ucx, &addresses, forced))
                .await
                .map_err(|_| UcxError::new(format!("UCX did not connect within {within:?}")))??
        }
    };
    let (lanes, by_mapping) = (peer.lanes().to_vec(), peer.way() == Way::Shared);
    let id = shared.served_links.next_id();
    let link = Link::new(id, introduction.endpoint, lanes.clone(), Arc::new(peer));
    shared.served_links.insert(link, shared.config.peers_max.get())?;
    Ok(Introduced {
        link: id,
        workers: Some(ucx.addresses().clone()),
        shared: by_mapping,
        lanes,
        obstacle: String::new(),
    })
}

/// A peer on this host, if its memory can be mapped.
async fn map(ucx: &Ucx, addresses: &Addresses, memory: &Exposed) -> Result<Peer, UcxError> {
    let peer = ucx.connect(Way::Shared, addresses).await?;
    if peer.open(memory).await?.is_mapped() {
        return Ok(peer);
    }
    Err(UcxError::new(
        "its memory is not of a kind that can be mapped".to_owned(),
    ))
}

/// A peer over a network that is better than TCP, or any if that is forced.
async fn reach(ucx: &Ucx, addresses: &Addresses, forced: bool) -> Result<Peer, UcxError> {
    let nothing = |why: String| {
        UcxError::new(format!(
            "UCX has nothing better than TCP between the two nodes: neither can they map each other's memory, nor do \
             they share a network that it knows ({why})"
        ))
    };
    let peer = ucx.connect(Way::Network, addresses).await;
    let peer = peer.map_err(|error| nothing(error.to_string()))?;
    if forced || peer.offers_more_than_tcp() {
        return Ok(peer);
    }
    Err(nothing(peer.lanes().join(", ")))
}

/// Moves bytes of a peer into granted memory.
pub(super) async fn fetch(
    shared: &Shared,
    head: &RequestHead,
    slices: &[(u64, u64)],
    source: Source,
    gone: impl Fn() -> bool,
) -> Status {
    let grant = match admitted(shared, head, slices) {
        Ok(grant) => grant,
        Err(status) => return status,
    };
    let Some(link) = shared.served_links.get(source.link) else {
        return Status::NoLink;
    };
    let (Some(memory), true) = (source.memory, source.offsets.len() == slices.len()) else {
        return Status::NotMoved;
    };
    let runs = source.offsets.iter().zip(slices);
    let runs: Vec<_> = runs.map(|(from, (to, bytes))| (*from, *to, *bytes)).collect();
    let moved = async {
        let window = link.window(&memory).await?;
        let pull = Pull {
            window: &window,
            memory: grant.memory(),
            runs: &runs,
            grant: Some(&grant),
            keep: Default::default(),
            digest: None,
        };
        link.pull(pull, gone).await
    };
    match moved.await {
        Ok(Moved::All) => Status::Done,
        Ok(Moved::Revoked) => Status::UnknownKey,
        Err(error) => {
            tracing::debug!(peer = link.endpoint, %error, "ucx did not fetch");
            Status::NotMoved
        }
    }
}

/// Lets a peer read, and says how.
pub(super) fn admit(
    shared: &Shared,
    head: &RequestHead,
    slices: &[(u64, u64)],
    visit: &Visit,
) -> (Status, Vec<u8>) {
    let grant = match admitted(shared, head, slices) {
        Ok(grant) => grant,
        Err(status) => return (status, Vec::new()),
    };
    let (Ok(ucx), Some(_)) = (&shared.ucx, shared.served_links.get(visit.link)) else {
        return (Status::NoLink, Vec::new());
    };
    match ucx.expose(grant.memory()) {
        Ok(exposed) => (Status::Done, exposed.encode_to_vec()),
        Err(error) => {
            tracing::debug!(%error, "memory cannot be read through ucx");
            (Status::NotMoved, Vec::new())
        }
    }
}
