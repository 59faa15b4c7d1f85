//! Everything that is not a matrix product: functions of rows, of columns and of single elements.
//!
//! All take [`Slice`](crate::dtype::Slice)s of any float type, compute in f32 and round once on the way out. Rows run in
//! parallel when there is enough to do ([`parallel`]); sums over a row use 32 virtual lanes ([`lanes`]), sums over rows
//! are one chain a column. So neither threads nor instruction set show in the result.

mod activation;
mod copy;
mod cross_entropy;
mod driver;
mod dropout;
mod elementwise;
mod embedding;
pub(crate) mod lanes;
mod mix;
mod norm;
mod one_pass;
mod optimizer;
pub mod parallel;
mod pointwise;
mod reduce;
mod rotary;
mod softmax;

pub use activation::{
    activation, activation_backward, sigmoid, sigmoid_backward, swiglu, swiglu_backward,
};
pub use copy::copy_strided;
pub use cross_entropy::{
    Shard, cross_entropy, cross_entropy_gradient, cross_entropy_gradient_in_place,
    cross_entropy_losses, row_exp_sum, row_max,
};
pub use dropout::dropout;
pub use elementwise::{add, add_assign, cast, multiply, scale};
pub use embedding::{embedding, embedding_backward};
pub use mix::{Picked, mix, mix_dots};
pub use norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
pub use optimizer::{AdamW, Sgd, adamw, sgd};
pub use reduce::{add_bias, column_sum, sum, sum_of_squares};
pub use rotary::RotaryStyle;
pub use rotary::{Rotary, rotary};
pub use softmax::{softmax, softmax_backward};

#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_losses;
#[cfg(test)]
mod tests_special;
