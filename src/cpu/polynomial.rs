//! exp, ln, tanh, erf and sigmoid, generic over [`Simd`](super::simd::Simd).
