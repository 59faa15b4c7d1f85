//! AdamW (Loshchilov, Hutter 2019) and SGD with momentum: one pass over parameters, states and gradients.

use super::pointwise::{Pointwise, pointwise};
use crate::dtype::{Slice, SliceMut};
use crate::simd::Simd;

/// The constants of an AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squared gradients.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
    /// Decoupled weight decay: p loses lr weight_decay p.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub step: u64,
}

/// With g' = factor g: m <- beta1 m + (1 - beta1) g', v <- beta2 v + (1 - beta2) g'^2,
/// p <- (1 - lr weight_decay) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps).
///
/// `factor` clips; where it is not finite, p, m and v keep their values. Panics unless all lengths are equal and step > 0.
pub fn adamw(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: Slice, constants: AdamW, factor: f32) {
    assert!(constants.step > 0, "the first step is number 1");
    if !factor.is_finite() {
        return;
    }
    let correction = |beta: f32| 1.0 - power(beta as f64, constants.step);
    let step = AdamWStep {
        factor,
        beta1: constants.beta1,
        beta2: constants.beta2,
        eps: constants.eps,
        keep: (1.0 - constants.lr as f64 * constants.weight_decay as f64) as f32,
        rate: (constants.lr as f64 / correction(constants.beta1)) as f32,
        root: (1.0 / correction(constants.beta2)) as f32,
    };
    pointwise(
        step,
        [g],
        [SliceMut::F32(p), SliceMut::F32(m), SliceMut::F32(v)],
    );
}

/// x^n by squaring: the same bits on every platform, which the standard library's power does not promise.
fn power(mut x: f64, mut n: u64) -> f64 {
    let mut y = 1.0;
    while n > 0 {
        if n % 2 == 1 {
            y *= x;
        }
        x *= x;
        n /= 2;
    }
    y
}

#[derive(Clone, Copy)]
struct AdamWStep {
    factor: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// 1 - lr weight_decay.
    keep: f32,
    /// lr / (1 - beta1^step).
    rate: f32,
    /// 1 / (1 - beta2^step).
    root: f32,
}

impl Pointwise<1, 3> for AdamWStep {
    const IN_PLACE: bool = true;
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [g]: [S::V; 1], [p, m, v]: [S::V; 3]) -> [S::V; 3] {
        let g = s.mul(g, s.splat(self.factor));
        let m = s.fma(s.splat(self.beta1), m, s.mul(s.splat(1.0 - self.beta1), g));
        let v = s.fma(
            s.splat(self.beta2),
            v,
            s.mul(s.splat(1.0 - self.beta2), s.mul(g, g)),
        );
        let root = s.add(s.sqrt(s.mul(v, s.splat(self.root))), s.splat(self.eps));
        let move_by = s.div(m, root);
        let p = s.neg_fma(s.splat(self.rate), move_by, s.mul(p, s.splat(self.keep)));
        [p, m, v]
    }
}

/// The constants of an SGD step.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the momentum, used where there is one.
    pub momentum: f32,
    /// Coupled weight decay: the gradient gains weight_decay p.
    pub weight_decay: f32,
}

/// With g' = factor g + weight_decay p: momentum <- coefficient momentum + g', p <- p - lr momentum; without a momentum,
/// p <- p - lr g'.
///
/// Where `factor` is not finite, p and the momentum keep their values. Panics unless all lengths are equal.
pub fn sgd(p: &mut [f32], momentum: Option<&mut [f32]>, g: Slice, constants: Sgd, factor: f32) {
    if !factor.is_finite() {
        return;
    }
    match momentum {
        Some(momentum) => pointwise(
            SgdStep { constants, factor },
            [g],
            [SliceMut::F32(p), SliceMut::F32(momentum)],
        ),
        None => pointwise(SgdStep { constants, factor }, [g], [SliceMut::F32(p)]),
    }
}

#[derive(Clone, Copy)]
struct SgdStep {
    constants: Sgd,
    factor: f32,
}

impl SgdStep {
    #[inline(always)]
    fn gradient<S: Simd>(self, s: S, g: S::V, p: S::V) -> S::V {
        s.fma(
            s.splat(self.constants.weight_decay),
            p,
            s.mul(g, s.splat(self.factor)),
        )
    }
}

impl Pointwise<1, 2> for SgdStep {
    const IN_PLACE: bool = true;
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [g]: [S::V; 1], [p, momentum]: [S::V; 2]) -> [S::V; 2] {
        let g = self.gradient(s, g, p);
        let momentum = s.fma(s.splat(self.constants.momentum), momentum, g);
        [s.neg_fma(s.splat(self.constants.lr), momentum, p), momentum]
    }
}

impl Pointwise<1, 1> for SgdStep {
    const IN_PLACE: bool = true;
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [g]: [S::V; 1], [p]: [S::V; 1]) -> [S::V; 1] {
        let g = self.gradient(s, g, p);
        [s.neg_fma(s.splat(self.constants.lr), g, p)]
    }
}
