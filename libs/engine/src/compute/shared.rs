//! A slice that several threads write in parts.

use std::marker::PhantomData;

/// Lets the items of one parallel job write disjoint parts of a slice.
pub(crate) struct Shared<'a, T> {
    base: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Shared` gives out `&mut T` of disjoint elements, which is sending `T`s.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            base: slice.as_mut_ptr(),
            len: slice.len(),
            lifetime: PhantomData,
        }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    ///
    /// No element may be reachable through two ranges at once.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // Disjointness is the caller's promise.
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "range beyond the slice"
        );
        // SAFETY: the range is within the slice, which is borrowed mutably for 'a; the caller keeps ranges disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }
}
