use super::*;

#[test]
fn fresh_memory_is_zeroed_and_page_aligned() {
    let memory = HostMemory::allocate(100_000).unwrap();
    assert_eq!(memory.len(), 100_000);
    assert_eq!(memory.base().as_ptr() as usize % 4096, 0);
    let zeroed = with_bytes(&*memory, 0, 100_000, |bytes| bytes.iter().all(|byte| *byte == 0));
    assert_eq!(zeroed, Ok(true));
}

#[test]
fn what_is_copied_in_comes_out_and_neighbours_stay() {
    let memory = HostMemory::allocate(4096).unwrap();
    copy_in(&*memory, 10, b"perigee").unwrap();
    assert_eq!(copy_out(&*memory, 9, 9).unwrap(), b"\0perigee\0");
    assert_eq!(copy_out(&*memory, 4096, 0).unwrap(), b"");
}

#[test]
fn no_range_leaves_the_memory() {
    let memory = HostMemory::allocate(4096).unwrap();
    for (offset, len) in [(0, 4097), (4096, 1), (4097, 0), (usize::MAX, 1), (1, usize::MAX)] {
        let refused = MemoryError::OutOfBounds {
            offset,
            len,
            memory_bytes: 4096,
        };
        assert_eq!(
            with_bytes(&*memory, offset, len, <[u8]>::len),
            Err(refused.clone())
        );
        if len < 10_000 {
            assert_eq!(copy_out(&*memory, offset, len), Err(refused.clone()));
            assert_eq!(copy_in(&*memory, offset, &vec![1; len]), Err(refused));
        }
    }
    assert!(copy_out(&*memory, 0, 4096).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn an_allocation_that_cannot_be_is_an_error() {
    for bytes in [0, 1 << 60, usize::MAX] {
        let error = HostMemory::allocate(bytes).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Overloaded, "{error}");
    }
}

struct DeviceMemory;

// SAFETY: `len` is 0, so nothing is claimed about any byte.
unsafe impl Memory for DeviceMemory {
    fn base(&self) -> NonNull<u8> {
        NonNull::dangling()
    }

    fn len(&self) -> usize {
        0
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Device(3)
    }
}

#[test]
fn device_memory_is_not_touched() {
    let kind = MemoryKind::Device(3);
    assert_eq!(copy_out(&DeviceMemory, 0, 0), Err(MemoryError::NotHost { kind }));
}

#[test]
fn a_file_and_memory_exchange_exactly_the_bytes_asked_for() {
    let file = tempfile::tempfile().unwrap();
    let memory = HostMemory::allocate(8192).unwrap();
    copy_in(&*memory, 100, b"perigee").unwrap();
    write_file(&*memory, 100, 7, &file, 5000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 5007);
    read_file(&*memory, 4000, 7, &file, 5000).unwrap();
    assert_eq!(copy_out(&*memory, 3999, 9).unwrap(), b"\0perigee\0");
}

#[test]
fn what_a_file_or_a_memory_has_not_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let memory = HostMemory::allocate(4096).unwrap();
    let kind = |result: std::io::Result<()>| result.unwrap_err().kind();
    let short = read_file(&*memory, 0, 1, &file, 0);
    assert_eq!(kind(short), std::io::ErrorKind::UnexpectedEof);
    for result in [
        read_file(&*memory, 4000, 97, &file, 0),
        write_file(&*memory, 4000, 97, &file, 0),
        write_file(&*memory, 0, 1, &file, u64::MAX),
    ] {
        assert_eq!(kind(result), std::io::ErrorKind::InvalidInput);
    }
    assert_eq!(file.metadata().unwrap().len(), 0);
}
