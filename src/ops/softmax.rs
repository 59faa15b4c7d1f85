//! Probabilities over the last axis.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Op, Saved, Site, letters_besides, misfit};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y[j] = e^x[j] / sum over i of e^x[i]` of each row: x, y [.., c].
///
/// Letters: `abC->abC`. Backward: `dx = y (dy - sum over j of y[j] dy[j])`.
#[derive(Clone, Debug, Default)]
pub struct Softmax;

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x] if x.dtype.is_float() && x.rank() > 0 => Ok(vec![x.clone()]),
            _ => Err(misfit("softmax", "one float operand [.., c]", inputs)),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let lead = letters_besides(inputs[0].rank() - 1, "");
        Axes::new(&format!("{lead}C->{lead}C"))
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        // max; subtract, exp, add; divide.
        Cost::elementwise(inputs, outputs, 5)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let c = inputs[0].ty().last();
        rows::softmax(inputs[0].slice(), c, outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::OUTPUTS
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 4 * inputs[0].elements() as u64,
            bytes: 2 * outputs[0].bytes() + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (y, dy) = (backward.output(0), backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            let c = y.ty().last();
            rows::softmax_backward(y.slice(), dy.slice(), c, dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let c = inputs[0].ty().last();
        gpu::softmax(read(inputs[0]), c, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (y, dy) = (backward.output(0), read(backward.gradient(0)));
        if let Some(dx) = backward.want(0) {
            gpu::softmax_backward(read(y), dy, y.ty().last(), dx.operand().0);
        }
    }
}
