//! Balance without a loss: the bias of a router's choice.

use super::super::Cost;
use super::super::adamw::same_shape;
use super::super::device::only_traced;
#[cfg(feature = "gpu")]
use super::super::device::{read, write};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `bias[e] += rate sign(mean - load[e])` between steps: experts that were asked too often become less attractive
/// (Wang et al. 2024, arXiv:2408.15664; DeepSeek-AI 2024, arXiv:2412.19437). No gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BalanceBias {
    /// How far a bias moves in a step.
    pub rate: f32,
    /// Assignments that each expert has under perfect balance.
    pub mean: f32,
}

impl BalanceBias {
    /// One update of the bias `[e]` by the load `[e]`: how many assignments asked for each expert. Both in f32.
    ///
    /// # Panics
    /// If shapes differ, or the bias is shared.
    pub fn update(&self, bias: &mut Tensor, load: &Tensor) {
        same_shape("balance_bias", bias, "the load", load);
        if only_traced([load], [&*bias]) {
            return;
        }
        #[cfg(feature = "gpu")]
        if bias.is_on_gpu() {
            return gpu::balance_bias(write(bias), read(load), self.rate, self.mean);
        }
        let load = load.slice().typed::<f32>();
        for (bias, load) in bias.slice_mut().typed::<f32>().iter_mut().zip(load) {
            let error = self.mean - load;
            if error > 0.0 {
                *bias += self.rate;
            } else if error < 0.0 {
                *bias -= self.rate;
            }
        }
    }

    /// The cost of [`BalanceBias::update`] for a bias of this type.
    pub fn cost(&self, bias: &TensorType) -> Cost {
        Cost {
            flops: 2 * bias.elements() as u64,
            bytes: 3 * bias.bytes(),
            scratch: 0,
        }
    }
}
