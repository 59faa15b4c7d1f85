//! Sums over all elements, in an order that depends on nothing but their number.

use super::activation::one_float;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Saved, Site, letters, misfit};
use crate::cpu::rows;
use crate::dtype::{DType, Float, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// The type of a number on the device: `f32[1]`.
pub fn scalar() -> TensorType {
    TensorType::new([1], DType::F32)
}

/// Letters of a reduction over everything: a split operand gives a partial sum.
pub(crate) fn reduction(x: &TensorType) -> Axes {
    let all: String = letters(x.rank()).collect();
    Axes::new(&format!("{all}->Z"))
}

/// `y = sum of all x`: x of any shape, y f32 `[1]`.
///
/// Blocks of 4096 elements are summed in 32 lanes each and combined by a fixed binary tree, in f32. Backward: `dx = dy`
/// everywhere.
#[derive(Clone, Debug, Default)]
pub struct Sum;

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        one_float("sum", inputs).map(|_| vec![scalar()])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        reduction(&inputs[0]).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        outputs[0].slice_mut().typed::<f32>()[0] = rows::sum(inputs[0].slice());
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        let mut cost = self.cost(inputs, outputs);
        cost.flops = 0;
        cost
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0).slice().typed::<f32>()[0];
        if let Some(dx) = backward.want(0) {
            fill(dx.tensor.slice_mut(), dy);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::sum(read(inputs[0]), false, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            gpu::fill(0.0, Some(dy), dx.operand().0);
        }
    }
}

/// `x = value` everywhere.
pub(crate) fn fill(x: SliceMut, value: f32) {
    match x {
        SliceMut::F32(x) => x.fill(value),
        SliceMut::Bf16(x) => x.fill(Float::from_f32(value)),
        SliceMut::F16(x) => x.fill(Float::from_f32(value)),
        SliceMut::U32(_) => panic!("floats are filled, not indices"),
    }
}

/// `y = sum of all x^2`: x of any shape, y f32 `[1]`, in the order of [`Sum`]. A part of the global gradient norm; split
/// operands give partial sums. Backward: `dx = 2 x dy`.
#[derive(Clone, Debug, Default)]
pub struct SumOfSquares;

impl Op for SumOfSquares {
    fn name(&self) -> &'static str {
        "sum_of_squares"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        one_float("sum_of_squares", inputs).map(|_| vec![scalar()])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        reduction(&inputs[0])
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 2)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        outputs[0].slice_mut().typed::<f32>()[0] = rows::sum_of_squares(inputs[0].slice());
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn backward_cost(&self, inputs: &[TensorType], _: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: inputs[0].elements() as u64,
            bytes: 2 * inputs[0].bytes() + 4,
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let x = backward.input(0);
        let dy = backward.gradient(0).slice().typed::<f32>()[0];
        if let Some(dx) = backward.want(0) {
            rows::scale(x.slice(), 2.0 * dy, dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::sum(read(inputs[0]), true, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (x, dy) = (read(backward.input(0)), read(backward.gradient(0)));
        if let Some(dx) = backward.want(0) {
            gpu::scale(x, 2.0, Some(dy), dx.operand().0);
        }
    }
}

/// `count = how many labels are not ignored`: labels [..] in u32, count f32 `[1]` (exact up to 2^24). No gradient.
#[derive(Clone, Debug)]
pub struct CountLabels {
    /// The label that does not count.
    pub ignored: u32,
}

impl Default for CountLabels {
    fn default() -> Self {
        CountLabels { ignored: u32::MAX }
    }
}

impl Op for CountLabels {
    fn name(&self) -> &'static str {
        "count_labels"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [labels] if labels.dtype == DType::U32 => Ok(vec![scalar()]),
            _ => Err(misfit("count_labels", "labels [..] in u32", inputs)),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        reduction(&inputs[0])
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let labels = inputs[0].slice().typed::<u32>();
        let count = labels.iter().filter(|&&l| l != self.ignored).count();
        outputs[0].slice_mut().typed::<f32>()[0] = count as f32;
    }

    fn differentiable(&self, _: usize) -> bool {
        false
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::count_labels(read(inputs[0]), self.ignored, write(&mut outputs[0]));
    }
}
