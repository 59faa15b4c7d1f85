//! From the global sum of squares to the factor that clips gradients, on the device: no program branches on it.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::sum::scalar;
use super::{Axes, Cost, Op, Site, misfit};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `norm = sqrt(s)`, `factor = min(1, max_norm / (norm + 1e-6))`: s f32 `[1]`, the sum of squares over all gradients (see
/// [`SumOfSquares`](super::SumOfSquares)), reduced over the chips. Results: factor and norm, f32 `[1]` each (Pascanu et al.
/// 2013).
///
/// If s is infinite or not a number, factor is NaN: an optimizer that is given it keeps all old values. No gradient.
#[derive(Clone, Debug)]
pub struct ClipFactor {
    /// The norm that is left alone; infinite to never clip (a gradient that is not finite still gives NaN).
    pub max_norm: f32,
}

impl Op for ClipFactor {
    fn name(&self) -> &'static str {
        "clip_factor"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [s] if *s == scalar() => Ok(vec![scalar(), scalar()]),
            _ => Err(misfit("clip_factor", "a sum of squares f32[1]", inputs)),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("Z->Z,Z")
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 2)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let norm = inputs[0].slice().typed::<f32>()[0].sqrt();
        let factor = if norm.is_finite() {
            (self.max_norm / (norm + 1e-6)).min(1.0)
        } else {
            f32::NAN
        };
        outputs[0].slice_mut().typed::<f32>()[0] = factor;
        outputs[1].slice_mut().typed::<f32>()[0] = norm;
    }

    fn differentiable(&self, _: usize) -> bool {
        false
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [factor, norm] = outputs else {
            unreachable!("infer gives two results")
        };
        gpu::clip_factor(read(inputs[0]), self.max_norm, write(factor), write(norm));
    }
}
