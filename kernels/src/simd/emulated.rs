//! For tests: arrays that stand for the registers of an instruction set which the testing machine need not have.
//!
//! A kernel's code depends on the width of a vector and on the shape of a tile: blocks, ragged ends and reductions differ.
//! [`Emulated16`] takes every branch that AVX-512 takes ([`super::Portable`] those of NEON), so that the comparisons of bits
//! cover that code wherever the tests run. What it cannot cover is the intrinsics themselves.
//!
//! The common operations are functions of their own: inlined, the tiles of arrays took the compiler as long as all other
//! instruction sets together.

use super::{Kernel, Simd, TILE_OF_16, TileKernel};
use crate::dtype::Float;
use std::array::from_fn;

/// `N` lanes, and a tile of `ROWS` x `VECTORS` vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Emulated<const N: usize, const ROWS: usize, const VECTORS: usize>(());

/// The shape of AVX-512.
pub(crate) type Emulated16 = Emulated<16, { TILE_OF_16.0 }, { TILE_OF_16.1 }>;

impl<const N: usize, const ROWS: usize, const VECTORS: usize> Emulated<N, ROWS, VECTORS> {
    /// The token, where a fused multiply-add is one instruction: it would take the tests too long elsewhere.
    pub(crate) fn new() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        let here = super::Avx2::new().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        let here = cfg!(target_arch = "aarch64");
        here.then_some(Emulated(()))
    }
}

/// f of each lane, compiled once and with the fused multiply-add.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline(never)]
fn lanes<const N: usize>(f: impl Fn(usize) -> f32) -> [f32; N] {
    from_fn(f)
}

macro_rules! apart {
    ($f:expr) => {{
        // SAFETY: the token proves the features, of x86.
        #[allow(unused_unsafe)]
        unsafe {
            lanes($f)
        }
    }};
}

#[inline(always)]
fn map<const N: usize>(a: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip<R, const N: usize>(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> R) -> [R; N] {
    from_fn(|i| f(a[i], b[i]))
}

/// a 2^n as `vscalefps` has it: rounded once, and NaN for a NaN.
fn scale(a: f32, n: f32) -> f32 {
    assert!(n.is_nan() || (n == n.round() && n.abs() <= 252.0), "2^{n}");
    let power = f64::from_bits(((n as i64 + 1023) as u64) << 52);
    if n.is_nan() {
        n
    } else {
        (a as f64 * power) as f32
    }
}

/// As on the other sets, a method of the kernel, whose module's object code it so belongs to.
trait Compiled: Kernel + Sized {
    /// Runs the kernel.
    ///
    /// # Safety
    /// This CPU has AVX2, FMA and F16C if it is an x86.
    unsafe fn compiled<S: Simd>(self, s: S) -> Self::Output;
}

impl<K: Kernel> Compiled for K {
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    #[inline(never)]
    unsafe fn compiled<S: Simd>(self, s: S) -> K::Output {
        self.call(s)
    }
}

impl<const N: usize, const ROWS: usize, const VECTORS: usize> Simd for Emulated<N, ROWS, VECTORS> {
    type V = [f32; N];
    type M = [bool; N];
    const LANES: usize = N;
    // So that the tests run this way too.
    const ROW_BY_ROW: bool = true;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features, of x86.
        unsafe { Compiled::compiled(kernel, self) }
    }
    #[inline(always)]
    fn tiled<K: TileKernel>(self, kernel: K) -> K::Output {
        kernel.call::<Self, ROWS, VECTORS>(self)
    }
    #[inline(never)]
    fn transpose(self, x: &mut [Self::V]) {
        let x: &mut [Self::V; N] = x.try_into().expect("a square");
        *x = from_fn(|i| from_fn(|j| x[j][i]));
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    #[inline(never)]
    fn splat(self, x: f32) -> Self::V {
        [x; N]
    }
    #[inline(never)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        apart!(|i| a[i] + b[i])
    }
    #[inline(never)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        apart!(|i| a[i] - b[i])
    }
    #[inline(never)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        apart!(|i| a[i] * b[i])
    }
    #[inline(never)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(never)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        apart!(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(never)]
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        apart!(|i| (-a[i]).mul_add(b[i], c[i]))
    }
    #[inline(never)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        apart!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(never)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(never)]
    fn sqrt(self, a: Self::V) -> Self::V {
        map(a, f32::sqrt)
    }
    #[inline(never)]
    fn abs(self, a: Self::V) -> Self::V {
        map(a, f32::abs)
    }
    #[inline(never)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, f32::copysign)
    }
    #[inline(never)]
    fn round(self, a: Self::V) -> Self::V {
        map(a, f32::round_ties_even)
    }
    #[inline(never)]
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
        zip(a, n, scale)
    }
    #[inline(never)]
    fn shift(self, a: Self::V, t: Self::V) -> Self::V {
        zip(a, t, |a, t| {
            f32::from_bits(a.to_bits().wrapping_add(t.to_bits() << 23))
        })
    }
    #[inline(never)]
    fn split(self, a: Self::V) -> (Self::V, Self::V) {
        const TWO_THIRDS: u32 = 0x3f2a_aaab;
        let bits = |a: f32| a.to_bits().wrapping_sub(TWO_THIRDS);
        (
            map(a, |a| f32::from_bits((bits(a) & 0x007f_ffff) + TWO_THIRDS)),
            map(a, |a| ((bits(a) as i32) >> 23) as f32),
        )
    }
    #[inline(never)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        zip(a, b, |a, b| a < b)
    }
    #[inline(never)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        zip(a, b, |a, b| a <= b)
    }
    #[inline(never)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        zip(a, b, |a, b| a == b)
    }
    #[inline(never)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if m[i] { a[i] } else { b[i] })
    }
    #[inline(never)]
    fn mask_first(self, n: usize) -> Self::M {
        from_fn(|i| i < n)
    }
    #[inline(never)]
    fn mask_and(self, a: Self::M, b: Self::M) -> Self::M {
        from_fn(|i| a[i] & b[i])
    }
    #[inline(never)]
    unsafe fn load_ptr<T: Float>(self, p: *const T) -> Self::V {
        // SAFETY: the caller vouches for N elements; an array of N has no stricter alignment than T.
        let x = unsafe { *p.cast::<[T; N]>() };
        x.map(T::to_f32)
    }
    #[inline(never)]
    unsafe fn load_first_ptr<T: Float>(self, p: *const T, n: usize) -> Self::V {
        assert!(n < N, "{n} of {N} lanes are a whole vector");
        let at = |i| {
            // SAFETY: the caller vouches for n elements, and i < n here.
            unsafe { *p.add(i) }
        };
        from_fn(|i| if i < n { at(i).to_f32() } else { 0.0 })
    }
    #[inline(never)]
    unsafe fn store_ptr<T: Float>(self, p: *mut T, v: Self::V) {
        // SAFETY: the caller vouches for N elements.
        unsafe { *p.cast::<[T; N]>() = v.map(T::from_f32) }
    }
    #[inline(never)]
    unsafe fn store_first_ptr<T: Float>(self, p: *mut T, n: usize, v: Self::V) {
        assert!(n < N, "{n} of {N} lanes are a whole vector");
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller vouches for n elements.
            unsafe { *p.add(i) = T::from_f32(x) }
        }
    }
}
