//! The same numbers in another element type.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Site, misfit, with_dtype};
use crate::cpu::rows;
use crate::dtype::DType;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = x` rounded to `dtype`, to nearest with ties to even.
///
/// A partial sum passes through: it then travels, and loses precision, in the new type. Backward: `dx = dy` in the type of
/// dx, so the gradient of an f32 parameter that a bf16 product uses comes back in f32.
#[derive(Clone, Debug)]
pub struct Cast {
    /// Element type of the result.
    pub dtype: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x] if x.dtype.is_float() && self.dtype.is_float() => {
                Ok(vec![with_dtype(x, self.dtype)])
            }
            _ => Err(misfit(
                "cast",
                format!(
                    "one float operand to turn into floats, asked for {}",
                    self.dtype
                ),
                inputs,
            )),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(1, &inputs[0]).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::cast(inputs[0].slice(), outputs[0].slice_mut());
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        if let Some(dx) = backward.want(0) {
            dx.put(dy.slice());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::cast(read(inputs[0]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            dx.put_gpu(dy);
        }
    }
}
