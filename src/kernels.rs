//! Kernels straight on ndarray, without chips, meshes or tapes: the [`supernode_kernels`] crate's functions.

pub use supernode_kernels::{
    Mask, MemoryStream, attention, attention_at, attention_backward, attention_with_lse, gelu,
    gelu_tanh, layer_norm, matmul, matmul_batched, peak_flops, rms_norm, silu, softmax,
};
