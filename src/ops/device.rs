//! Where an op runs: on the device that holds its results.

#[cfg(feature = "gpu")]
use super::{Accum, Gradient};
use super::{Backward, Op, Site};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu::{self, Operand};
use crate::tensor::Tensor;

/// Computes the results of `op` where they live.
pub(crate) fn forward(op: &dyn Op, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
    #[cfg(feature = "gpu")]
    if outputs.iter().any(Tensor::is_on_gpu) {
        return op.forward_gpu(site, inputs, outputs);
    }
    op.forward(site, inputs, outputs);
}

/// Computes the wanted gradients of `op` where they live.
pub(crate) fn backward(op: &dyn Op, site: &Site, backward: &mut Backward) {
    #[cfg(feature = "gpu")]
    if backward
        .wanted
        .iter()
        .flatten()
        .any(|g| g.tensor.is_on_gpu())
    {
        return op.backward_gpu(site, backward);
    }
    op.backward(site, backward);
}

/// `sum += x`, both float tensors of one shape.
pub(crate) fn add_assign(sum: &mut Tensor, x: &Tensor) {
    #[cfg(feature = "gpu")]
    if sum.is_on_gpu() {
        return gpu::add_assign(write(sum), read(x));
    }
    rows::add_assign(sum.slice_mut(), x.slice());
}

/// `y = x` in the type of y, both floats.
pub(crate) fn cast(x: &Tensor, y: &mut Tensor) {
    #[cfg(feature = "gpu")]
    if y.is_on_gpu() {
        return gpu::cast(read(x), write(y));
    }
    rows::cast(x.slice(), y.slice_mut());
}

/// `y = x`, of one type.
pub(crate) fn copy(x: &Tensor, y: &mut Tensor) {
    #[cfg(feature = "gpu")]
    if y.is_on_gpu() {
        return gpu::cast(read(x), write(y));
    }
    y.bytes_mut().copy_from_slice(x.bytes());
}

/// Copies x to the elements of y, of its type, from `at` on.
pub(crate) fn place(x: &Tensor, y: &mut Tensor, at: usize) {
    let size = x.dtype().size();
    #[cfg(feature = "gpu")]
    if y.is_on_gpu() && x.is_on_gpu() && size == 4 {
        return gpu::place(read(x), write(y), at);
    }
    let place = at * size..at * size + x.ty().bytes() as usize;
    y.bytes_mut()[place].copy_from_slice(x.bytes());
}

/// Zeros, of a float tensor.
pub(crate) fn clear(x: &mut Tensor) {
    #[cfg(feature = "gpu")]
    if x.is_on_gpu() {
        return gpu::fill(0.0, None, write(x));
    }
    x.bytes_mut().fill(0);
}

/// Copies rows of x [b, n, ..] to tokens `starts[b]` and on of a cache [b, capacity, ..].
pub(crate) fn write_tokens(x: &Tensor, starts: &[usize], cache: &mut Tensor) {
    let line: usize = x.shape()[2..].iter().product();
    let (b, n) = (x.shape()[0], x.shape()[1]);
    let inner = cache.shape()[1] * line;
    #[cfg(feature = "gpu")]
    if cache.is_on_gpu() {
        let starts: Vec<usize> = starts[..b].iter().map(|s| s * line).collect();
        return gpu::write_tokens(read(x), &starts, inner, write(cache));
    }
    let size = x.dtype().size();
    let (from, to) = (x.bytes(), cache.bytes_mut());
    for (b, start) in starts[..b].iter().enumerate() {
        let row = &from[b * n * line * size..][..n * line * size];
        to[(b * inner + start * line) * size..][..row.len()].copy_from_slice(row);
    }
}

/// The tensor for a kernel to read.
#[cfg(feature = "gpu")]
pub(crate) fn read(x: &Tensor) -> Operand {
    x.operand()
        .unwrap_or_else(|| panic!("{x:?} is not on the graphics processor that computes with it"))
}

/// The tensor for a kernel to write.
#[cfg(feature = "gpu")]
pub(crate) fn write(y: &mut Tensor) -> Operand {
    let what = format!("{y:?}");
    y.operand_mut()
        .unwrap_or_else(|| panic!("{what} is not on the graphics processor that computes it"))
}

#[cfg(feature = "gpu")]
impl Gradient {
    /// The gradient for a kernel to write, and whether to add to it.
    pub(crate) fn operand(&mut self) -> (Operand, bool) {
        (write(&mut self.tensor), self.accum == Accum::Add)
    }

    /// Puts x, or adds it.
    pub(crate) fn put_gpu(&mut self, x: Operand) {
        match self.operand() {
            (y, true) => gpu::add_assign(y, x),
            (y, false) => gpu::cast(x, y),
        }
    }
}
