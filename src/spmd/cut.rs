//! Pieces of a dimension: cut out, laid one behind the other, and put back.
//!
//! On a graphics processor the device cuts out and lays in a row what is not on the host anyway, so that the program waits for no
//! copy. What arrived from other chips is put back on the host, where it is.

use crate::dtype::TensorType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::ops::device::only_traced;
#[cfg(feature = "gpu")]
use crate::ops::device::{read, write};
use crate::tensor::Tensor;
use std::ops::Range;

/// A tensor seen as [outer, len, inner]: what is before a dimension, the dimension, and the bytes behind it.
pub(super) struct Cut {
    outer: usize,
    len: usize,
    /// Bytes of one index of the dimension.
    inner: usize,
    size: usize,
}

impl Cut {
    pub(super) fn of(ty: &TensorType, dim: usize) -> Self {
        let size = ty.dtype.size();
        let inner: usize = ty.shape[dim + 1..].iter().product();
        Cut {
            outer: ty.shape[..dim].iter().product(),
            len: ty.shape[dim],
            inner: inner * size,
            size,
        }
    }

    /// Product of the sizes before the dimension: 1 if its pieces are runs of memory.
    pub(super) fn outer(&self) -> usize {
        self.outer
    }

    /// Elements per index of the dimension.
    pub(super) fn rest(&self) -> usize {
        self.outer * (self.inner / self.size)
    }

    /// The three sizes, in elements.
    #[cfg(feature = "gpu")]
    fn elements(&self) -> [usize; 3] {
        [self.outer, self.len, self.inner / self.size]
    }

    /// Bytes of `len` indices of the dimension.
    fn bytes_of(&self, len: usize) -> usize {
        self.outer * len * self.inner
    }

    /// The piece `range` of `x`, on the device if it has all of x.
    pub(super) fn piece(&self, x: &Tensor, range: Range<usize>, piece: &mut Tensor) {
        if !x.is_on_host_alone() {
            let traced = only_traced([x], [&*piece]);
            #[cfg(feature = "gpu")]
            if !traced {
                gpu::pieces(read(x), self.elements(), &[range], write(piece));
            }
            let _ = traced;
            return;
        }
        if !x.is_ghost() {
            self.take(x.bytes(), range, piece.bytes_mut());
        }
        if x.is_fresh_from_another() {
            piece.has_arrived();
        }
    }

    /// The pieces `ranges` of `x`, which are all of it, one behind the other: for whoever sends them.
    pub(super) fn pack(&self, x: &Tensor, ranges: &[Range<usize>], packed: &mut Tensor) {
        if !x.is_on_host() {
            let traced = only_traced([x], [&*packed]);
            #[cfg(feature = "gpu")]
            if !traced {
                gpu::pieces(read(x), self.elements(), ranges, write(packed));
            }
            let _ = traced;
            return;
        }
        if x.is_ghost() {
            return;
        }
        let mut rest = packed.bytes_mut();
        for range in ranges {
            let (piece, behind) = rest.split_at_mut(self.bytes_of(range.len()));
            self.take(x.bytes(), range.clone(), piece);
            rest = behind;
        }
    }

    /// What arrived as pieces `ranges`, one behind the other, as the tensor that they are.
    pub(super) fn unpack(&self, pieces: &Tensor, ranges: &[Range<usize>], tensor: &mut Tensor) {
        if !pieces.is_ghost() {
            let mut rest = pieces.bytes();
            for range in ranges {
                let (piece, behind) = rest.split_at(self.bytes_of(range.len()));
                self.put(piece, range.clone(), tensor.bytes_mut());
                rest = behind;
            }
        }
        tensor.has_arrived();
    }

    fn take(&self, from: &[u8], range: Range<usize>, to: &mut [u8]) {
        let run = range.len() * self.inner;
        for (o, piece) in to.chunks_exact_mut(run.max(1)).enumerate() {
            let at = (o * self.len + range.start) * self.inner;
            piece.copy_from_slice(&from[at..at + run]);
        }
    }

    fn put(&self, from: &[u8], range: Range<usize>, to: &mut [u8]) {
        let run = range.len() * self.inner;
        for (o, piece) in from.chunks_exact(run.max(1)).enumerate() {
            let at = (o * self.len + range.start) * self.inner;
            to[at..at + run].copy_from_slice(piece);
        }
    }
}

/// Tensors of one type one behind the other: for whoever sends them as one.
pub(super) fn in_a_row(parts: &[Tensor], row: &mut Tensor) {
    if !parts.iter().all(Tensor::is_on_host) {
        let traced = only_traced(parts, [&*row]);
        #[cfg(feature = "gpu")]
        if !traced {
            let parts: Vec<gpu::Operand> = parts.iter().map(read).collect();
            gpu::in_a_row(&parts, write(row));
        }
        let _ = traced;
        return;
    }
    if row.is_ghost() {
        return;
    }
    let mut rest = row.bytes_mut();
    for part in parts {
        let (place, behind) = rest.split_at_mut(part.bytes().len());
        place.copy_from_slice(part.bytes());
        rest = behind;
    }
}

/// Elements `first` and on of what arrived in a row.
pub(super) fn out_of_a_row(row: &Tensor, first: usize, part: &mut Tensor) {
    if !row.is_ghost() {
        let size = part.dtype().size();
        let len = part.elements() * size;
        let bytes = &row.bytes()[first * size..][..len];
        part.bytes_mut().copy_from_slice(bytes);
    }
    part.has_arrived();
}
