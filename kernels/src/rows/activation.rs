//! GELU (Hendrycks, Gimpel 2016), SiLU, squared ReLU (So et al. 2021) and SwiGLU (Shazeer 2020), with their gradients.
//!
//! The functions themselves are in `polynomial`, because a matmul's epilogue applies them too.

use super::pointwise::{Pointwise, pointwise};
use crate::Activation;
use crate::dtype::{Slice, SliceMut};
use crate::polynomial;
use crate::simd::Simd;

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
                [s.mul(dy, Activation::$kind.slope(s, x))]
            }
        })*

        /// y = f(x) for the chosen f. Panics unless the lengths are equal.
        pub fn activation(kind: Activation, x: Slice, y: SliceMut) {
            match kind {
                $(Activation::$kind => pointwise($kind, [x], [y]),)*
            }
        }

        /// dx = dy f'(x). Panics unless the lengths are equal.
        pub fn activation_backward(kind: Activation, x: Slice, dy: Slice, dx: SliceMut) {
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
pub fn swiglu(gate: Slice, up: Slice, y: SliceMut) {
    pointwise(SwiGlu, [gate, up], [y]);
}

impl Pointwise<3, 2> for Gradient<SwiGlu> {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [gate, up, dy]: [S::V; 3], _: [S::V; 2]) -> [S::V; 2] {
        let dgate = s.mul(s.mul(dy, up), Activation::Silu.slope(s, gate));
        [dgate, s.mul(dy, Activation::Silu.apply(s, gate))]
    }
}

/// dgate = dy up silu'(gate), dup = dy silu(gate). Panics unless the lengths are equal.
pub fn swiglu_backward(gate: Slice, up: Slice, dy: Slice, dgate: SliceMut, dup: SliceMut) {
    pointwise(Gradient(SwiGlu), [gate, up, dy], [dgate, dup]);
}

#[derive(Clone, Copy)]
struct Sigmoid;
impl Pointwise<1, 1> for Sigmoid {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [x]: [S::V; 1], _: [S::V; 1]) -> [S::V; 1] {
        [polynomial::sigmoid(s, x)]
    }
}

/// y = 1 / (1 + e^-x). Panics unless the lengths are equal.
pub fn sigmoid(x: Slice, y: SliceMut) {
    pointwise(Sigmoid, [x], [y]);
}

impl Pointwise<2, 1> for Gradient<Sigmoid> {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [y, dy]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        let slope = s.neg_fma(y, y, y);
        [s.mul(dy, slope)]
    }
}

/// dx = dy y (1 - y). Panics unless the lengths are equal.
pub fn sigmoid_backward(y: Slice, dy: Slice, dx: SliceMut) {
    pointwise(Gradient(Sigmoid), [y, dy], [dx]);
}
