//! How an op's backward writes gradients whose element type or number it did not choose.

use super::{Accum, Backward, Gradient};
use crate::cpu::memory::{with_scratch, with_scratch_f32};
use crate::cpu::rows::{self, parallel::shared};
use crate::dtype::{DType, Slice, SliceMut};
use crate::tensor::Tensor;

impl Gradient {
    /// Hands `f` the gradient as f32: itself if it is f32 (a parameter's always is), otherwise a widened copy that is
    /// rounded once afterwards. `f` says by [`Accum`] whether to add.
    pub(crate) fn in_f32(&mut self, f: impl FnOnce(&mut [f32], Accum)) {
        let accum = self.accum;
        let elements = self.tensor.elements();
        let mut slice = self.tensor.slice_mut();
        if let SliceMut::F32(all) = slice {
            return f(all, accum);
        }
        with_scratch_f32(elements, |wide| {
            if accum == Accum::Add {
                rows::cast(shared(&slice), SliceMut::F32(wide));
            }
            f(wide, accum);
            rows::cast(Slice::F32(wide), slice.reborrow());
        });
    }

    /// Writes or adds `x`, of the same number of elements and any float type.
    pub(crate) fn put(&mut self, x: Slice) {
        let slice = self.tensor.slice_mut();
        match self.accum {
            Accum::Replace => rows::cast(x, slice),
            Accum::Add => rows::add_assign(slice, x),
        }
    }
}

impl<'a> Backward<'a> {
    /// The gradient of the first result, of an op whose other results are statistics for its own backward.
    ///
    /// # Panics
    /// If one of the statistics was used in something that is differentiated: there is no formula for it here.
    pub(crate) fn only_gradient(&self, op: &str) -> &'a Tensor {
        for (i, gradient) in self.gradients.iter().enumerate().skip(1) {
            assert!(
                gradient.is_none(),
                "result {i} of {op} is a statistic without a gradient, but the loss depends on it"
            );
        }
        self.gradient(0)
    }

    /// The wanted gradient of operand `i`, if it is.
    pub(crate) fn want(&mut self, i: usize) -> Option<&mut Gradient> {
        self.wanted[i].as_mut()
    }
}

/// [`Gradient::in_f32`] of a gradient that may not be wanted.
pub(crate) fn optional_in_f32(
    gradient: Option<&mut Gradient>,
    f: impl FnOnce(Option<(&mut [f32], Accum)>),
) {
    match gradient {
        Some(gradient) => gradient.in_f32(|out, accum| f(Some((out, accum)))),
        None => f(None),
    }
}

/// The elements of `x` as `dtype`: its own, or a rounded copy.
pub(crate) fn in_dtype(x: &Tensor, dtype: DType, f: impl FnOnce(Slice)) {
    if x.dtype() == dtype {
        return f(x.slice());
    }
    with_scratch(x.elements() * dtype.size(), |bytes| {
        rows::cast(x.slice(), SliceMut::of_bytes(bytes, dtype));
        f(Slice::of_bytes(bytes, dtype));
    });
}
