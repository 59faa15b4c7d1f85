//! One CPU chip: kernels over slices, in f32 inside, whatever the element type outside.
//!
//! Results depend neither on the number of threads nor on the instruction set (see `simd`). Every kernel runs on the
//! caller's rayon pool; small work stays on the caller.

pub(crate) mod attention;
pub(crate) mod matmul;
// Half of the pool's accounting is read by its tests alone.
#[allow(dead_code)]
pub(crate) mod memory;
pub(crate) mod peak;
pub(crate) mod polynomial;
pub(crate) mod rows;
pub(crate) mod simd;

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
