//! Multiples of a tensor: by a constant of the program, or by a number on the device.

use super::activation::one_float;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Saved, Site, misfit};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = factor x`. Backward: `dx = factor dy`.
#[derive(Clone, Debug)]
pub struct Scale {
    /// The constant.
    pub factor: f32,
}

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        one_float("scale", inputs)
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(1, &inputs[0]).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::scale(inputs[0].slice(), self.factor, outputs[0].slice_mut());
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        if let Some(dx) = backward.want(0) {
            rows::scale(dy.slice(), self.factor, dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::scale(read(inputs[0]), self.factor, None, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            gpu::scale(dy, self.factor, None, dx.operand().0);
        }
    }
}

/// `y = s x` with s `[1]` in f32, a number that the program computed: programs do not branch on it, they multiply by it.
///
/// Backward: `dx = s dy`; there is no gradient to s.
#[derive(Clone, Debug, Default)]
pub struct ScaleBy;

impl Op for ScaleBy {
    fn name(&self) -> &'static str {
        "scale_by"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, s] if x.dtype.is_float() && *s == super::sum::scalar() => Ok(vec![x.clone()]),
            _ => Err(misfit(
                "scale_by",
                "a float operand and a factor f32[1]",
                inputs,
            )),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let mut axes = Axes::elementwise(1, &inputs[0]).linear(Linear::Each);
        axes.inputs.push(vec!['Z']);
        axes
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let s = inputs[1].slice().typed::<f32>()[0];
        rows::scale(inputs[0].slice(), s, outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::some_inputs(&[1])
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (s, dy) = (backward.input(1), backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            let s = s.slice().typed::<f32>()[0];
            rows::scale(dy.slice(), s, dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let s = Some(read(inputs[1]));
        gpu::scale(read(inputs[0]), 1.0, s, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let s = Some(read(backward.input(1)));
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            gpu::scale(dy, 1.0, s, dx.operand().0);
        }
    }
}
