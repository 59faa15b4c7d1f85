//! Tensors for kernels to be timed on, and numbers from them to be checked.

use supernode::dtype::{Slice, SliceMut};
use supernode::ops::{Local, Op, Site};
use supernode::random::Stream;
use supernode::reference::rounding;
use supernode::spmd::Chip;
use supernode::tensor::{Tensor, TensorType};
use supernode::{DType, bf16, f16};

/// Unit roundoff of the arithmetic in every kernel.
pub(super) const U: f64 = DType::F32.roundoff();

/// A tensor whose contents are not yet written.
pub(super) fn unwritten(chip: &Chip, ty: &TensorType) -> Tensor {
    let tensor = chip.memory().allocate(ty);
    tensor.unwrap_or_else(|e| chip.fail(e))
}

/// Normal numbers, rounded to `dtype`.
pub(super) fn normal(chip: &Chip, name: &str, shape: &[usize], dtype: DType) -> Tensor {
    let mut tensor = unwritten(chip, &TensorType::new(shape, dtype));
    let stream = Stream::new(0, name);
    match tensor.slice_mut() {
        SliceMut::F32(x) => stream.fill_normal(0, x),
        SliceMut::Bf16(x) => narrow(&stream, x, bf16::from_f32),
        SliceMut::F16(x) => narrow(&stream, x, f16::from_f32),
        SliceMut::U32(_) => unreachable!("cases compute on floats"),
    }
    tensor
}

fn narrow<T>(stream: &Stream, x: &mut [T], round: fn(f32) -> T) {
    let mut wide = [0.0; 1024];
    for (i, x) in x.chunks_mut(wide.len()).enumerate() {
        let wide = &mut wide[..x.len()];
        stream.fill_normal((i * 1024) as u64, wide);
        x.iter_mut().zip(wide).for_each(|(x, w)| *x = round(*w));
    }
}

/// `len` elements from `start` on.
pub(super) fn numbers(tensor: &Tensor, start: usize, len: usize) -> Vec<f64> {
    let range = start..start + len;
    match tensor.slice() {
        Slice::F32(x) => x[range].iter().map(|&x| x.into()).collect(),
        Slice::Bf16(x) => x[range].iter().map(|x| x.to_f64()).collect(),
        Slice::F16(x) => x[range].iter().map(|x| x.to_f64()).collect(),
        Slice::U32(x) => x[range].iter().map(|&x| x.into()).collect(),
    }
}

/// The bounds of `want`, and what rounding to `dtype` adds to them.
pub(super) fn stored(dtype: DType, want: &[f64], bound: Vec<f64>) -> Vec<f64> {
    let with_rounding = |(b, w): (f64, &f64)| b + rounding(dtype, w.abs() + b);
    bound.into_iter().zip(want).map(with_rounding).collect()
}

/// Up to eight of the indices below n: the first and the last, where tiles are ragged, and some between.
pub(super) fn some_of(n: usize, name: &str) -> Vec<usize> {
    let stream = Stream::new(1, name);
    let mut some: Vec<usize> = (0..6).map(|i| stream.below(i, n as u64) as usize).collect();
    some.extend([0, n - 1]);
    some.sort_unstable();
    some.dedup();
    some
}

/// An op on one chip's whole tensors, as often as wanted.
pub(super) struct Call<'a, O> {
    pub(super) op: &'a O,
    pub(super) inputs: Vec<&'a Tensor>,
    input_locals: Vec<Local>,
    output_locals: Vec<Local>,
    /// The results, unwritten until [`Call::forward`].
    pub(super) outputs: Vec<Tensor>,
}

impl<'a, O: Op> Call<'a, O> {
    pub(super) fn new(chip: &Chip, op: &'a O, inputs: Vec<&'a Tensor>) -> Self {
        let types: Vec<TensorType> = inputs.iter().map(|x| x.ty().clone()).collect();
        let results = op.infer(&types).unwrap_or_else(|why| panic!("{why}"));
        Call {
            op,
            inputs,
            outputs: results.iter().map(|ty| unwritten(chip, ty)).collect(),
            input_locals: types.into_iter().map(Local::whole).collect(),
            output_locals: results.into_iter().map(Local::whole).collect(),
        }
    }

    /// What the op is told about where it runs.
    pub(super) fn site(&self) -> Site<'_> {
        Site {
            inputs: &self.input_locals,
            outputs: &self.output_locals,
            seed: 0,
        }
    }

    /// Computes the results.
    pub(super) fn forward(&mut self) {
        let site = Site {
            inputs: &self.input_locals,
            outputs: &self.output_locals,
            seed: 0,
        };
        #[cfg(feature = "gpu")]
        if self.outputs[0].is_on_gpu() {
            return self.op.forward_gpu(&site, &self.inputs, &mut self.outputs);
        }
        self.op.forward(&site, &self.inputs, &mut self.outputs);
    }

    /// Bytes of the operands and of the results.
    pub(super) fn bytes(&self) -> [u64; 2] {
        let bytes = |locals: &[Local]| locals.iter().map(|l| l.ty.bytes()).sum();
        [bytes(&self.input_locals), bytes(&self.output_locals)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_hold_both_ends() {
        assert_eq!(some_of(1, "x"), [0]);
        assert_eq!(some_of(2, "x"), [0, 1]);
        let some = some_of(1000, "x");
        assert!(
            some.len() > 4 && some[0] == 0 && some.last() == Some(&999),
            "{some:?}"
        );
    }
}
