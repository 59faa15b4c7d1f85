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

mod mixture;

pub use mixture::{
    Experts, NONE, Route, Slotted, balance_loss, balance_loss_backward, combine, combine_backward,
    dispatch, dispatch_backward, mixture, route, route_backward, sigmoid, sigmoid_backward, slots,
};
pub use supernode_kernels::reference::{
    Activation, AdamW, Attention, RotaryScaling, RotaryStyle, Sgd, activation, activation_backward,
    adamw, add, assert_gradient, assert_product, assert_within, attention, attention_backward,
    clip, column_sum, concatenate, concatenate_backward, cross_entropy, cross_entropy_backward,
    dropout, embedding, embedding_backward, erf, erfc, gamma, global_norm, layer_norm,
    layer_norm_backward, linear, linear_backward, matmul, matmul_backward, mean_loss, multiply,
    multiply_backward, normals, permute, permute_backward, product_bound, rms_norm,
    rms_norm_backward, rotary, rotary_backward, rotary_frequencies, rotary_table, rounding, scale,
    sgd, slice, slice_backward, softmax, softmax_backward, sum, sum_backward, swiglu,
    swiglu_backward, transposed, widen,
};
