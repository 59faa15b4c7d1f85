//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

use super::{Kernel, Simd, TileKernel};
use crate::dtype::{DType, Float};
use core::arch::x86_64::*;

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, on a CPU that has them.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx2(()))
    }
}

// Every intrinsic below needs only features whose presence the token proves; this is the reason behind each SAFETY line.
macro_rules! avx {
    ($e:expr) => {
        // SAFETY: the token proves AVX2, FMA and F16C; the intrinsics called here touch registers only.
        unsafe { $e }
    };
}

#[inline(always)]
fn widen_bf16(x: __m128i) -> __m256 {
    avx!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(
        _mm256_cvtepu16_epi32(x)
    )))
}

#[inline(always)]
fn narrow_bf16(v: __m256) -> __m128i {
    avx!({
        let x = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(x), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
        let packed = _mm256_packus_epi32(high, high);
        _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
    })
}

/// The function that a kernel is compiled into: a method of the kernel, not a function of this file, since the compiler puts
/// it into the object code of the kernel's module, so that an edit compiles no other module's kernels again.
trait Compiled: Kernel + Sized {
    /// Runs the kernel.
    ///
    /// # Safety
    /// This CPU has the features of `s`, whose token proves them.
    unsafe fn compiled(self, s: Avx2) -> Self::Output;
}

impl<K: Kernel> Compiled for K {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn compiled(self, s: Avx2) -> K::Output {
        self.call(s)
    }
}

impl Simd for Avx2 {
    type V = __m256;
    type M = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features.
        unsafe { Compiled::compiled(kernel, self) }
    }
    #[inline(always)]
    fn tiled<K: TileKernel>(self, kernel: K) -> K::Output {
        // 12 accumulators, 2 vectors of B, 1 broadcast: 15 of 16 registers.
        kernel.call::<Self, 6, 2>(self)
    }
    #[inline(always)]
    fn transpose(self, x: &mut [Self::V]) {
        let x: &mut [Self::V; 8] = x.try_into().expect("a square");
        avx!({
            let mut t = *x;
            for i in (0..8).step_by(2) {
                t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
                t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
            }
            // u[4 g + c]: column c (and c + 4 in the high half) of rows 4 g .. 4 g + 4.
            let mut u = t;
            for g in (0..8).step_by(4) {
                u[g] = _mm256_shuffle_ps::<0b01_00_01_00>(t[g], t[g + 2]);
                u[g + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(t[g], t[g + 2]);
                u[g + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(t[g + 1], t[g + 3]);
                u[g + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(t[g + 1], t[g + 3]);
            }
            for c in 0..4 {
                x[c] = _mm256_permute2f128_ps::<0x20>(u[c], u[c + 4]);
                x[c + 4] = _mm256_permute2f128_ps::<0x31>(u[c], u[c + 4]);
            }
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        avx!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        avx!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        avx!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        avx!(_mm256_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        avx!(_mm256_sqrt_ps(a))
    }
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        avx!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }
    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        avx!({
            let sign = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
        })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        avx!(_mm256_round_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }
    #[inline(always)]
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
        // Two factors, because 2^n alone leaves the range of f32; the first product is exact.
        avx!({
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let one = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let other = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(
                _mm256_mul_ps(a, _mm256_castsi256_ps(one)),
                _mm256_castsi256_ps(other),
            )
        })
    }
    #[inline(always)]
    fn shift(self, a: Self::V, t: Self::V) -> Self::V {
        avx!({
            let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n))
        })
    }
    #[inline(always)]
    fn split(self, a: Self::V) -> (Self::V, Self::V) {
        avx!({
            let two_thirds = _mm256_set1_epi32(0x3f2a_aaab);
            let bits = _mm256_sub_epi32(_mm256_castps_si256(a), two_thirds);
            let m = _mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff));
            (
                _mm256_castsi256_ps(_mm256_add_epi32(m, two_thirds)),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<23>(bits)),
            )
        })
    }
    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        avx!(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        avx!(_mm256_cmp_ps::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        avx!(_mm256_cmp_ps::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm256_blendv_ps(b, a, m))
    }
    #[inline(always)]
    fn mask_first(self, n: usize) -> Self::M {
        avx!({
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), lane))
        })
    }
    #[inline(always)]
    fn mask_and(self, a: Self::M, b: Self::M) -> Self::M {
        avx!(_mm256_and_ps(a, b))
    }
    #[inline(always)]
    unsafe fn load_ptr<T: Float>(self, p: *const T) -> Self::V {
        // SAFETY: the caller vouches for 8 elements of T; unaligned loads.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm256_loadu_ps(p.cast()),
                DType::Bf16 => widen_bf16(_mm_loadu_si128(p.cast())),
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_first_ptr<T: Float>(self, p: *const T, n: usize) -> Self::V {
        // SAFETY: the caller vouches for n < 8 elements of T; a masked lane is not read, and the array has room.
        unsafe {
            if let DType::F32 = T::DTYPE {
                _mm256_maskload_ps(p.cast(), _mm256_castps_si256(self.mask_first(n)))
            } else {
                let mut x = [T::zeroed(); 8];
                core::ptr::copy_nonoverlapping(p, x.as_mut_ptr(), n.min(8));
                self.load_ptr(x.as_ptr())
            }
        }
    }
    #[inline(always)]
    unsafe fn store_past_ptr(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_stream_ps(p, v) }
    }
    #[inline(always)]
    fn fence_past(self) {
        avx!(_mm_sfence())
    }
    #[inline(always)]
    unsafe fn store_ptr<T: Float>(self, p: *mut T, v: Self::V) {
        // SAFETY: the caller vouches for 8 elements of T; unaligned stores.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm256_storeu_ps(p.cast(), v),
                DType::Bf16 => _mm_storeu_si128(p.cast(), narrow_bf16(v)),
                DType::F16 => _mm_storeu_si128(
                    p.cast(),
                    _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v),
                ),
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn store_first_ptr<T: Float>(self, p: *mut T, n: usize, v: Self::V) {
        // SAFETY: the caller vouches for n < 8 elements of T; a masked lane is not written, and the array has room.
        unsafe {
            if let DType::F32 = T::DTYPE {
                _mm256_maskstore_ps(p.cast(), _mm256_castps_si256(self.mask_first(n)), v);
            } else {
                let mut x = [T::zeroed(); 8];
                self.store_ptr(x.as_mut_ptr(), v);
                core::ptr::copy_nonoverlapping(x.as_ptr(), p, n.min(8));
            }
        }
    }
}
