//! One CPU chip.
pub(crate) mod attention;
pub(crate) mod matmul;
pub(crate) mod memory;
pub(crate) mod rows;
pub(crate) mod simd;
