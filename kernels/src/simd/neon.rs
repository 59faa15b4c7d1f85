//! NEON: four lanes, thirty-two registers.

// NEON is part of the target, so that its register operations are safe on newer compilers and unsafe on older ones.
#![allow(unused_unsafe)]

use super::{Kernel, Simd, TILE_OF_4, TileKernel};
use crate::dtype::{DType, Float};
use core::arch::aarch64::*;

/// Proof that this CPU has NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// The token, on a CPU that has it.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }
}

// Every intrinsic below needs only NEON, whose presence the token proves.
macro_rules! neon {
    ($e:expr) => {
        // SAFETY: the token proves NEON; the intrinsics called here touch registers only.
        unsafe { $e }
    };
}

#[inline(always)]
fn narrow_bf16(v: float32x4_t) -> uint16x4_t {
    neon!({
        let x = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(x), vdupq_n_u32(1));
        let rounded = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(x, vdupq_n_u32(0x0040_0000));
        vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), rounded, quiet))
    })
}

/// The function that a kernel is compiled into: a method of the kernel, not a function of this file, since the compiler puts
/// it into the object code of the kernel's module, so that an edit compiles no other module's kernels again.
trait Compiled: Kernel + Sized {
    /// Runs the kernel.
    ///
    /// # Safety
    /// This CPU has the features of `s`, whose token proves them.
    unsafe fn compiled(self, s: Neon) -> Self::Output;
}

impl<K: Kernel> Compiled for K {
    #[target_feature(enable = "neon")]
    unsafe fn compiled(self, s: Neon) -> K::Output {
        self.call(s)
    }
}

impl Simd for Neon {
    type V = float32x4_t;
    type M = uint32x4_t;
    const LANES: usize = 4;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the feature.
        unsafe { Compiled::compiled(kernel, self) }
    }
    #[inline(always)]
    fn tiled<K: TileKernel>(self, kernel: K) -> K::Output {
        kernel.call::<Self, { TILE_OF_4.0 }, { TILE_OF_4.1 }>(self)
    }
    #[inline(always)]
    fn transpose(self, x: &mut [Self::V]) {
        let x: &mut [Self::V; 4] = x.try_into().expect("a square");
        neon!({
            let (a, b) = (vtrnq_f32(x[0], x[1]), vtrnq_f32(x[2], x[3]));
            *x = [
                vcombine_f32(vget_low_f32(a.0), vget_low_f32(b.0)),
                vcombine_f32(vget_low_f32(a.1), vget_low_f32(b.1)),
                vcombine_f32(vget_high_f32(a.0), vget_high_f32(b.0)),
                vcombine_f32(vget_high_f32(a.1), vget_high_f32(b.1)),
            ];
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        neon!(vdupq_n_f32(x))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        neon!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        neon!(vfmsq_f32(c, a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vbslq_f32(vcltq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        neon!(vsqrtq_f32(a))
    }
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        neon!(vabsq_f32(a))
    }
    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        neon!(vbslq_f32(vdupq_n_u32(0x8000_0000), b, a))
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        neon!(vrndnq_f32(a))
    }
    #[inline(always)]
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
        // Two factors, because 2^n alone leaves the range of f32; the first product is exact.
        neon!({
            let n = vcvtq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            let bias = vdupq_n_s32(127);
            let one = vshlq_n_s32::<23>(vaddq_s32(half, bias));
            let other = vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(n, half), bias));
            vmulq_f32(
                vmulq_f32(a, vreinterpretq_f32_s32(one)),
                vreinterpretq_f32_s32(other),
            )
        })
    }
    #[inline(always)]
    fn shift(self, a: Self::V, t: Self::V) -> Self::V {
        neon!({
            let n = vshlq_n_s32::<23>(vreinterpretq_s32_f32(t));
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), n))
        })
    }
    #[inline(always)]
    fn split(self, a: Self::V) -> (Self::V, Self::V) {
        neon!({
            let two_thirds = vdupq_n_u32(0x3f2a_aaab);
            let bits = vsubq_u32(vreinterpretq_u32_f32(a), two_thirds);
            let m = vandq_u32(bits, vdupq_n_u32(0x007f_ffff));
            (
                vreinterpretq_f32_u32(vaddq_u32(m, two_thirds)),
                vcvtq_f32_s32(vshrq_n_s32::<23>(vreinterpretq_s32_u32(bits))),
            )
        })
    }
    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        neon!(vcltq_f32(a, b))
    }
    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        neon!(vcleq_f32(a, b))
    }
    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        neon!(vceqq_f32(a, b))
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        neon!(vbslq_f32(m, a, b))
    }
    #[inline(always)]
    fn mask_first(self, n: usize) -> Self::M {
        let on = |lane: usize| if lane < n { u32::MAX } else { 0 };
        let lanes = [on(0), on(1), on(2), on(3)];
        // SAFETY: the token proves NEON; four u32 are readable.
        unsafe { vld1q_u32(lanes.as_ptr()) }
    }
    #[inline(always)]
    fn mask_and(self, a: Self::M, b: Self::M) -> Self::M {
        neon!(vandq_u32(a, b))
    }
    #[inline(always)]
    unsafe fn load_ptr<T: Float>(self, p: *const T) -> Self::V {
        // SAFETY: the caller vouches for 4 elements of T.
        unsafe {
            match T::DTYPE {
                DType::F32 => vld1q_f32(p.cast()),
                DType::Bf16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))),
                DType::F16 => {
                    // The vector conversion is not stable at our oldest compiler.
                    let x = *p.cast::<[T; 4]>();
                    vld1q_f32(x.map(T::to_f32).as_ptr())
                }
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_first_ptr<T: Float>(self, p: *const T, n: usize) -> Self::V {
        // SAFETY: the caller vouches for n < 4 elements of T; the array has room.
        unsafe {
            let mut x = [T::zeroed(); 4];
            core::ptr::copy_nonoverlapping(p, x.as_mut_ptr(), n.min(4));
            self.load_ptr(x.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_ptr<T: Float>(self, p: *mut T, v: Self::V) {
        // SAFETY: the caller vouches for 4 elements of T.
        unsafe {
            match T::DTYPE {
                DType::F32 => vst1q_f32(p.cast(), v),
                DType::Bf16 => vst1_u16(p.cast(), narrow_bf16(v)),
                DType::F16 => {
                    let mut x = [0f32; 4];
                    vst1q_f32(x.as_mut_ptr(), v);
                    *p.cast::<[T; 4]>() = x.map(T::from_f32);
                }
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn store_first_ptr<T: Float>(self, p: *mut T, n: usize, v: Self::V) {
        // SAFETY: the caller vouches for n < 4 elements of T; the array has room.
        unsafe {
            let mut x = [T::zeroed(); 4];
            self.store_ptr(x.as_mut_ptr(), v);
            core::ptr::copy_nonoverlapping(x.as_ptr(), p, n.min(4));
        }
    }
}
