//! Transformer kernels split over many chips.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod collective;
mod cpu;
pub mod dtype;
pub mod error;
pub mod kernels;
pub mod mesh;
pub mod model;
pub mod ops;
pub mod placement;
pub mod random;
pub mod reference;
pub mod spmd;
pub mod tape;
pub mod tensor;
pub mod trace;
pub mod train;

pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
pub use half::{bf16, f16};
pub use kernels::{
    Mask, attention, gelu, gelu_tanh, layer_norm, matmul, matmul_batched, rms_norm, silu, softmax,
};
