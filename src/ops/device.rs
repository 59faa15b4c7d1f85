//! Where an op runs: on the device that holds its results.

#[cfg(feature = "gpu")]
use super::{Accum, Gradient};
use super::{Backward, Op, Site};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu::{self, Operand};
use crate::tensor::Tensor;

/// Brings what is read to the device that computes. In a ghost this, and that the rest is written, is all that happens: true
/// there.
///
/// All operands go, also those of which a kernel may read nothing: what is copied then follows from the program alone, and a
/// ghost counts it.
pub(crate) fn only_traced<'a>(
    reads: impl IntoIterator<Item = &'a Tensor>,
    writes: impl IntoIterator<Item = &'a Tensor>,
) -> bool {
    reads.into_iter().for_each(Tensor::upload);
    let mut writes = writes.into_iter().peekable();
    let ghost = writes.peek().is_some_and(|y| y.is_ghost());
    if ghost {
        writes.for_each(Tensor::overwrite);
    }
    ghost
}

/// Computes the results of `op` where they live.
pub(crate) fn forward(op: &dyn Op, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
    if only_traced(inputs.iter().copied(), outputs.iter()) {
        return;
    }
    #[cfg(feature = "gpu")]
    if outputs.iter().any(Tensor::is_on_gpu) {
        return op.forward_gpu(site, inputs, outputs);
    }
    op.forward(site, inputs, outputs);
}

/// Computes the wanted gradients of `op` where they live.
pub(crate) fn backward(op: &dyn Op, site: &Site, backward: &mut Backward) {
    let operands = [backward.inputs, backward.outputs, backward.gradients];
    let reads = operands.into_iter().flatten().flatten();
    let writes = backward.wanted.iter().flatten().map(|g| &g.tensor);
    if only_traced(reads, writes) {
        return;
    }
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
    if only_traced([x], [&*sum]) {
        return;
    }
    #[cfg(feature = "gpu")]
    if sum.is_on_gpu() {
        return gpu::add_assign(write(sum), read(x));
    }
    rows::add_assign(sum.slice_mut(), x.slice());
}

/// `y = x` in the type of y, both floats.
pub(crate) fn cast(x: &Tensor, y: &mut Tensor) {
    if only_traced([x], [&*y]) {
        return;
    }
    #[cfg(feature = "gpu")]
    if y.is_on_gpu() {
        return gpu::cast(read(x), write(y));
    }
    rows::cast(x.slice(), y.slice_mut());
}

/// `y = x`, of one type.
pub(crate) fn copy(x: &Tensor, y: &mut Tensor) {
    if only_traced([x], [&*y]) {
        return;
    }
    #[cfg(feature = "gpu")]
    if y.is_on_gpu() {
        return gpu::cast(read(x), write(y));
    }
    y.bytes_mut().copy_from_slice(x.bytes());
}

/// Zeros, of a float tensor.
pub(crate) fn clear(x: &mut Tensor) {
    if only_traced([], [&*x]) {
        return;
    }
    #[cfg(feature = "gpu")]
    if x.is_on_gpu() {
        return gpu::fill(0.0, None, write(x));
    }
    x.bytes_mut().fill(0);
}

/// Copies rows of x [b, n, ..] to tokens `starts[b]` and on of a cache [b, capacity, ..].
pub(crate) fn write_tokens(x: &Tensor, starts: &[usize], cache: &mut Tensor) {
    if only_traced([x], [&*cache]) {
        return;
    }
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
