//! AVX-512 F, BW, DQ and VL: sixteen lanes, thirty-two registers, masks in registers of their own.
//!
//! bf16 is narrowed by `vcvtneps2bf16` where the processor has it and no lane is subnormal, which it takes for 0; else in integers,
//! to the same bits. On a Zen 5 GELU of bf16 takes 0.88 of the time, a cast to bf16 0.93.

use super::{Kernel, Simd, TILE_OF_16, TileKernel, TileLoop, avx512_tile};
use crate::dtype::{DType, Float};
use core::arch::asm;
use core::arch::x86_64::*;

// Every intrinsic below needs only features whose presence the token proves; this is the reason behind each SAFETY line.
macro_rules! avx {
    ($e:expr) => {
        // SAFETY: the token proves AVX-512 F, BW, DQ and VL; the intrinsics called here touch registers and a constant.
        unsafe { $e }
    };
}

/// Proof that this CPU has AVX-512 F, BW, DQ and VL, and BF16 if `bf16`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512 {
    bf16: bool,
}

impl Avx512 {
    /// The token, on a CPU that has them.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx512 { bf16: false })
    }

    /// The same on a CPU that has AVX512-BF16 too.
    #[inline]
    pub(crate) fn with_bf16() -> Option<Self> {
        let vectors = Avx512::new().filter(|_| is_x86_feature_detected!("avx512bf16"));
        vectors.map(|_| Avx512 { bf16: true })
    }

    #[inline(always)]
    fn narrow_bf16(self, v: __m512) -> __m256i {
        const SUBNORMAL: i32 = 0x20;
        if self.bf16 && avx!(_mm512_fpclass_ps_mask::<SUBNORMAL>(v)) == 0 {
            // SAFETY: the token proves BF16.
            return unsafe { convert_to_bf16(v) };
        }
        round_to_bf16(v)
    }
}

#[inline(always)]
fn widen_bf16(x: __m256i) -> __m512 {
    avx!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
        _mm512_cvtepu16_epi32(x)
    )))
}

/// Words 1, 3, 5, ... of a vector, then anything.
const ODD_WORDS: [u16; 32] = {
    let mut words = [0; 32];
    let mut i = 0;
    while i < 16 {
        words[i] = 2 * i as u16 + 1;
        i += 1;
    }
    words
};

/// To nearest even; subnormal numbers count as 0.
///
/// # Safety
/// The CPU has AVX512-BF16. That it is assembly lets it be part of kernels, which are compiled without.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn convert_to_bf16(v: __m512) -> __m256i {
    let narrow;
    // SAFETY: the caller's promise; registers alone.
    unsafe {
        asm!(
            "vcvtneps2bf16 {}, {}",
            out(ymm_reg) narrow,
            in(zmm_reg) v,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    narrow
}

#[inline(always)]
fn round_to_bf16(v: __m512) -> __m256i {
    avx!({
        // x + 0x7fff, and one more where bit 16 is set; NaN keeps its upper bits and becomes quiet.
        let x = _mm512_castps_si512(v);
        let odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x0001_0000));
        let rounded = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_mask_add_epi32(rounded, odd, x, _mm512_set1_epi32(0x8000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let whole = _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x0040_0000));
        // The upper halves of all lanes, side by side: one move where a shift and a conversion would be three.
        let odd_words = _mm512_loadu_si512(ODD_WORDS.as_ptr().cast());
        _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd_words, whole))
    })
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// The function that a kernel is compiled into: a method of the kernel, not a function of this file, since the compiler puts
/// it into the object code of the kernel's module, so that an edit compiles no other module's kernels again.
trait Compiled: Kernel + Sized {
    /// Runs the kernel.
    ///
    /// # Safety
    /// This CPU has the features of `s`, whose token proves them.
    unsafe fn compiled(self, s: Avx512) -> Self::Output;
}

impl<K: Kernel> Compiled for K {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn compiled(self, s: Avx512) -> K::Output {
        self.call(s)
    }
}

impl Simd for Avx512 {
    type V = __m512;
    type M = __mmask16;
    const LANES: usize = 16;
    const HAS_TILE_LOOP: bool = true;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features.
        unsafe { Compiled::compiled(kernel, self) }
    }
    #[inline(always)]
    fn tiled<K: TileKernel>(self, kernel: K) -> K::Output {
        kernel.call::<Self, { TILE_OF_16.0 }, { TILE_OF_16.1 }>(self)
    }
    #[inline(always)]
    unsafe fn tile_loop<const R: usize>(self, tile: &TileLoop) {
        const { assert!(R <= TILE_OF_16.0 && TILE_OF_16.1 == 2) };
        // SAFETY: the token proves AVX-512 F; the rest is the caller's promise.
        unsafe {
            if tile.a_packed {
                avx512_tile::packed_rows::<R, false>(tile);
            } else {
                avx512_tile::long_rows::<R, false>(tile);
            }
        }
    }
    #[inline(always)]
    fn transpose(self, x: &mut [Self::V]) {
        let x: &mut [Self::V; 16] = x.try_into().expect("a square");
        avx!({
            let mut t = *x;
            for i in (0..16).step_by(2) {
                t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
                t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
            }
            // u[g + c]: columns c, c + 4, c + 8, c + 12, one per quarter, of rows g .. g + 4.
            let mut u = t;
            for g in (0..16).step_by(4) {
                u[g] = _mm512_shuffle_ps::<0b01_00_01_00>(t[g], t[g + 2]);
                u[g + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(t[g], t[g + 2]);
                u[g + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(t[g + 1], t[g + 3]);
                u[g + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(t[g + 1], t[g + 3]);
            }
            // The quarters themselves are a 4 x 4 matrix for each c: even and odd ones first, then halves.
            for c in 0..4 {
                let (a, b, e, f) = (u[c], u[c + 4], u[c + 8], u[c + 12]);
                let even_low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                let odd_low = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                let even_high = _mm512_shuffle_f32x4::<0b10_00_10_00>(e, f);
                let odd_high = _mm512_shuffle_f32x4::<0b11_01_11_01>(e, f);
                x[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even_low, even_high);
                x[c + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd_low, odd_high);
                x[c + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even_low, even_high);
                x[c + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd_low, odd_high);
            }
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        avx!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        avx!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        avx!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        avx!(_mm512_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        avx!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        avx!(_mm512_andnot_ps(_mm512_set1_ps(-0.0), a))
    }
    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        avx!({
            let sign = _mm512_set1_ps(-0.0);
            _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b))
        })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // No scaling (upper bits 0), nearest even, no exceptions.
        avx!(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }
    #[inline(always)]
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
        avx!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn shift(self, a: Self::V, t: Self::V) -> Self::V {
        avx!({
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), n))
        })
    }
    #[inline(always)]
    fn split(self, a: Self::V) -> (Self::V, Self::V) {
        avx!({
            let two_thirds = _mm512_set1_epi32(0x3f2a_aaab);
            let bits = _mm512_sub_epi32(_mm512_castps_si512(a), two_thirds);
            let m = _mm512_and_si512(bits, _mm512_set1_epi32(0x007f_ffff));
            (
                _mm512_castsi512_ps(_mm512_add_epi32(m, two_thirds)),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<23>(bits)),
            )
        })
    }
    #[inline(always)]
    fn lt(self, a: Self::V, b: Self::V) -> Self::M {
        avx!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn le(self, a: Self::V, b: Self::V) -> Self::M {
        avx!(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: Self::V, b: Self::V) -> Self::M {
        avx!(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        avx!(_mm512_mask_blend_ps(m, b, a))
    }
    #[inline(always)]
    fn mask_first(self, n: usize) -> Self::M {
        first(n)
    }
    #[inline(always)]
    fn mask_and(self, a: Self::M, b: Self::M) -> Self::M {
        a & b
    }
    #[inline(always)]
    unsafe fn load_ptr<T: Float>(self, p: *const T) -> Self::V {
        // SAFETY: the caller vouches for 16 elements of T; unaligned loads.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm512_loadu_ps(p.cast()),
                DType::Bf16 => widen_bf16(_mm256_loadu_si256(p.cast())),
                DType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_first_ptr<T: Float>(self, p: *const T, n: usize) -> Self::V {
        // SAFETY: the caller vouches for n elements of T; masked lanes are not read.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm512_maskz_loadu_ps(first(n), p.cast()),
                DType::Bf16 => widen_bf16(_mm256_maskz_loadu_epi16(first(n), p.cast())),
                DType::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p.cast())),
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn store_past_ptr(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_stream_ps(p, v) }
    }
    #[inline(always)]
    fn fence_past(self) {
        avx!(_mm_sfence())
    }
    #[inline(always)]
    unsafe fn store_ptr<T: Float>(self, p: *mut T, v: Self::V) {
        // SAFETY: the caller vouches for 16 elements of T; unaligned stores.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm512_storeu_ps(p.cast(), v),
                DType::Bf16 => _mm256_storeu_si256(p.cast(), self.narrow_bf16(v)),
                DType::F16 => _mm256_storeu_si256(
                    p.cast(),
                    _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v),
                ),
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
    #[inline(always)]
    unsafe fn store_first_ptr<T: Float>(self, p: *mut T, n: usize, v: Self::V) {
        // SAFETY: the caller vouches for n elements of T; masked lanes are not written.
        unsafe {
            match T::DTYPE {
                DType::F32 => _mm512_mask_storeu_ps(p.cast(), first(n), v),
                DType::Bf16 => _mm256_mask_storeu_epi16(p.cast(), first(n), self.narrow_bf16(v)),
                DType::F16 => _mm256_mask_storeu_epi16(
                    p.cast(),
                    first(n),
                    _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v),
                ),
                DType::U32 => unreachable!("u32 is no Float"),
            }
        }
    }
}
