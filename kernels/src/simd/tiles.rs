//! Products of tiles of bf16, for kernels that put vectors between products, as attention does: by the matrix unit (AMX) that
//! [`super::amx`] finds, tries and describes, or by vectors that multiply pairs of bf16.
//!
//! A kernel ([`OnTiles`]) runs under [`TileUnit::run`]. On AMX all eight tiles are then set to 16 rows of 64 bytes; ragged edges
//! are filled with zeros. Tiles are loaded from 16 rows at any stride. `tdpbf16ps` multiplies 16 x 32 bf16 by 32 x 16 and adds into
//! 16 x 16 f32. The left operand's rows are rows of 32 bf16; the right operand holds pairs of k: row p has, for each of 16 columns,
//! the elements of 2 p and 2 p + 1 side by side. So a [16, 32] tile whose 16 x 16 words are transposed is a right operand. Vectors
//! take the same tiles: a row of the right operand is a vector, a pair of the left one is broadcast.
//!
//! The compiler never touches a tile, and blocks of assembly keep their order.

use super::amx::Amx;
use super::{Avx512, Avx512Bf16};
use core::arch::asm;
use core::arch::x86_64::*;

/// Proof that this process may use AMX for bf16, or vectors of pairs, beside AVX512-BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileUnit {
    vectors: Avx512,
    by: By,
}

#[derive(Clone, Copy, Debug)]
enum By {
    Registers,
    Pairs(Avx512Bf16),
}

/// Code that multiplies with tiles. Write `call` with `#[inline(always)]`.
pub(crate) trait OnTiles {
    /// What it returns.
    type Output;
    /// Runs with tiles set up.
    fn call(self, s: Avx512, tiles: Tiles) -> Self::Output;
}

/// What multiplies tiles; only [`TileUnit::run`] makes one.
#[derive(Clone, Copy)]
pub(crate) enum Tiles {
    /// This thread's tile registers, which are set up.
    Registers(Registers),
    /// Vectors.
    Pairs(Avx512Bf16),
}

/// Tile registers of this thread that are set up.
#[derive(Clone, Copy)]
pub(crate) struct Registers(());

/// The layout of tiles that `ldtilecfg` reads: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Layout([u8; 64]);

const LAYOUT: Layout = {
    let mut x = [0; 64];
    x[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        x[16 + 2 * tile] = 64;
        x[48 + tile] = 16;
        tile += 1;
    }
    Layout(x)
};

impl TileUnit {
    /// The token, from that of the unit, which was tried, on a CPU that also rounds to bf16 itself.
    pub(super) fn of(unit: Amx) -> Option<Self> {
        is_x86_feature_detected!("avx512bf16").then_some(TileUnit {
            vectors: unit.vectors(),
            by: By::Registers,
        })
    }

    /// The token of vectors.
    pub(super) fn of_pairs(unit: Avx512Bf16) -> Self {
        TileUnit {
            vectors: unit.vectors(),
            by: By::Pairs(unit),
        }
    }

    /// Runs the kernel with tiles set up, and frees them afterwards: a switch to another thread saves no tiles then.
    #[inline]
    pub(crate) fn run<K: OnTiles>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
        fn on_registers<K: OnTiles>(s: Avx512, kernel: K) -> K::Output {
            /// Also when the kernel panics.
            struct Release;
            impl Drop for Release {
                #[inline(always)]
                fn drop(&mut self) {
                    // SAFETY: the token proves AMX.
                    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
                }
            }
            // SAFETY: the token proves AMX; the layout is 64 bytes in the form that the instruction wants.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &LAYOUT, options(nostack, preserves_flags));
            }
            let _release = Release;
            kernel.call(s, Tiles::Registers(Registers(())))
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
        fn by_pairs<K: OnTiles>(s: Avx512, unit: Avx512Bf16, kernel: K) -> K::Output {
            kernel.call(s, Tiles::Pairs(unit))
        }
        // SAFETY: the token proves the features.
        unsafe {
            match self.by {
                By::Registers => on_registers(self.vectors, kernel),
                By::Pairs(unit) => by_pairs(self.vectors, unit, kernel),
            }
        }
    }
}

impl Registers {
    /// Loads tile `T` from 16 rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// The rows are readable.
    #[inline(always)]
    pub(crate) unsafe fn load<const T: u8>(self, p: *const u8, stride: usize) {
        // SAFETY: the caller's promise; `Registers` proves that tiles are set up.
        unsafe {
            asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) p, s = in(reg) stride,
                options(nostack, preserves_flags, readonly));
        }
    }

    /// Stores tile `T` to 16 rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// The rows are writable.
    #[inline(always)]
    pub(crate) unsafe fn store<const T: u8>(self, p: *mut u8, stride: usize) {
        // SAFETY: the caller's promise; `Registers` proves that tiles are set up.
        unsafe {
            asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) p, s = in(reg) stride,
                options(nostack, preserves_flags));
        }
    }

    /// Tile `T` becomes 0.
    #[inline(always)]
    pub(crate) fn zero<const T: u8>(self) {
        // SAFETY: `Registers` proves that tiles are set up.
        unsafe {
            asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem));
        }
    }

    /// C += A B: tile `C` 16 x 16 f32, `A` 16 x 32 bf16, `B` pairs of 32 x 16 bf16. Three different tiles.
    #[inline(always)]
    pub(crate) fn multiply_add<const C: u8, const A: u8, const B: u8>(self) {
        const { assert!(C != A && A != B && B != C && C < 8 && A < 8 && B < 8) };
        // SAFETY: `Registers` proves that tiles are set up.
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, preserves_flags, nomem));
        }
    }
}

impl Tiles {
    /// Rounds to bf16 and sets the lanes of `first` before those of `second`: 16 words of neighbours.
    #[inline(always)]
    pub(crate) fn row(self, first: __m512, second: __m512) -> __m512 {
        // SAFETY: `Tiles` proves AVX512-BF16; both types are 64 bytes of any bits.
        unsafe { core::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first)) }
    }

    /// Rounds to bf16 and pairs lane i of `low` with lane i of `high`: a row of a right operand.
    #[inline(always)]
    pub(crate) fn pairs(self, low: __m512, high: __m512) -> __m512 {
        let row = self.row(low, high);
        // SAFETY: `Tiles` proves AVX-512 F and BW.
        unsafe { _mm512_castsi512_ps(_mm512_permutexvar_epi16(halves(), _mm512_castps_si512(row))) }
    }

    /// Adds to each lane of `sum` the two bf16 of that lane of a row of a right operand.
    #[inline(always)]
    pub(crate) fn add_pairs(self, sum: __m512, row: __m512) -> __m512 {
        /// 1 and 1, in bf16.
        const ONES: i32 = 0x3f80_3f80;
        // SAFETY: `Tiles` proves AVX512-BF16; all types are 64 bytes of any bits.
        unsafe {
            let row = core::mem::transmute::<__m512, __m512bh>(row);
            let ones = core::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(ONES));
            _mm512_dpbf16_ps(sum, row, ones)
        }
    }

    /// As [`Tiles::pairs`], of two rows of 16 bf16, the elements of both in the lower half of a vector's bits.
    #[inline(always)]
    pub(crate) fn interleave(self, low: __m256i, high: __m256i) -> __m512 {
        // SAFETY: `Tiles` proves AVX-512 F and BW.
        unsafe {
            let row = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(halves(), row))
        }
    }
}

/// Word 2 i from word i, word 2 i + 1 from word 16 + i.
#[inline(always)]
fn halves() -> __m512i {
    const INDEX: [u16; 32] = {
        let mut x = [0; 32];
        let mut i = 0;
        while i < 16 {
            (x[2 * i], x[2 * i + 1]) = (i as u16, 16 + i as u16);
            i += 1;
        }
        x
    };
    // SAFETY: called with a token in hand; the array has 64 bytes.
    unsafe { _mm512_loadu_si512(INDEX.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_pairs_are_rounded_to_nearest() {
        struct Rounded([f32; 32]);
        impl OnTiles for Rounded {
            type Output = [[u16; 32]; 2];
            #[inline(always)]
            fn call(self, _: Avx512, tiles: Tiles) -> [[u16; 32]; 2] {
                let mut out = [[0u16; 32]; 2];
                // SAFETY: the token proves AVX-512; arrays of 64 bytes a vector.
                unsafe {
                    let low = _mm512_loadu_ps(self.0.as_ptr());
                    let high = _mm512_loadu_ps(self.0.as_ptr().add(16));
                    _mm512_storeu_ps(out[0].as_mut_ptr().cast(), tiles.row(low, high));
                    _mm512_storeu_ps(out[1].as_mut_ptr().cast(), tiles.pairs(low, high));
                }
                out
            }
        }
        let Some(unit) = crate::simd::tile_unit() else {
            eprintln!("ignored: this CPU or system has no AMX for bf16");
            return;
        };
        let x: [f32; 32] = std::array::from_fn(|i| (i as f32 - 7.3) * 1.237);
        let [row, pairs] = unit.run(Rounded(x));
        for (i, x) in x.into_iter().enumerate() {
            let want = half::bf16::from_f32(x).to_bits();
            assert_eq!(row[i], want);
            assert_eq!(pairs[2 * (i % 16) + i / 16], want);
        }
    }
}
