//! Stores that go past the caches: lines that are written whole and not read soon need not be fetched first, and drive nothing out.
//!
//! Other threads may see such stores late and in any order, unless a fence follows; so they are lent for the length of a call, at
//! whose end it stands.

use super::Simd;

/// What [`past_caches`] lends.
pub(crate) struct Past<S: Simd>(S);

impl<S: Simd> Past<S> {
    /// Writes the first `LANES` elements. Panics if there are fewer, or they do not begin where a vector may.
    #[inline(always)]
    pub(crate) fn store(&self, y: &mut [f32], v: S::V) {
        assert!(y.len() >= S::LANES && y.as_ptr().addr().is_multiple_of(4 * S::LANES));
        // SAFETY: the slice holds LANES elements, aligned as a vector is; `drop` orders the store before what follows.
        unsafe { self.0.store_past_ptr(y.as_mut_ptr(), v) }
    }
}

impl<S: Simd> Drop for Past<S> {
    #[inline(always)]
    fn drop(&mut self) {
        self.0.fence_past();
    }
}

/// Calls f, whose stores by what it is lent are in memory when this returns. f hands nothing that it so wrote to another thread.
#[inline(always)]
pub(crate) fn past_caches<S: Simd, R>(s: S, f: impl FnOnce(&Past<S>) -> R) -> R {
    let past = Past(s);
    f(&past)
}
