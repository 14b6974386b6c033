use proptest::prelude::*;

use super::*;
use crate::layout::KvDtype;

fn space() -> KvSpace {
    KvSpace {
        model_digest: "00".repeat(32),
        arithmetic: "fast-1".into(),
        layout: KvLayout {
            layers: 30,
            kv_heads: 3,
            head_dim: 64,
            block_tokens: 32,
            dtype: KvDtype::F16,
        },
        adapter: None,
        tenant_salt: String::new(),
    }
}

/// A change of any of these strands every block that a cluster has on disk.
#[test]
fn golden_vectors_hold() {
    let root = space().root();
    let tokens: Vec<Token> = (0..96).collect();
    let chain = root.chain(&tokens, 32);
    let shown: Vec<String> = std::iter::once(root)
        .chain(chain)
        .map(|hash| hash.to_string())
        .collect();
    assert_eq!(
        shown,
        [
            "bfbf28b32acb8da11049af51fc98ac4b",
            "41b7f0bb9afacbee132cf64a5d8bbabb",
            "08e9bcdcc71f0b300f345e484bf97b0b",
            "d2c97e73c18c7b31411253cfdfcaf00d",
        ]
    );
    assert_eq!(
        BlockHash::default().child(&[]).to_string(),
        "e572dff82304700b856a555ac3a4558d"
    );
}

#[test]
fn every_field_of_the_space_separates() {
    let base = space();
    let mut others = vec![
        KvSpace {
            model_digest: "01".repeat(32),
            ..base.clone()
        },
        KvSpace {
            arithmetic: "exact-1".into(),
            ..base.clone()
        },
        KvSpace {
            adapter: Some(String::new()),
            ..base.clone()
        },
        base.with_tenant("a"),
        base.with_tenant("b"),
    ];
    others.push(KvSpace {
        layout: KvLayout {
            block_tokens: 16,
            ..base.layout
        },
        ..base.clone()
    });
    let mut roots: Vec<BlockHash> = others.iter().map(KvSpace::root).collect();
    roots.push(base.root());
    roots.sort();
    roots.dedup();
    assert_eq!(roots.len(), 7);
}

proptest! {
    #[test]
    fn a_hash_identifies_its_whole_prefix(
        tokens in prop::collection::vec(0u32..1000, 8..80),
        at in 0usize..80,
    ) {
        let root = space().root();
        let at = at % tokens.len();
        let mut changed = tokens.clone();
        changed[at] += 1;
        let (a, b) = (root.chain(&tokens, 8), root.chain(&changed, 8));
        for (index, (a, b)) in a.iter().zip(&b).enumerate() {
            prop_assert_eq!(a == b, index < at / 8);
        }
    }

    #[test]
    fn a_block_of_any_size_is_hashed_as_is_written(tokens in prop::collection::vec(any::<u32>(), 0..300)) {
        let root = space().root();
        let words = tokens.iter().flat_map(|token| token.to_le_bytes());
        let bytes: Vec<u8> = root.0.into_iter().chain(words).collect();
        let whole = blake3::hash(&bytes);
        prop_assert_eq!(&root.child(&tokens).0[..], &whole.as_bytes()[..16]);
    }

    #[test]
    fn text_form_round_trips(bytes in any::<[u8; 16]>()) {
        let hash = BlockHash(bytes);
        prop_assert_eq!(BlockHash::parse(&hash.to_string()), Some(hash));
    }
}
