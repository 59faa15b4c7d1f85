//! GELU (Hendrycks, Gimpel 2016), SiLU, squared ReLU (So et al. 2021) and SwiGLU (Shazeer 2020), with their gradients.
//!
//! The functions themselves are in `polynomial`, because a matmul's epilogue applies them too.

use super::pointwise::{Pointwise, pointwise};
use crate::cpu::Activation;
use crate::cpu::polynomial::{SQRT_2_OVER_PI, erf, exp, sigmoid};
use crate::cpu::simd::Simd;
use crate::dtype::{Slice, SliceMut};

/// x^3's factor in GELU's tanh form.
const CUBIC: f32 = 0.044715;
/// 1 / sqrt(2 pi).
const INV_SQRT_2PI: f32 = 0.398_942_3;

/// f'(x) of one vector.
#[inline(always)]
pub(crate) fn activate_gradient<S: Simd>(s: S, kind: Activation, x: S::V) -> S::V {
    let one = s.splat(1.0);
    match kind {
        Activation::GeluTanh => {
            // (1 + tanh u) / 2 = sigmoid(2 u), without the cancellation for negative u.
            let p = sigmoid(s, tanh_argument(s, x));
            let slope = s.fma(
                s.splat(6.0 * SQRT_2_OVER_PI * CUBIC),
                s.mul(x, x),
                s.splat(2.0 * SQRT_2_OVER_PI),
            );
            // d/dx [x p(2u)] = p + x p (1 - p) (2u)'
            s.fma(s.mul(x, slope), s.mul(p, s.sub(one, p)), p)
        }
        Activation::GeluErf => {
            let density = s.mul(
                s.splat(INV_SQRT_2PI),
                exp(s, s.mul(s.splat(-0.5), s.mul(x, x))),
            );
            s.fma(x, density, normal_cdf(s, x))
        }
        Activation::Relu2 => {
            let r = s.max_nan(x, s.zero());
            s.add(r, r)
        }
        Activation::Silu => {
            let p = sigmoid(s, x);
            s.fma(s.mul(x, p), s.sub(one, p), p)
        }
    }
}

/// 2 sqrt(2/pi) (x + 0.044715 x^3).
#[inline(always)]
fn tanh_argument<S: Simd>(s: S, x: S::V) -> S::V {
    let cubic = s.fma(s.splat(CUBIC), s.mul(x, x), s.splat(1.0));
    s.mul(s.mul(s.splat(2.0 * SQRT_2_OVER_PI), x), cubic)
}

/// (1 + erf(x / sqrt 2)) / 2.
#[inline(always)]
fn normal_cdf<S: Simd>(s: S, x: S::V) -> S::V {
    let e = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.fma(s.splat(0.5), e, s.splat(0.5))
}

#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct GeluErf;
#[derive(Clone, Copy)]
struct Relu2;
#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct Gradient<F>(F);

// One type a kind, so that the choice is made outside the loop.
macro_rules! kinds {
    ($($kind:ident),*) => {
        $(impl Pointwise<1, 1> for $kind {
            #[inline(always)]
            fn at<S: Simd>(self, s: S, [x]: [S::V; 1], _: [S::V; 1]) -> [S::V; 1] {
                [Activation::$kind.apply(s, x)]
            }
        }
        impl Pointwise<2, 1> for Gradient<$kind> {
            #[inline(always)]
            fn at<S: Simd>(self, s: S, [x, dy]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
                [s.mul(dy, activate_gradient(s, Activation::$kind, x))]
            }
        })*

        /// y = f(x) for the chosen f. Panics unless the lengths are equal.
        pub(crate) fn activation(kind: Activation, x: Slice, y: SliceMut) {
            match kind {
                $(Activation::$kind => pointwise($kind, [x], [y]),)*
            }
        }

        /// dx = dy f'(x). Panics unless the lengths are equal.
        pub(crate) fn activation_backward(kind: Activation, x: Slice, dy: Slice, dx: SliceMut) {
            match kind {
                $(Activation::$kind => pointwise(Gradient($kind), [x, dy], [dx]),)*
            }
        }
    };
}
kinds!(GeluTanh, GeluErf, Relu2, Silu);

#[derive(Clone, Copy)]
struct SwiGlu;
impl Pointwise<2, 1> for SwiGlu {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [gate, up]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        [s.mul(Activation::Silu.apply(s, gate), up)]
    }
}

/// y = silu(gate) up. Panics unless the lengths are equal.
pub(crate) fn swiglu(gate: Slice, up: Slice, y: SliceMut) {
    pointwise(SwiGlu, [gate, up], [y]);
}

impl Pointwise<3, 2> for Gradient<SwiGlu> {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [gate, up, dy]: [S::V; 3], _: [S::V; 2]) -> [S::V; 2] {
        let dgate = s.mul(s.mul(dy, up), activate_gradient(s, Activation::Silu, gate));
        [dgate, s.mul(dy, Activation::Silu.apply(s, gate))]
    }
}

/// dgate = dy up silu'(gate), dup = dy silu(gate). Panics unless the lengths are equal.
pub(crate) fn swiglu_backward(gate: Slice, up: Slice, dy: Slice, dgate: SliceMut, dup: SliceMut) {
    pointwise(Gradient(SwiGlu), [gate, up, dy], [dgate, dup]);
}
