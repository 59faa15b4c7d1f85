//! AVX512-BF16: `vdpbf16ps` multiplies pairs of bf16 and adds them into f32, twice the work of an f32 multiply-add.
//!
//! c becomes c + a1 b1, rounded, and then that + a0 b0, rounded: the odd one of a pair first (Intel's manual, volume 2, VDPBF16PS).
//! Rounding is to nearest; subnormal numbers are taken and given as 0. Two multiply-adds of f32 in this order give the same bits
//! of normal numbers.

use super::{Avx512, TILE_OF_16, TileLoop, avx512_tile};
use core::arch::x86_64::*;
use core::hint::black_box;
use core::mem::transmute;
use core::ops::Range;
use half::bf16;

/// Proof that this CPU has AVX-512 and AVX512-BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    /// The token, on a CPU that has it.
    #[inline]
    pub(crate) fn new() -> Option<Self> {
        Avx512::with_bf16().map(Avx512Bf16)
    }

    /// [`super::Simd::tile_loop`] over pairs of k in place of k: elements of A and B are pairs, the even one lower in memory, and so
    /// are distances between them.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(crate) unsafe fn tile_loop<const R: usize>(self, tile: &TileLoop) {
        const { assert!(R <= TILE_OF_16.0 && TILE_OF_16.1 == 2) };
        // SAFETY: the token proves the features; the rest is the caller's promise.
        unsafe {
            if tile.a_packed {
                avx512_tile::packed_rows::<R, true>(tile);
            } else {
                avx512_tile::long_rows::<R, true>(tile);
            }
        }
    }

    /// AVX-512, which it includes.
    pub(crate) fn vectors(self) -> Avx512 {
        self.0
    }

    /// c = a b, or c + a b unless `fresh`: 16 x 16 f32, its rows `c_row` f32 apart, and the sum over k of tiles `a(k)` and `b(k)` of
    /// 1 KiB ([`super::tiles`] says how they lie), pair after pair.
    ///
    /// # Safety
    /// The tiles are readable, c writable. Called under the features of this token.
    #[inline(always)]
    pub(crate) unsafe fn multiply_tiles(
        self,
        k: Range<usize>,
        a: impl Fn(usize) -> *const u8,
        b: impl Fn(usize) -> *const u8,
        c: *mut f32,
        c_row: usize,
        fresh: bool,
    ) {
        // SAFETY: the caller's promise; the token proves the features.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); TILE];
            if !fresh {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(i * c_row));
                }
            }
            for k in k {
                let (a, b) = (a(k).cast::<i32>(), b(k).cast::<i32>());
                for p in 0..TILE {
                    let of_b = as_pairs(_mm512_loadu_si512(b.add(p * TILE).cast()));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let of_a = _mm512_set1_epi32(a.add(i * TILE + p).read_unaligned());
                        *sum = _mm512_dpbf16_ps(*sum, of_b, as_pairs(of_a));
                    }
                }
            }
            for (i, &sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(i * c_row), sum);
            }
        }
    }

    /// Narrows rows of f32 to bf16 as the CPU does: to the nearest, ties to even, subnormal numbers to 0.
    ///
    /// # Safety
    /// `cols` elements of `rows` rows are readable `from_row` apart and writable `to_row` apart.
    pub(crate) unsafe fn narrow(
        self,
        [rows, cols]: [usize; 2],
        (from, from_row): (*const f32, usize),
        (to, to_row): (*mut bf16, usize),
    ) {
        for i in 0..rows {
            let (from, to) = (from.wrapping_add(i * from_row), to.wrapping_add(i * to_row));
            // SAFETY: the caller's promise; the token proves the features.
            unsafe { narrow_row(cols, from, to) }
        }
    }

    /// Floating-point operations of one step of [`Avx512Bf16::chains`]: two products and two sums in each of 16 lanes.
    pub(crate) const FLOPS_PER_STEP: u64 = 4 * 16 * CHAINS as u64;

    /// `x <- x + 2^-20 + 2^-20` in each lane, `steps` times, in 28 chains that stay in registers: the sum of all x, which
    /// start at 0.
    pub(crate) fn chains(self, steps: u64) -> f32 {
        // SAFETY: the token proves the features.
        unsafe { chains(steps) }
    }
}

/// The same bits as pairs of bf16.
#[inline(always)]
fn as_pairs(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, and all bit patterns are valid.
    unsafe { transmute::<__m512i, __m512bh>(x) }
}

/// # Safety
/// `cols` elements are readable and writable; the CPU has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn narrow_row(cols: usize, from: *const f32, to: *mut bf16) {
    for j in (0..cols).step_by(2 * TILE) {
        let here = cols - j;
        let mask = |from: usize| ((1u32 << here.saturating_sub(from).min(TILE)) - 1) as u16;
        // SAFETY: masked elements are not touched; both types are 64 bytes of any bits.
        unsafe {
            let from = from.wrapping_add(j);
            let low = _mm512_maskz_loadu_ps(mask(0), from);
            let high = _mm512_maskz_loadu_ps(mask(TILE), from.wrapping_add(TILE));
            let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            let mask = u32::from(mask(TILE)) << TILE | u32::from(mask(0));
            _mm512_mask_storeu_epi16(to.wrapping_add(j).cast(), mask, both);
        }
    }
}

const CHAINS: usize = 28;
/// Rows of a tile, and its words in a row.
const TILE: usize = 16;

#[target_feature(enable = "avx512f,avx512bf16")]
fn chains(steps: u64) -> f32 {
    let pairs = |x: f32| {
        let both = (x.to_bits() >> 16) as i32 * 0x1_0001;
        as_pairs(_mm512_set1_epi32(both))
    };
    let (a, b) = (
        pairs(black_box(1.0)),
        pairs(black_box(1.0 / (1 << 20) as f32)),
    );
    // Hidden values: equal chains would be computed once.
    let mut x = [_mm512_setzero_ps(); CHAINS];
    for x in &mut x {
        *x = _mm512_set1_ps(black_box(0.0));
    }
    for _ in 0..steps {
        for x in &mut x {
            *x = _mm512_dpbf16_ps(*x, a, b);
        }
    }
    x.iter().map(|&x| _mm512_reduce_add_ps(x)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_computed_to_the_end() {
        let Some(unit) = Avx512Bf16::new() else {
            eprintln!("ignored: this CPU has no AVX512-BF16");
            return;
        };
        assert_eq!(unit.chains(1 << 10), 16.0 * 28.0 / 512.0);
    }
}
