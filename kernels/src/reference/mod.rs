//! The textbook: every op's formula, forward and backward, in f64, one loop per letter, nothing clever.
//!
//! It is the oracle of the tests, and it is meant to be read: a backward stands under its forward and repeats in a
//! comment the line that it differentiates. No threads, no SIMD, no unsafe; only tests, benches and examples import it.
//!
//! Letters, everywhere: `b` batch, `t` tokens (queries), `s` keys, `h` heads, `d` head size, `c` channels, `v` vocabulary,
//! `r` rows; `m n k` a product's sizes. Arrays are row-major slices; sizes come first, as `[m, n, k]`. `dy` is the loss's
//! derivative by `y`, and a function called `x_backward` takes it and gives the derivatives by what `x` took.
//!
//! Wrong lengths panic. [`gamma`], [`rounding`], [`assert_within`] and [`assert_product`] are the ladder of tolerances by
//! which kernels are held to these formulas; [`assert_gradient`] holds a backward to its forward.

// The formulas' letters are the loops' letters: x[i * c + j] says more here than a chain of iterators.
#![allow(clippy::needless_range_loop)]

mod activation;
mod attention;
mod gradient;
mod loss;
mod matmul;
mod norm;
mod optimizer;
mod rotary;
mod shape;
mod special;
mod tolerance;

pub use activation::{
    Activation, activation, activation_backward, add, dropout, multiply, multiply_backward, scale,
    swiglu, swiglu_backward,
};
pub use attention::{Attention, attention, attention_backward};
pub use gradient::{assert_gradient, normals};
pub use loss::{cross_entropy, cross_entropy_backward, mean_loss, softmax, softmax_backward};
pub use matmul::{column_sum, dot, linear, linear_backward, matmul, matmul_backward, transposed};
pub use norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
pub use optimizer::{AdamW, Sgd, adamw, clip, global_norm, sgd};
pub use rotary::{
    RotaryScaling, RotaryStyle, rotary, rotary_backward, rotary_frequencies, rotary_table,
};
pub use shape::{
    concatenate, concatenate_backward, embedding, embedding_backward, permute, permute_backward,
    slice, slice_backward, sum, sum_backward,
};
pub use special::{erf, erfc};
pub use tolerance::{assert_product, assert_within, gamma, product_bound, rounding, widen};
