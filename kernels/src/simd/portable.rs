//! Plain Rust: four lanes in an array, and the meaning of every operation. Slow where the CPU has no FMA, since each
//! one is then a call that rounds once in software.
//!
//! Operations are functions of their own: inlined, they made this set, which hardly anybody runs, a third of all code that
//! the compiler is given. Its tile has NEON's shape, so that tests take that set's branches on any machine.

use super::{Kernel, Simd, TILE_OF_4, TileKernel};
use crate::dtype::Float;

const N: usize = 4;

/// Plain Rust on any CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

#[inline(always)]
fn map(a: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip<R>(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> R) -> [R; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// A function of its own as on the other sets: where all of them flowed together, compiling took a minute. A method of the
/// kernel, whose module's object code it so belongs to.
trait Compiled: Kernel + Sized {
    /// Runs the kernel.
    fn compiled(self) -> Self::Output;
}

impl<K: Kernel> Compiled for K {
    #[inline(never)]
    fn compiled(self) -> K::Output {
        self.call(Portable)
    }
}

impl Simd for Portable {
    type V = [f32; N];
    type M = [bool; N];
    const LANES: usize = N;
    // The tests take NEON's branches with it.
    const ROW_BY_ROW: bool = !cfg!(test);

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        Compiled::compiled(kernel)
    }
    #[inline(always)]
    fn tiled<K: TileKernel>(self, kernel: K) -> K::Output {
        kernel.call::<Self, { TILE_OF_4.0 }, { TILE_OF_4.1 }>(self)
    }
    #[inline(never)]
    fn transpose(self, x: &mut [Self::V]) {
        let x: &mut [Self::V; N] = x.try_into().expect("a square");
        *x = std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]));
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    #[inline(never)]
    fn splat(self, x: f32) -> Self::V {
        [x; N]
    }
    #[inline(never)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(never)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(never)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(never)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(never)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(never)]
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| (-a[i]).mul_add(b[i], c[i]))
    }
    #[inline(never)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
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
        // Two factors, because 2^n alone leaves the range of f32; the first product is exact.
        zip(a, n, |a, n| {
            let n = (n as i32).clamp(-252, 252);
            a * pow2(n >> 1) * pow2(n - (n >> 1))
        })
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
        std::array::from_fn(|i| if m[i] { a[i] } else { b[i] })
    }
    #[inline(never)]
    fn mask_first(self, n: usize) -> Self::M {
        std::array::from_fn(|i| i < n)
    }
    #[inline(never)]
    fn mask_and(self, a: Self::M, b: Self::M) -> Self::M {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(never)]
    unsafe fn load_ptr<T: Float>(self, p: *const T) -> Self::V {
        // SAFETY: the caller vouches for N elements; an array of N has no stricter alignment than T.
        let x = unsafe { *p.cast::<[T; N]>() };
        x.map(T::to_f32)
    }
    #[inline(never)]
    unsafe fn load_first_ptr<T: Float>(self, p: *const T, n: usize) -> Self::V {
        let at = |i| {
            // SAFETY: the caller vouches for n elements, and i < n here.
            unsafe { *p.add(i) }
        };
        std::array::from_fn(|i| if i < n { at(i).to_f32() } else { 0.0 })
    }
    #[inline(never)]
    unsafe fn store_ptr<T: Float>(self, p: *mut T, v: Self::V) {
        // SAFETY: the caller vouches for N elements.
        unsafe { *p.cast::<[T; N]>() = v.map(T::from_f32) }
    }
    #[inline(never)]
    unsafe fn store_first_ptr<T: Float>(self, p: *mut T, n: usize, v: Self::V) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller vouches for n elements.
            unsafe { *p.add(i) = T::from_f32(x) }
        }
    }
}
