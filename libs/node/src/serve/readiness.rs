//! Whether this process should get requests, and if not, why.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

/// What stands between the process and being ready: reasons by condition. Clones share them.
///
/// Conditions are names in the code, so their number is bounded.
#[derive(Debug, Clone)]
pub struct Readiness {
    reasons: Arc<watch::Sender<BTreeMap<&'static str, String>>>,
}

impl Readiness {
    /// Not ready, until [`Readiness::meet`] is called for each of `conditions` and for whatever was added since.
    pub fn new(conditions: impl IntoIterator<Item = &'static str>) -> Self {
        let conditions = conditions.into_iter();
        let reasons = conditions
            .map(|condition| (condition, "not yet".to_owned()))
            .collect();
        Self {
            reasons: Arc::new(watch::Sender::new(reasons)),
        }
    }

    /// The condition holds.
    pub fn meet(&self, condition: &'static str) {
        self.reasons
            .send_if_modified(|reasons| reasons.remove(condition).is_some());
    }

    /// The condition does not hold, because of `reason`.
    pub fn miss(&self, condition: &'static str, reason: impl Into<String>) {
        let reason = reason.into();
        self.reasons.send_if_modified(|reasons| {
            let before = reasons.insert(condition, reason.clone());
            before != Some(reason)
        });
    }

    /// Whether every condition holds.
    pub fn is_ready(&self) -> bool {
        self.reasons.borrow().is_empty()
    }

    /// Each condition that does not hold, with its reason.
    pub fn reasons(&self) -> BTreeMap<&'static str, String> {
        self.reasons.borrow().clone()
    }

    /// Follows the reasons. None means ready.
    pub fn watch(&self) -> watch::Receiver<BTreeMap<&'static str, String>> {
        self.reasons.subscribe()
    }
}
