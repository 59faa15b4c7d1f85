//! The logistic function by itself: scores of a router.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Op, Saved, Site, misfit};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = 1 / (1 + e^-x)`, x and y of one shape and type.
///
/// Backward: `dx = dy y (1 - y)`.
#[derive(Clone, Debug, Default)]
pub struct Sigmoid;

impl Op for Sigmoid {
    fn name(&self) -> &'static str {
        "sigmoid"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x] if x.dtype.is_float() => Ok(vec![x.clone()]),
            _ => Err(misfit("sigmoid", "one float operand", inputs)),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(1, &inputs[0])
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        // negate, exp, add, divide
        Cost::elementwise(inputs, outputs, 4)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::sigmoid(inputs[0].slice(), outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::OUTPUTS
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 3 * inputs[0].elements() as u64,
            bytes: 2 * outputs[0].bytes() + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (y, dy) = (backward.output(0), backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            rows::sigmoid_backward(y.slice(), dy.slice(), dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::sigmoid(read(inputs[0]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (y, dy) = (read(backward.output(0)), read(backward.gradient(0)));
        if let Some(dx) = backward.want(0) {
            gpu::sigmoid_backward(y, dy, dx.operand().0);
        }
    }
}
