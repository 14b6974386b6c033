//! Random numbers where nothing depends on their quality but that no two requests share an id.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use types::RequestId;

/// A keyed hash of a counter. The key comes from the operating system at the start of the process.
#[derive(Debug, Default)]
pub struct Entropy {
    key: RandomState,
    counter: AtomicU64,
}

impl Entropy {
    /// The next number.
    pub fn draw(&self) -> u64 {
        self.key.hash_one(self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// A fresh request id.
    pub fn request_id(&self) -> RequestId {
        RequestId(u128::from(self.draw()) << 64 | u128::from(self.draw()))
    }
}
