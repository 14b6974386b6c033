use proptest::prelude::*;

use super::*;

fn slices() -> impl Strategy<Value = Vec<Slice>> {
    let slice =
        (0..10_000_u64, 0..10_000_u64, 0..500_u64).prop_map(|(local_offset, remote_offset, len)| Slice {
            local_offset,
            remote_offset,
            len,
        });
    prop::collection::vec(slice, 0..40)
}

/// Every pair of a local byte and the remote byte it belongs to, in order.
fn byte_pairs<'a>(slices: impl IntoIterator<Item = &'a Slice>) -> Vec<(u64, u64)> {
    slices
        .into_iter()
        .flat_map(|slice| (0..slice.len).map(|i| (slice.local_offset + i, slice.remote_offset + i)))
        .collect()
}

proptest! {
    #[test]
    fn parts_hold_every_byte_once_in_order_and_keep_to_the_limits(
        slices in slices(),
        bytes in 1..700_u64,
        count in 1..9_usize,
    ) {
        let parts = split(&slices, Limits { bytes, slices: count });
        for part in &parts {
            prop_assert!(part.bytes >= 1 && part.bytes <= bytes);
            prop_assert!(part.slices.len() <= count);
            prop_assert!(part.slices.iter().all(|slice| slice.len > 0));
            prop_assert_eq!(part.bytes, part.slices.iter().map(|slice| slice.len).sum::<u64>());
        }
        let rejoined = byte_pairs(parts.iter().flat_map(|part| &part.slices));
        prop_assert_eq!(rejoined, byte_pairs(&slices));
        for pair in parts.windows(2) {
            prop_assert!(pair[0].bytes == bytes || pair[0].slices.len() == count, "a part is cut too early");
        }
    }
}
