//! The system calls between a socket and raw memory.
//!
//! The kernel copies straight between the socket and the memory; this process never looks at the bytes and
//! never makes a Rust reference to them, because peers, kernels and other threads may use the memory at the
//! same time, and a reference would promise that they do not. A reader that races with a writer gets torn
//! bytes, which its checksum shows; nothing worse.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use types::Memory;

/// Slices that one system call takes. 64 slices of 24 KiB (a layer of a block of a small model) are more than
/// [`BYTES_PER_CALL_MAX`].
const VECTORS_MAX: usize = 64;
/// Bounds the time of one call, and with it the time for which a revocation waits.
const BYTES_PER_CALL_MAX: usize = 1 << 20;

/// A walk over runs of bytes of one memory, from the first to the last.
///
/// Invariant: every span is inside the memory, and the position is inside the spans.
pub(crate) struct Cursor {
    memory: Arc<dyn Memory>,
    spans: Vec<Span>,
    /// The span at which the walk is.
    index: usize,
    /// How much of that span is done.
    done: usize,
    remaining: u64,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    offset: usize,
    len: usize,
}

impl Cursor {
    /// Starts before the first of `spans`, given as offset and length. The error is the span that is not
    /// inside the memory. `memory` must be host memory, as all registered memory is.
    pub(crate) fn new(
        memory: Arc<dyn Memory>,
        spans: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, (u64, u64)> {
        let memory_bytes = memory.len();
        let mut remaining = 0_u64;
        let checked = |(offset, len): (u64, u64)| -> Result<Span, (u64, u64)> {
            let span = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
            let inside =
                span.filter(|(offset, len)| offset.checked_add(*len).is_some_and(|end| end <= memory_bytes));
            remaining = remaining.checked_add(len).ok_or((offset, len))?;
            let (offset, len) = inside.ok_or((offset, len))?;
            Ok(Span { offset, len })
        };
        let spans = spans.into_iter().map(checked).collect::<Result<_, _>>()?;
        Ok(Self {
            memory,
            spans,
            index: 0,
            done: 0,
            remaining,
        })
    }

    /// What is walked over.
    pub(crate) fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    /// Bytes still to be walked over.
    pub(crate) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Receives into the next bytes, with one call that does not wait, and tells `landed` where they are, given by offset and
    /// length. 0 is the end of the stream.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        landed: impl FnMut(u64, u64),
    ) -> io::Result<usize> {
        let mut vectors = [EMPTY; VECTORS_MAX];
        let count = self.fill(&mut vectors);
        let received = retry_interrupted(|| {
            // SAFETY: `fill` set the first `count` vectors to addresses inside `self.memory`, which stays
            // mapped while `self` is borrowed and is writable from any thread (contract of `Memory`).
            unsafe { libc::readv(socket.as_raw_fd(), vectors.as_ptr(), count as libc::c_int) }
        })?;
        self.advance(received, landed);
        Ok(received)
    }

    /// Sends what is left of `head` and then the next bytes, with one call that does not wait; shortens `head`
    /// by what of it was sent.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, head: &mut &[u8]) -> io::Result<usize> {
        let mut vectors = [EMPTY; VECTORS_MAX];
        let heads = usize::from(!head.is_empty());
        if heads == 1 {
            vectors[0] = libc::iovec {
                iov_base: head.as_ptr().cast_mut().cast(),
                iov_len: head.len(),
            };
        }
        let count = heads + self.fill(&mut vectors[heads..]);
        // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = count as _;
        let sent = retry_interrupted(|| {
            // SAFETY: the vectors are `head`, which is borrowed, and addresses that `fill` took from inside
            // `self.memory`, which stays mapped while `self` is borrowed; sending only reads them. The kernel
            // does not keep the pointers. Without `MSG_NOSIGNAL` a peer that is gone could kill this process.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) }
        })?;
        let of_head = sent.min(head.len());
        *head = &head[of_head..];
        self.advance(sent - of_head, |_, _| {});
        Ok(sent)
    }

    /// Describes the next bytes and returns how many vectors that took.
    fn fill(&self, vectors: &mut [libc::iovec]) -> usize {
        let mut budget = BYTES_PER_CALL_MAX;
        let mut done = self.done;
        let mut count = 0;
        for (vector, span) in vectors.iter_mut().zip(&self.spans[self.index..]) {
            if budget == 0 {
                break;
            }
            let len = (span.len - done).min(budget);
            // SAFETY: the span is inside the memory (invariant), so `offset + done` is at most one past its end.
            let base = unsafe { self.memory.base().add(span.offset + done) };
            *vector = libc::iovec {
                iov_base: base.as_ptr().cast(),
                iov_len: len,
            };
            budget -= len;
            done = 0;
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut bytes: usize, mut walked: impl FnMut(u64, u64)) {
        self.remaining -= bytes as u64;
        while let Some(span) = self.spans.get(self.index) {
            let left = span.len - self.done;
            walked((span.offset + self.done) as u64, left.min(bytes) as u64);
            if bytes < left {
                self.done += bytes;
                return;
            }
            bytes -= left;
            self.done = 0;
            self.index += 1;
        }
    }
}

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// The result of a system call, called again for as long as a signal interrupts it.
fn retry_interrupted(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
