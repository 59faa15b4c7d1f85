//! Stochastic gradient descent, in place.

use super::Cost;
use super::adamw::{number, same_shape};
use super::device::only_traced;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `u = momentum u + g + weight_decay p`, `p -= lr u`; without momentum u is not kept (Robbins and Monro 1951, Polyak
/// 1964).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the sum of gradients; used if a momentum tensor is given.
    pub momentum: f32,
    /// Multiple of p that is added to the gradient.
    pub weight_decay: f32,
}

impl Sgd {
    /// One update of p by the gradient g; p and the momentum in f32, g in any float type, all of one shape.
    ///
    /// g is multiplied by `factor` f32 `[1]` first; if that is not finite, p and the momentum keep their values.
    ///
    /// # Panics
    /// If shapes differ, a tensor is shared, or p or the momentum is not f32.
    pub fn update(
        &self,
        p: &mut Tensor,
        momentum: Option<&mut Tensor>,
        g: &Tensor,
        factor: Option<&Tensor>,
    ) {
        same_shape("sgd", p, "g", g);
        if let Some(u) = momentum.as_deref() {
            same_shape("sgd", p, "the momentum", u);
        }
        let writes = [&*p].into_iter().chain(momentum.as_deref());
        if only_traced([g].into_iter().chain(factor), writes) {
            return;
        }
        #[cfg(feature = "gpu")]
        if p.is_on_gpu() {
            let constants = [self.lr, self.momentum, self.weight_decay];
            let momentum = momentum.map(write);
            return gpu::sgd(write(p), momentum, read(g), factor.map(read), constants);
        }
        rows::sgd(
            p.slice_mut().typed(),
            momentum.map(|u| u.slice_mut().typed()),
            g.slice(),
            rows::Sgd {
                lr: self.lr,
                momentum: self.momentum,
                weight_decay: self.weight_decay,
            },
            number(factor),
        );
    }

    /// The cost of [`Sgd::update`] for a parameter and a gradient of these types.
    pub fn cost(&self, p: &TensorType, g: &TensorType, momentum: bool) -> Cost {
        let tensors = if momentum { 4 } else { 2 };
        Cost {
            flops: (5 + 2 * momentum as u64) * p.elements() as u64,
            bytes: tensors * p.bytes() + g.bytes(),
            scratch: 0,
        }
    }
}
