//! What peers ask of UCX on this side: links, and bytes that move through them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::time::timeout;

use super::Shared;
use super::link::{Link, Pull};
use super::messages::{Exposure, Introduced, Introduction, Source, Visit};
use super::server::admit as admitted;
use super::stream::Moved;
use super::wire::{RequestHead, Status};
use crate::ucx::{Choice, UcxError};

/// Links over which peers have bytes moved here, by the number that names them.
#[derive(Default)]
pub(super) struct Links {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    made: u64,
    by_id: HashMap<u64, Arc<Link>>,
    closed: bool,
}

impl Links {
    pub(super) fn clear(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        inner.by_id.clear();
    }

    fn get(&self, id: u64) -> Option<Arc<Link>> {
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
    let within = shared.config.connect_timeout;
    let late = |_| UcxError::new(format!("UCX did not connect within {within:?}"));
    let peer = timeout(within, ucx.connect(introduction.worker))
        .await
        .map_err(late)??;
    let peer = Arc::new(peer);
    let window = timeout(within, peer.open(&memory.into())).await.map_err(late)??;
    let forced = introduction.forced || shared.config.ucx.choice == Choice::Ucx;
    let lanes = if window.is_mapped() {
        vec!["shared memory".to_owned()]
    } else if peer.offers_more_than_tcp() || forced {
        peer.lanes().to_vec()
    } else {
        return Err(UcxError::new(
            "UCX offers nothing but TCP between the two nodes: neither can they map each other's memory, nor do they \
             share a network that it knows"
                .to_owned(),
        ));
    };
    let id = shared.served_links.next_id();
    let link = Link::new(id, introduction.endpoint, lanes.clone(), peer);
    shared.served_links.insert(link, shared.config.peers_max.get())?;
    Ok(Introduced {
        link: id,
        worker: ucx.address().to_vec(),
        lanes,
        obstacle: String::new(),
    })
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
        let window = link.window(&memory.into()).await?;
        let pull = Pull {
            window: &window,
            memory: grant.memory(),
            runs: &runs,
            grant: Some(&grant),
            keep: Default::default(),
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
        Ok(exposed) => (Status::Done, Exposure::from(exposed).encode_to_vec()),
        Err(error) => {
            tracing::debug!(%error, "memory cannot be read through ucx");
            (Status::NotMoved, Vec::new())
        }
    }
}
