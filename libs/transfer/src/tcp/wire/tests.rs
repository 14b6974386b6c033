use proptest::prelude::*;

use super::*;

fn head() -> impl Strategy<Value = RequestHead> {
    let operation = prop::sample::select(&Operation::ALL);
    let numbers = (any::<u64>(), any::<u64>(), any::<u64>());
    let sizes = (
        1..=PAYLOAD_BYTES_MAX,
        1..=SLICES_MAX as u32,
        1..=EXTRA_BYTES_MAX as u32,
    );
    (operation, numbers, sizes).prop_map(
        |(operation, (id, epoch, key), (payload_bytes, slices, extra_bytes))| RequestHead {
            operation,
            id,
            epoch,
            key,
            payload_bytes: if operation.allows(payload_bytes) {
                payload_bytes
            } else {
                0
            },
            slices: if operation.has_slices() { slices } else { 0 },
            extra_bytes: if operation.has_extra() { extra_bytes } else { 0 },
        },
    )
}

fn status() -> impl Strategy<Value = Status> {
    prop_oneof![
        Just(Status::Done),
        Just(Status::UnknownKey),
        Just(Status::Denied),
        any::<u64>().prop_map(|current| Status::StaleEpoch { current }),
        any::<u64>().prop_map(|slice| Status::OutOfRange { slice }),
        Just(Status::NoLink),
        Just(Status::NotMoved),
        Just(Status::Unserved),
    ]
}

proptest! {
    #[test]
    fn a_request_head_survives_the_wire(head in head()) {
        let bytes = head.encode([], &[]);
        prop_assert_eq!(RequestHead::decode(bytes.as_slice().try_into().unwrap()), Ok(head));
    }

    #[test]
    fn an_answer_head_survives_the_wire(status in status(), id: u64, payload_bytes: u64, message_bytes: u64) {
        let message_bytes = if status == Status::Done { message_bytes } else { 0 };
        let head = AnswerHead { status, id, payload_bytes, message_bytes };
        prop_assert_eq!(AnswerHead::decode(&head.encode()), Ok(head));
    }

    #[test]
    fn a_table_survives_the_wire(table in prop::collection::vec((any::<u64>(), 1..9999_u64), 1..50)) {
        let head = RequestHead {
            operation: Operation::Write,
            id: 1,
            epoch: 2,
            key: 3,
            payload_bytes: table.iter().map(|(_, len)| len).sum(),
            slices: table.len() as u32,
            extra_bytes: 0,
        };
        let bytes = head.encode(table.iter().copied(), &[]);
        prop_assert_eq!(head.decode_table(&bytes[REQUEST_HEAD_BYTES..]), Ok(table));
    }

    #[test]
    fn any_bytes_decode_or_are_refused_within_the_bounds(bytes: [u8; 32], tail: [u8; 16], valid_magic: bool) {
        let mut head = [0; REQUEST_HEAD_BYTES];
        head[..32].copy_from_slice(&bytes);
        head[32..].copy_from_slice(&tail);
        if valid_magic {
            head[..8].copy_from_slice(b"PGXF\x01\x01\0\0");
        }
        if let Ok(decoded) = RequestHead::decode(&head) {
            prop_assert!(decoded.payload_bytes <= PAYLOAD_BYTES_MAX);
            prop_assert!(decoded.table_bytes() <= SLICES_MAX * TABLE_ENTRY_BYTES);
        }
        let _ = AnswerHead::decode(&bytes);
    }
}

#[test]
fn lengths_beyond_the_bounds_are_refused() {
    let good = RequestHead {
        operation: Operation::Write,
        id: 0,
        epoch: 0,
        key: 0,
        payload_bytes: 1,
        slices: 1,
        extra_bytes: 0,
    };
    let decode = |head: RequestHead| RequestHead::decode(head.encode([], &[]).as_slice().try_into().unwrap());
    for payload_bytes in [0, PAYLOAD_BYTES_MAX + 1, 1 << 60, u64::MAX] {
        let head = RequestHead {
            payload_bytes,
            ..good
        };
        assert_eq!(decode(head), Err(WireError::Payload(payload_bytes)));
    }
    for slices in [0, SLICES_MAX as u32 + 1] {
        assert_eq!(
            decode(RequestHead { slices, ..good }),
            Err(WireError::Slices(slices))
        );
    }
    for extra_bytes in [1, EXTRA_BYTES_MAX as u32 + 1] {
        let head = RequestHead { extra_bytes, ..good };
        assert_eq!(decode(head), Err(WireError::Extra(extra_bytes)));
    }
    for operation in [Operation::Fetch, Operation::Admit] {
        let head = RequestHead { operation, ..good };
        assert_eq!(
            decode(head),
            Err(WireError::Extra(0)),
            "it needs to name its link"
        );
    }
    for table in [(0, 0), (0, 2)] {
        let bytes = good.encode([table], &[]);
        assert_eq!(
            good.decode_table(&bytes[REQUEST_HEAD_BYTES..]),
            Err(WireError::Table)
        );
    }
    let wraps = RequestHead { slices: 2, ..good };
    let bytes = wraps.encode([(0, u64::MAX), (0, 2)], &[]);
    assert_eq!(
        wraps.decode_table(&bytes[REQUEST_HEAD_BYTES..]),
        Err(WireError::Table)
    );
}

/// A change of any of these bytes is another version of the protocol.
#[test]
fn the_bytes_are_as_specified() {
    let head = RequestHead {
        operation: Operation::Read,
        id: 0x0102,
        epoch: 7,
        key: 0x1122_3344_5566_7788,
        payload_bytes: 5,
        slices: 1,
        extra_bytes: 0,
    };
    let mut expected = b"PGXF\x01\x02\0\0\x02\x01\0\0\0\0\0\0\x07\0\0\0\0\0\0\0".to_vec();
    expected.extend(b"\x88\x77\x66\x55\x44\x33\x22\x11\x05\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
    expected.extend(b"\x09\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
    assert_eq!(head.encode([(9, 5)], &[]), expected);
    let introduction = RequestHead {
        operation: Operation::Introduce,
        payload_bytes: 0,
        slices: 0,
        extra_bytes: 3,
        ..head
    };
    expected.truncate(24);
    expected[5] = 3;
    expected.extend(b"\x88\x77\x66\x55\x44\x33\x22\x11\0\0\0\0\0\0\0\0\0\0\0\0\x03\0\0\0abc");
    assert_eq!(introduction.encode([], b"abc"), expected);
    let answer = AnswerHead {
        status: Status::StaleEpoch { current: 9 },
        id: 3,
        payload_bytes: 0,
        message_bytes: 0,
    };
    assert_eq!(
        answer.encode(),
        *b"PGXF\x01\x03\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0"
    );
}
