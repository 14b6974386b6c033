use types::KvDtype;

use super::*;

const LAYOUT: KvLayout = KvLayout {
    layers: 3,
    kv_heads: 1,
    head_dim: 4,
    block_tokens: 8,
    dtype: KvDtype::F16,
};

#[test]
fn slices_lie_where_the_layers_of_the_blocks_lie() {
    let layer = LAYOUT.layer_bytes() as u64;
    let block = LAYOUT.block_bytes() as u64;
    let pieces = [
        Piece {
            layers: 0..3,
            blocks: 1..2,
        },
        Piece {
            layers: 1..2,
            blocks: 2..4,
        },
    ];
    let blocks = [9, 4, 0, 7].map(BlockId);
    let offsets = [10 * block, 30 * block, 20 * block];
    let slice = |local_offset, remote_offset, len| Slice {
        local_offset,
        remote_offset,
        len,
    };
    assert_eq!(
        slices(&LAYOUT, &blocks, 1, &offsets, &pieces),
        [
            slice(4 * block, 10 * block, block),
            slice(layer, 30 * block + layer, layer),
            slice(7 * block + layer, 20 * block + layer, layer),
        ]
    );
}

#[test]
fn a_hostile_offset_does_not_overflow() {
    let pieces = [Piece {
        layers: 1..2,
        blocks: 0..1,
    }];
    slices(&LAYOUT, &[BlockId(0)], 0, &[u64::MAX], &pieces);
}
