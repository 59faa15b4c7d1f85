//! Elementwise products.

use super::activation::two_floats;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Saved, Site};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = a b` element by element: a and b of one shape, y in the type of a.
///
/// Backward: `da = dy b`, `db = dy a`.
#[derive(Clone, Debug, Default)]
pub struct Multiply;

impl Op for Multiply {
    fn name(&self) -> &'static str {
        "multiply"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        two_floats("multiply", inputs)
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(2, &inputs[0]).linear(Linear::Each)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::multiply(inputs[0].slice(), inputs[1].slice(), outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let y = &outputs[0];
        let count = wanted.iter().filter(|w| **w).count() as u64;
        let operands = inputs[0].bytes() + inputs[1].bytes();
        Cost {
            flops: count * y.elements() as u64,
            bytes: count * (y.bytes() + operands),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        for i in 0..2 {
            let other = backward.input(1 - i);
            if let Some(gradient) = backward.want(i) {
                let out = gradient.tensor.slice_mut();
                rows::multiply(dy.slice(), other.slice(), out);
            }
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::multiply(read(inputs[0]), read(inputs[1]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        for i in 0..2 {
            let other = read(backward.input(1 - i));
            if let Some(gradient) = backward.want(i) {
                gpu::multiply(dy.clone(), other, gradient.operand().0);
            }
        }
    }
}
