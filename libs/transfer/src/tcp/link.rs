//! UCX between this node and one peer: how bytes of the peer come here.
//!
//! Invariant: bytes are written to granted memory inside of the grant's gate, or under a hold of the grant; to memory
//! of a batch of ours for as long as the batch's `Keep` is held.
//!
//! Elsewhere: how bytes are copied (`copy.rs`), who may (`region.rs`), how links come about (`linking.rs`, `server.rs`), the library (`ucx.rs`).

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use types::{Memory, MemoryKind};

use super::stream::Moved;
use crate::copy::{self, Stores};
use crate::digest::Digest;
use crate::region::Grant;
use crate::transport::Keep;
use crate::ucx::{Exposed, Peer, Run, UcxError, Window};

/// Windows of one peer: one for its pool, and some for what is tested or was registered anew.
const WINDOWS_MAX: usize = 8;
/// Bounds the time of one copy, and with it the time for which a revocation waits.
const COPY_BYTES_MAX: usize = 64 << 10;
/// Copies until other tasks of the thread get their turn, which costs it some of its caches. Less than a millisecond.
const PAUSE_BYTES: usize = 4 << 20;

/// One end of UCX between two nodes.
pub(super) struct Link {
    /// Names it at the server.
    pub(super) id: u64,
    /// Endpoint of the peer's server.
    pub(super) endpoint: String,
    /// What UCX uses, for people.
    pub(super) lanes: Vec<String>,
    peer: Arc<Peer>,
    closed: CancellationToken,
    /// The peer's memory, the most recently used last.
    windows: Mutex<VecDeque<(Exposed, Arc<Window>)>>,
}

/// Bytes to be moved here.
pub(super) struct Pull<'a> {
    pub(super) window: &'a Arc<Window>,
    pub(super) memory: &'a Arc<dyn Memory>,
    /// Offset in the window, offset in `memory`, and length of each run. Inside of `memory`.
    pub(super) runs: &'a [(u64, u64, u64)],
    /// Where a peer asked for it: its grant.
    pub(super) grant: Option<&'a Arc<Grant>>,
    /// Where this node asked for it: what keeps the memory.
    pub(super) keep: Keep,
    /// Sees all bytes in order if they are copied here, and none if hardware moves them.
    pub(super) digest: Option<&'a mut Digest>,
}

impl Link {
    pub(super) fn new(id: u64, endpoint: String, lanes: Vec<String>, peer: Arc<Peer>) -> Self {
        Self {
            id,
            endpoint,
            lanes,
            peer,
            closed: CancellationToken::new(),
            windows: Mutex::default(),
        }
    }

    /// False once UCX lost the peer.
    pub(super) fn is_alive(&self) -> bool {
        self.peer.is_alive()
    }

    /// Ends all that goes on over it.
    pub(super) fn close(&self) {
        self.peer.close();
        self.closed.cancel();
    }

    /// Cancelled when the link is closed or dropped.
    pub(super) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// The peer's memory.
    pub(super) async fn window(&self, exposed: &Exposed) -> Result<Arc<Window>, UcxError> {
        let mut windows = self.windows.lock().await;
        if let Some(position) = windows.iter().position(|(known, _)| known == exposed) {
            let known = windows.remove(position);
            let window = known.as_ref().map(|(_, window)| window.clone());
            windows.extend(known);
            return window.ok_or_else(|| UcxError::new("no such window".to_owned()));
        }
        let window = Arc::new(self.peer.open(exposed).await?);
        if windows.len() >= WINDOWS_MAX {
            windows.pop_front();
        }
        windows.push_back((exposed.clone(), window.clone()));
        Ok(window)
    }

    /// Moves bytes of the peer here. `gone` says whether nobody waits for them any more; then, and when the grant is
    /// closed, it stops early. After an error nothing is on its way.
    pub(super) async fn pull(&self, pull: Pull<'_>, gone: impl Fn() -> bool) -> Result<Moved, UcxError> {
        let outside = |(from, _, bytes): &&(u64, u64, u64)| !pull.window.covers(*from, *bytes);
        if let Some((from, _, bytes)) = pull.runs.iter().find(outside) {
            return Err(UcxError::new(format!(
                "{bytes} bytes at offset {from} are not in the peer's memory"
            )));
        }
        if pull.window.is_mapped() && pull.memory.kind() == MemoryKind::Host {
            copy_mapped(pull, gone).await
        } else {
            self.get(pull).await
        }
    }

    async fn get(&self, pull: Pull<'_>) -> Result<Moved, UcxError> {
        let hold = match pull.grant {
            None => None,
            Some(grant) => {
                let peer = self.peer.clone();
                let bytes = pull.runs.iter().map(|(_, to, bytes)| (*to, *bytes));
                let Some(hold) = grant.hold(bytes, Arc::new(move || peer.close())) else {
                    return Ok(Moved::Revoked);
                };
                Some(hold)
            }
        };
        let base = pull.memory.base().as_ptr().expose_provenance();
        let run = |(from, to, bytes): &(u64, u64, u64)| Run {
            local: base + *to as usize,
            remote: pull.window.address(*from),
            bytes: *bytes as usize,
        };
        let runs = pull.runs.iter().map(run).collect();
        let device = matches!(pull.memory.kind(), MemoryKind::Device(_));
        let held = Box::new((hold, pull.keep, pull.memory.clone(), pull.window.clone()));
        // SAFETY: the runs are inside of the memory (the caller's promise), which `held` keeps mapped. Nobody else uses
        // them: a grant's memory is the peer's until its holds have ended, and a batch's is kept by its `Keep`.
        unsafe { pull.window.get(runs, device, held) }.await?;
        Ok(Moved::All)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// Different bytes that are written: as a batch may name a place more than once, at most its sum, and at most what it spans.
fn touched_bytes(runs: &[(u64, u64, u64)]) -> u64 {
    let first = runs.iter().map(|(_, to, _)| *to).min().unwrap_or(0);
    let end = runs.iter().map(|(_, to, bytes)| to + bytes).max().unwrap_or(0);
    let sum = runs.iter().map(|(_, _, bytes)| bytes).sum();
    (end - first).min(sum)
}

async fn copy_mapped(mut pull: Pull<'_>, gone: impl Fn() -> bool) -> Result<Moved, UcxError> {
    let stores = Stores::of_copy(touched_bytes(pull.runs));
    let mut since_pause = 0;
    for (from, to, bytes) in pull.runs {
        let bytes = *bytes as usize;
        let mut done = 0;
        while done < bytes {
            let offset = to + done as u64;
            let landing = pull.grant.and_then(|grant| grant.landing(offset));
            let part = (bytes - done).min(COPY_BYTES_MAX).min(PAUSE_BYTES - since_pause);
            let part = landing.map_or(part, |landing| part.min(landing.left(offset)));
            let digest = pull.digest.as_deref_mut();
            let copied = || {
                let Some(source) = pull.window.mapped(from + done as u64, part as u64) else {
                    return false;
                };
                let target = pull.memory.base().as_ptr().wrapping_add(offset as usize);
                // SAFETY: the run is inside of the memory (the caller's promise). Nobody else uses it: a grant's memory
                // is the peer's while its gate is open, and a batch's while its future lives. The source is mapped. The peer may
                // change it meanwhile, and checksums tell.
                unsafe {
                    match (landing, digest) {
                        (Some(landing), _) => landing.take(offset, source, target, part, stores),
                        (None, Some(digest)) => digest.take(source, target, part, stores),
                        (None, None) => copy::plain(source, target, part, stores),
                    }
                }
                true
            };
            let copied = match pull.grant {
                None => copied(),
                Some(grant) => match grant.touch(copied) {
                    Some(copied) => copied,
                    None => return Ok(Moved::Revoked),
                },
            };
            if !copied {
                return Err(UcxError::new(
                    "the peer's memory is not mapped here any more".to_owned(),
                ));
            }
            done += part;
            since_pause += part;
            if since_pause == PAUSE_BYTES {
                since_pause = 0;
                if gone() {
                    return Err(UcxError::new("nobody waits for it any more".to_owned()));
                }
                tokio::task::yield_now().await;
            }
        }
    }
    Ok(Moved::All)
}
