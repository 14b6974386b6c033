//! Ending what runs without refusing what comes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// A token for each generation of work: [`Recall::end`] cancels that of the work that runs, and what comes later has the next.
#[derive(Debug)]
pub struct Recall {
    /// Ends all generations.
    all: CancellationToken,
    current: Mutex<CancellationToken>,
}

impl Recall {
    /// Work that also ends with `all`.
    pub fn below(all: CancellationToken) -> Self {
        Self {
            current: Mutex::new(all.child_token()),
            all,
        }
    }

    /// What ends work that begins now.
    pub fn token(&self) -> CancellationToken {
        self.current().clone()
    }

    /// Ends the work that has begun.
    pub fn end(&self) {
        let next = self.all.child_token();
        std::mem::replace(&mut *self.current(), next).cancel();
    }

    fn current(&self) -> MutexGuard<'_, CancellationToken> {
        // A token is put in place whole, so a panic leaves nothing half done.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_after_an_end_goes_on_until_everything_ends() {
        let all = CancellationToken::new();
        let recall = Recall::below(all.clone());
        let before = recall.token();
        recall.end();
        let after = recall.token();
        assert!(before.is_cancelled() && !after.is_cancelled());
        all.cancel();
        assert!(after.is_cancelled() && recall.token().is_cancelled());
    }
}
