//! Elementwise sums.

use super::activation::two_floats;
use super::{Axes, Backward, Cost, Linear, Op, Site};
use crate::cpu::rows;
use crate::tensor::{Tensor, TensorType};

/// `y = a + b`: a and b of one shape, y in the type of a. The sum is in f32, rounded once.
///
/// Partial sums pass through if both operands are. Backward: `da = db = dy`.
#[derive(Clone, Debug, Default)]
pub struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        two_floats("add", inputs)
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(2, &inputs[0]).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::add(inputs[0].slice(), inputs[1].slice(), outputs[0].slice_mut());
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let written = inputs.iter().zip(wanted).filter(|(_, w)| **w);
        Cost {
            flops: 0,
            bytes: written.map(|(x, _)| x.bytes() + outputs[0].bytes()).sum(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        for gradient in backward.wanted.iter_mut().flatten() {
            gradient.put(dy.slice());
        }
    }
}
