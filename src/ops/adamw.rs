//! AdamW, one pass over a parameter and its state, in place. Not an [`Op`](super::Op): it has no result and no gradient.

use super::Cost;
use super::device::only_traced;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`,
/// `p -= lr (m' / (sqrt(v') + eps) + weight_decay p)` with `m' = m / (1 - beta1^step)`, `v' = v / (1 - beta2^step)`
/// (Loshchilov and Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Share of p, times lr, that is taken off; 0 for biases and norms by custom.
    pub weight_decay: f32,
    /// Number of this update, from 1.
    pub step: u64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step: 1,
        }
    }
}

impl AdamW {
    /// One update of p by the gradient g; p, m and v in f32, g in any float type, all of one shape.
    ///
    /// g is multiplied by `factor` f32 `[1]` first (see [`ClipFactor`](super::ClipFactor)); if that is not finite, p, m and v
    /// keep their values.
    ///
    /// # Panics
    /// If shapes differ, a tensor is shared, or p, m or v is not f32.
    pub fn update(
        &self,
        p: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        g: &Tensor,
        factor: Option<&Tensor>,
    ) {
        for (name, other) in [("m", &*m), ("v", &*v), ("g", g)] {
            same_shape("adamw", p, name, other);
        }
        if only_traced([g].into_iter().chain(factor), [&*p, &*m, &*v]) {
            return;
        }
        #[cfg(feature = "gpu")]
        if p.is_on_gpu() {
            let state = [write(p), write(m), write(v)];
            return gpu::adamw(state, read(g), factor.map(read), self.constants());
        }
        rows::adamw(
            p.slice_mut().typed(),
            m.slice_mut().typed(),
            v.slice_mut().typed(),
            g.slice(),
            rows::AdamW {
                lr: self.lr,
                beta1: self.beta1,
                beta2: self.beta2,
                eps: self.eps,
                weight_decay: self.weight_decay,
                step: self.step,
            },
            number(factor),
        );
    }

    #[cfg(feature = "gpu")]
    fn constants(&self) -> gpu::AdamWStep {
        assert!(self.step > 0, "the first step is number 1");
        let step = i32::try_from(self.step).unwrap_or(i32::MAX);
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(step);
        gpu::AdamWStep {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            keep: (1.0 - self.lr as f64 * self.weight_decay as f64) as f32,
            rate: (self.lr as f64 / correction(self.beta1)) as f32,
            root: (1.0 / correction(self.beta2)) as f32,
        }
    }

    /// The cost of [`AdamW::update`] for a parameter and a gradient of these types.
    pub fn cost(&self, p: &TensorType, g: &TensorType) -> Cost {
        Cost {
            flops: 14 * p.elements() as u64,
            bytes: 6 * p.bytes() + g.bytes(),
            scratch: 0,
        }
    }
}

pub(crate) fn same_shape(op: &str, p: &Tensor, name: &str, other: &Tensor) {
    assert_eq!(
        p.shape(),
        other.shape(),
        "{op}: the parameter is {}, {name} is {}",
        p.ty(),
        other.ty()
    );
}

pub(crate) fn number(factor: Option<&Tensor>) -> f32 {
    factor.map_or(1.0, |f| f.slice().typed::<f32>()[0])
}
