//! Transformer kernels for one CPU: matmul, attention and row-wise kernels on ndarray, in f32, bf16 and f16.
//!
//! Kernels compute in f32 whatever the element type, use the best instruction set of the machine at hand (AVX-512 with bf16 and
//! AMX, AVX2, NEON, or portable code) and run on the caller's current rayon pool.
//!
//! ```
//! use ndarray::Array4;
//! use supernode_kernels::{Mask, attention, matmul};
//!
//! let q = Array4::<f32>::ones([1, 2, 5, 64]); // [batch, heads, tokens, head size]
//! let o = attention(&q, &q, &q, Mask::Causal);
//! assert_eq!(o.dim(), (1, 2, 5, 64));
//! # let a = ndarray::Array2::<f32>::eye(3);
//! # assert_eq!(matmul(&a, &a.t()), a);
//! ```
//!
//! # The order of sums
//!
//! Results depend neither on the number of threads nor on the instruction set: an element of a matrix product is one chain of fused
//! multiply-adds over ascending k, and row sums use 32 virtual lanes and a fixed tree. One exception: where the processor has
//! a matrix unit (Intel's AMX), products of bf16 by bf16 run there and are summed in that unit's order: two chains, over the even and
//! the odd k of each block of 32, whose sum is added to the element, and subnormal numbers are taken as 0.
//! `SUPERNODE_MATRIX_UNITS=off` in the environment gives the bits of all other machines: a chain that takes of k and k + 1, k even,
//! the odd one first, as the instruction for pairs of bf16 does (`vdpbf16ps` of AVX512-BF16; used where it is fast, or with `pairs`
//! for the variable). Any other word is a panic.
//!
//! # Features
//!
//! `serde`: [`DType`] and [`dtype::TensorType`] can be serialised.

mod arrays;
mod attention;
pub mod dtype;
mod matmul;
mod memory;
mod peak;
mod polynomial;
pub mod random;
#[cfg(any(test, feature = "reference"))]
#[doc(hidden)]
pub mod reference;
mod rows;
mod simd;
#[cfg(test)]
mod soundness;

pub use arrays::{
    Mask, attention, attention_at, attention_backward, attention_with_lse, gelu, gelu_tanh,
    layer_norm, matmul, matmul_batched, rms_norm, silu, softmax,
};
pub use dtype::DType;
pub use half::{bf16, f16};
pub use peak::{MemoryStream, peak_flops};

#[doc = include_str!("../README.md")]
#[cfg(doctest)]
struct Readme;

/// What the `supernode` crate calls: kernels over slices and their memory. Outside of all promises of compatibility.
#[doc(hidden)]
pub mod internal {
    pub use crate::rows::RotaryStyle;
    pub use crate::{Accum, Activation};

    pub mod attention {
        //! Attention over strided heads.
        pub use crate::attention::{
            Geometry, Heads, HeadsMut, Merge, attention_backward, attention_forward,
            attention_merge, attention_scratch,
        };
    }
    pub mod matmul {
        //! Matrix products over strided slices.
        pub use crate::matmul::{Epilogue, Matrix, MatrixMut, matmul, scratch};
    }
    pub mod memory {
        //! Aligned buffers, pools of them, and the thread's scratch.
        pub use crate::memory::{
            Buffer, Exceeded, Pool, poison_memory, with_scratch, with_scratch_f32,
        };
    }
    pub mod rows {
        //! Functions of rows, of columns and of single elements.
        pub use crate::rows::*;
    }
    pub mod simd {
        //! What this machine's instruction set offers.
        pub use crate::simd::{check_units, has_tile_unit};
    }
}

/// What happens to the old contents of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    /// The result replaces them; they are never read.
    Replace,
    /// The sum resumes from them: the same bits as one longer sum (for parameters of norms, where it resumes at a multiple of 32
    /// rows).
    Add,
}

/// An elementwise function that follows a matmul, or stands alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    GeluTanh,
    /// x/2 (1 + erf(x / sqrt 2)).
    GeluErf,
    /// max(x, 0)^2.
    Relu2,
    /// x / (1 + e^-x).
    Silu,
}
