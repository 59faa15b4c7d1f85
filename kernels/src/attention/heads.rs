//! Rows of heads: where they lie, and the right to write each from its own task.

// Output rows are interleaved in memory (one token's heads are neighbours), so no safe split gives each task its own.
#![allow(unsafe_code)]

use super::{Heads, HeadsMut};
use crate::dtype::{Slice, SliceMut};
use crate::rows::parallel::part;
use half::{bf16, f16};
use std::marker::PhantomData;

/// Panics unless all rows of `d` elements of a [b, h, t] lie inside `len` elements.
fn check_inside(what: &str, len: usize, strides: [usize; 3], shape: [usize; 3], d: usize) {
    if shape.contains(&0) {
        return;
    }
    // Raw writes rely on this, so no sum may wrap around.
    let end = shape.iter().zip(strides).try_fold(d, |end, (n, s)| {
        (n - 1)
            .checked_mul(s)
            .and_then(|last| end.checked_add(last))
    });
    assert!(
        end.is_some_and(|end| end <= len),
        "{what}: {shape:?} rows of {d} with strides {strides:?} need {} elements, there are {len}",
        end.map_or("more than 2^64".into(), |end| end.to_string())
    );
}

impl<'a> Heads<'a> {
    /// Panics unless all rows exist.
    pub(super) fn check(self, what: &str, shape: [usize; 3], d: usize) {
        assert!(self.data.dtype().is_float(), "{what} holds no floats");
        check_inside(what, self.data.len(), self.strides, shape, d);
    }

    /// Row (b, h, t) of d elements.
    #[inline(always)]
    pub(super) fn row(self, b: usize, h: usize, t: usize, d: usize) -> Slice<'a> {
        let at = b * self.strides[0] + h * self.strides[1] + t * self.strides[2];
        part(self.data, at..at + d)
    }
}

#[derive(Clone, Copy)]
enum Base {
    F32(*mut f32),
    Bf16(*mut bf16),
    F16(*mut f16),
}

/// Output rows that tasks write without a lock, each row by one task.
pub(super) struct OutRows<'a> {
    base: Base,
    strides: [usize; 3],
    shape: [usize; 3],
    d: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer stands for an exclusive borrow, and `row` hands out disjoint parts of it, one owner each.
unsafe impl Send for OutRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for OutRows<'_> {}

impl<'a> OutRows<'a> {
    /// Panics unless all rows of `d` elements exist and no two overlap.
    pub(super) fn new(what: &str, x: HeadsMut<'a>, shape: [usize; 3], d: usize) -> Self {
        check_inside(what, x.data.len(), x.strides, shape, d);
        let mut axes: Vec<(usize, usize)> = (0..3)
            .filter(|&a| shape[a] > 1 && !shape.contains(&0))
            .map(|a| (x.strides[a], shape[a]))
            .collect();
        axes.sort_unstable();
        let mut extent = d;
        for (stride, n) in axes {
            assert!(
                stride >= extent,
                "{what}: rows of {d} with strides {:?} overlap",
                x.strides
            );
            extent += (n - 1) * stride;
        }
        let base = match x.data {
            SliceMut::F32(x) => Base::F32(x.as_mut_ptr()),
            SliceMut::Bf16(x) => Base::Bf16(x.as_mut_ptr()),
            SliceMut::F16(x) => Base::F16(x.as_mut_ptr()),
            SliceMut::U32(_) => panic!("{what} holds no floats"),
        };
        OutRows {
            base,
            strides: x.strides,
            shape,
            d,
            borrow: PhantomData,
        }
    }

    /// Row (b, h, t). Panics if there is none.
    ///
    /// # Safety
    /// No other borrow of this row lives.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(super) unsafe fn row(&self, b: usize, h: usize, t: usize) -> SliceMut<'_> {
        let ([bs, hs, ts], d) = (self.strides, self.d);
        assert!(b < self.shape[0] && h < self.shape[1] && t < self.shape[2]);
        let at = b * bs + h * hs + t * ts;
        // SAFETY: `new` checked that all rows lie inside the borrow and are disjoint; the caller that this one is free.
        unsafe {
            match self.base {
                Base::F32(p) => SliceMut::F32(std::slice::from_raw_parts_mut(p.add(at), d)),
                Base::Bf16(p) => SliceMut::Bf16(std::slice::from_raw_parts_mut(p.add(at), d)),
                Base::F16(p) => SliceMut::F16(std::slice::from_raw_parts_mut(p.add(at), d)),
            }
        }
    }
}
