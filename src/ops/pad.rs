//! Zeros around a tensor along one axis: the opposite of [`SliceAxis`](super::SliceAxis).

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::slice::{Blocks, along};
use super::{Axes, Backward, Cost, Op, Site, misfit};
use crate::tensor::{Tensor, TensorType};

/// `y = 0 .., x, 0 ..` along `axis`: `before` zeros, x, `after` zeros. Floats.
///
/// Letters for axis 1 of three: `aBc->aBc`: that axis must be whole. Backward: dx is its part of dy.
#[derive(Clone, Debug)]
pub struct Pad {
    /// Which axis.
    pub axis: usize,
    /// Zeros in front.
    pub before: usize,
    /// Zeros behind.
    pub after: usize,
}

impl Pad {
    fn blocks(&self, whole: &[usize]) -> Blocks {
        Blocks::new(whole, self.axis, self.before..whole[self.axis] - self.after)
    }
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "pad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x] if self.axis < x.rank() && x.dtype.is_float() => {
                let mut shape = x.shape.clone();
                shape[self.axis] += self.before + self.after;
                Ok(vec![TensorType::new(shape, x.dtype)])
            }
            _ => {
                let wants = format!("one float operand with an axis {}", self.axis);
                Err(misfit("pad", wants, inputs))
            }
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        along(self.axis, inputs[0].rank(), 1)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let blocks = self.blocks(outputs[0].shape());
        super::sum::fill(outputs[0].slice_mut(), 0.0);
        blocks.put(inputs[0].slice(), outputs[0].slice_mut());
    }

    fn backward_cost(&self, inputs: &[TensorType], _: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 0,
            bytes: 2 * inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let blocks = self.blocks(dy.shape());
        if let Some(dx) = backward.want(0) {
            blocks.take(dy.slice(), dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let piece = self.blocks(outputs[0].shape()).piece();
        piece.put(read(inputs[0]), write(&mut outputs[0]), false);
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let piece = self.blocks(dy.shape()).piece();
        if let Some(dx) = backward.want(0) {
            piece.take(read(dy), dx.operand().0, false);
        }
    }
}
