//! Elementwise sums.

use super::activation::two_floats;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Cost, Linear, Op, Site};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
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

    fn passes_gradient(&self) -> bool {
        true
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::add(read(inputs[0]), read(inputs[1]), write(&mut outputs[0]));
    }
}
