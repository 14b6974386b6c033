//! The roots of the spaces that this node has seen: the parents of first blocks.
//!
//! Only a block whose parent is held, or is a root known here, can be found by its prefix. Bounded; forgetting a
//! tenant's root costs its next first block a place in the cache, until the tenant is seen again.

use std::collections::{HashMap, HashSet, VecDeque};

use types::{BlockHash, KvSpace};

/// Tenants whose root is remembered. A root is derived again whenever the tenant is seen, so this bounds
/// memory (some 100 bytes each), not tenants.
const TENANTS_MAX: usize = 16 * 1024;

#[derive(Debug)]
pub(crate) struct Roots {
    space: KvSpace,
    by_tenant: HashMap<Box<str>, BlockHash>,
    /// Oldest first.
    order: VecDeque<Box<str>>,
    known: HashSet<BlockHash>,
    /// Roots that peers named, oldest first.
    learned: VecDeque<BlockHash>,
}

impl Roots {
    /// Knows the root of the tenants' common space, which is never forgotten.
    pub(crate) fn new(space: KvSpace) -> Self {
        let common = space.root();
        Self {
            space,
            by_tenant: HashMap::new(),
            order: VecDeque::new(),
            known: HashSet::from([common]),
            learned: VecDeque::new(),
        }
    }

    /// The root of a tenant's space; the empty name means `space` as it is.
    pub(crate) fn of_tenant(&mut self, tenant: &str) -> BlockHash {
        if tenant.is_empty() {
            return self.space.root();
        }
        if let Some(root) = self.by_tenant.get(tenant) {
            return *root;
        }
        if self.order.len() >= TENANTS_MAX
            && let Some(oldest) = self.order.pop_front()
            && let Some(root) = self.by_tenant.remove(&oldest)
        {
            self.known.remove(&root);
        }
        let root = self.space.with_tenant(tenant).root();
        self.by_tenant.insert(tenant.into(), root);
        self.order.push_back(tenant.into());
        self.known.insert(root);
        root
    }

    /// The tenants that requests have named, with their roots.
    pub(crate) fn tenants(&self) -> impl Iterator<Item = (&str, BlockHash)> {
        self.by_tenant.iter().map(|(tenant, root)| (&**tenant, *root))
    }

    /// Takes a peer's word that this is the root of some tenant's space. Blocks below it are found by who knows their hashes, as
    /// all others: a wrong word makes no block readable.
    pub(crate) fn learn(&mut self, root: BlockHash) {
        if self.known.contains(&root) {
            return;
        }
        while self.learned.len() >= TENANTS_MAX
            && let Some(oldest) = self.learned.pop_front()
        {
            // A tenant that was seen since has its root in `by_tenant`, too.
            if !self.by_tenant.values().any(|known| *known == oldest) {
                self.known.remove(&oldest);
            }
        }
        self.learned.push_back(root);
        self.known.insert(root);
    }

    pub(crate) fn is_root(&self, hash: BlockHash) -> bool {
        self.known.contains(&hash)
    }
}

#[cfg(test)]
mod tests {
    use types::{KvDtype, KvLayout};

    use super::*;

    fn space() -> KvSpace {
        KvSpace {
            model_digest: "ab".into(),
            arithmetic: "fast/1".into(),
            layout: KvLayout {
                layers: 1,
                kv_heads: 1,
                head_dim: 8,
                block_tokens: 8,
                dtype: KvDtype::F16,
            },
            adapter: None,
            tenant_salt: String::new(),
        }
    }

    #[test]
    fn tenants_have_different_roots_and_the_common_one_is_always_known() {
        let mut roots = Roots::new(space());
        assert_eq!(roots.of_tenant(""), space().root());
        let first = roots.of_tenant("tenant-0");
        assert_eq!(first, space().with_tenant("tenant-0").root());
        assert!(roots.is_root(first) && first != space().root());
        for tenant in 1..=TENANTS_MAX {
            roots.of_tenant(&format!("tenant-{tenant}"));
        }
        assert!(!roots.is_root(first), "the table is bounded");
        assert!(roots.is_root(space().root()));
        assert_eq!(roots.known.len(), TENANTS_MAX + 1);
        assert_eq!(roots.of_tenant("tenant-0"), first);
        assert!(roots.is_root(first));
    }
}
