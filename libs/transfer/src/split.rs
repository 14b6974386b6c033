//! Cuts a batch into requests of bounded size, so that several connections share a large one.

use crate::Slice;

/// What one request may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) bytes: u64,
    pub(crate) slices: usize,
}

/// The slices of one request and their sum, at least one byte.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) slices: Vec<Slice>,
    pub(crate) bytes: u64,
}

/// Cuts at slices where it can and inside them where it must; keeps the order and skips empty slices.
/// Offsets plus lengths must not overflow.
pub(crate) fn split(slices: &[Slice], limits: Limits) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut part = Part::default();
    for slice in slices {
        let mut rest = *slice;
        while rest.len > 0 {
            if part.bytes == limits.bytes || part.slices.len() == limits.slices {
                parts.push(std::mem::take(&mut part));
            }
            let len = rest.len.min(limits.bytes - part.bytes);
            part.slices.push(Slice { len, ..rest });
            part.bytes += len;
            rest.local_offset += len;
            rest.remote_offset += len;
            rest.len -= len;
        }
    }
    if part.bytes > 0 {
        parts.push(part);
    }
    parts
}

#[cfg(test)]
mod tests;
