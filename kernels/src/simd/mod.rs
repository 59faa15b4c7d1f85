//! Vectors of f32 on every instruction set: the only folder with `core::arch`.
//!
//! A token ([`Avx512`], [`Avx2`], [`Neon`], [`Portable`]) can be made only on a CPU that has the instructions, so that
//! its methods are safe. A kernel is written once, as a [`Kernel`] generic over [`Simd`], and [`dispatch`] runs it under
//! one `#[target_feature]` function, into which everything inlines: methods and kernels are therefore
//! `#[inline(always)]` (a method without it would be compiled for the baseline CPU and be called, slowly).
//!
//! Every operation gives the same bits on every instruction set (but for the payload of a NaN), so a kernel does too as
//! long as the order of its sums does not follow `LANES`. [`with_isa`] runs a test on a chosen one.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512_tile;
mod cache;
#[cfg(test)]
mod emulated;
#[cfg(target_arch = "aarch64")]
mod neon;
mod past;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod units;

use crate::dtype::Float;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512_bf16::Avx512Bf16;
pub(crate) use cache::{ahead_of_reads, second_cache};
#[cfg(test)]
use emulated::Emulated16;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use past::{Past, past_caches};
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use tiles::{OnTiles, TileUnit, Tiles};
pub(crate) use units::PairUnit;
pub use units::{check_units, has_tile_unit};
#[cfg(target_arch = "x86_64")]
pub(crate) use units::{matrix_unit, tile_unit};

/// Rows and vectors of a tile on AVX-512: 28 accumulators, 2 vectors of B, 1 broadcast: 31 of 32 registers.
#[cfg(any(test, target_arch = "x86_64"))]
const TILE_OF_16: (usize, usize) = (14, 2);
/// Rows and vectors of a tile on NEON: 24 accumulators, 4 vectors of B, 1 broadcast: 29 of 32 registers.
const TILE_OF_4: (usize, usize) = (6, 4);

/// 1.5 * 2^23: an f32 of this size has no digits behind the point, so that adding it to a number rounds that to an integer
/// (ties to even), which the sum's lowest bits then are (see [`Simd::shift`]).
pub(crate) const POWER: f32 = 12_582_912.0;

/// Code that runs on any instruction set. Write `call` with `#[inline(always)]`.
pub(crate) trait Kernel {
    /// What the kernel returns.
    type Output;
    /// Runs on the instruction set of `s`.
    fn call<S: Simd>(self, s: S) -> Self::Output;
}

/// Code around a tile of accumulators of `ROWS` x `VECTORS` vectors. Write `call` with `#[inline(always)]`.
pub(crate) trait TileKernel {
    /// What the kernel returns.
    type Output;
    /// Runs on the instruction set of `s`, with the largest tile that its registers hold.
    fn call<S: Simd, const ROWS: usize, const VECTORS: usize>(self, s: S) -> Self::Output;
}

/// A whole tile's chains: to\[i, j\] = from\[i, j\] + sum over p < k of a\[i, p\] b\[p, j\]. Distances are in bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct TileLoop {
    /// Terms of a sum.
    pub k: usize,
    /// Element (0, 0) of A.
    pub a: *const f32,
    /// Whether A's rows lie side by side, one p after another; else they lie along k.
    pub a_packed: bool,
    /// From p to p if packed, else from row to row.
    pub a_step: usize,
    /// Row 0 of B: a tile's columns, side by side.
    pub b: *const f32,
    /// From row to row of B.
    pub b_step: usize,
    /// Null for sums that begin at 0.
    pub from: *const f32,
    /// From row to row.
    pub from_row: usize,
    /// May be `from`; bf16 if `narrow`.
    pub to: *mut f32,
    /// From row to row.
    pub to_row: usize,
    /// Whether sums of pairs are rounded to bf16 at the end, as [`PairUnit::narrow`] does.
    pub narrow: bool,
    /// What will be read soon, one after another up to the first without turns.
    pub asks: *const Ask,
}

/// Memory to be asked for while a tile runs, 128 bytes in each turn of its loop; it need not exist.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Ask {
    pub at: *const u8,
    /// Bytes from turn to turn.
    pub step: usize,
    pub turns: usize,
}

impl Ask {
    pub(crate) const NOTHING: Ask = Ask {
        at: std::ptr::null(),
        step: 0,
        turns: 0,
    };
}

/// As many at most, and one of no turns. By reference: what is stored in parts and copied whole waits for all stores before it.
pub(crate) type Asks = [Ask; 4];

/// A token of an instruction set that this CPU has, and its operations on vectors of `LANES` f32.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// `LANES` f32.
    type V: Copy;
    /// `LANES` truth values.
    type M: Copy;
    /// f32 in a vector; divides 32.
    const LANES: usize;
    /// Whether [`Simd::tile_loop`] does anything.
    const HAS_TILE_LOOP: bool = false;
    /// Whether products go row by row: where speed does not matter, and a loop for each number of rows is only code to compile.
    const ROW_BY_ROW: bool = false;

    /// Calls `kernel` compiled for this instruction set.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    /// Calls `kernel` with the tile that suits this instruction set's registers: at most 14 rows, at most 32 columns,
    /// a divisor of 32. Must itself be called under [`Simd::run`].
    fn tiled<K: TileKernel>(self, kernel: K) -> K::Output;

    /// Computes a tile of `R` rows and the columns of [`Simd::tiled`], if this instruction set has a loop of its own for it
    /// ([`Simd::HAS_TILE_LOOP`]); otherwise does nothing.
    ///
    /// # Safety
    /// What `tile` describes is readable, and writable at `to`.
    #[inline(always)]
    unsafe fn tile_loop<const R: usize>(self, tile: &TileLoop) {
        let _ = tile;
    }

    /// Transposes `LANES` vectors in place: lane j of vector i goes to lane i of vector j. Panics on another number.
    fn transpose(self, x: &mut [Self::V]);

    /// Asks for the cache line of p, which need not be readable.
    fn prefetch<T>(self, p: *const T);

    /// All lanes x.
    fn splat(self, x: f32) -> Self::V;
    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b, correctly rounded.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c - a b, rounded once.
    fn neg_fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a if a > b, else b: a NaN in b stays, a NaN in a is dropped (see [`Simd::max_nan`]).
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a if a < b, else b: a NaN in b stays, a NaN in a is dropped.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// Without its sign.
    fn abs(self, a: Self::V) -> Self::V;
    /// Magnitude of a, sign of b.
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// a 2^n, rounded once, for integral n, |n| <= 252, and a = 0 or |a| >= 2^-100. (Below that the instruction sets
    /// without such an instruction may round twice.)
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;
    /// a 2^n for t = n + [`POWER`], n integral: the lowest bits of t are added to the exponent. a and the result must be
    /// normal numbers.
    fn shift(self, a: Self::V, t: Self::V) -> Self::V;
    /// (m, e) with a = m 2^e, 2/3 <= m < 4/3, e integral; a positive, finite and normal.
    fn split(self, a: Self::V) -> (Self::V, Self::V);

    /// a < b; false with a NaN.
    fn lt(self, a: Self::V, b: Self::V) -> Self::M;
    /// a <= b; false with a NaN.
    fn le(self, a: Self::V, b: Self::V) -> Self::M;
    /// a = b; false with a NaN.
    fn eq(self, a: Self::V, b: Self::V) -> Self::M;
    /// a where m, else b.
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V;
    /// True in the first n lanes.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn mask_first(self, n: usize) -> Self::M;
    /// Both.
    fn mask_and(self, a: Self::M, b: Self::M) -> Self::M;

    /// Widens `LANES` elements from p.
    ///
    /// # Safety
    /// `LANES` elements are readable from p.
    unsafe fn load_ptr<T: Float>(self, p: *const T) -> Self::V;
    /// Widens n < `LANES` elements from p; the other lanes are 0.
    ///
    /// # Safety
    /// n elements are readable from p.
    unsafe fn load_first_ptr<T: Float>(self, p: *const T, n: usize) -> Self::V;
    /// Narrows to `LANES` elements at p: nearest, ties to even.
    ///
    /// # Safety
    /// `LANES` elements are writable from p.
    unsafe fn store_ptr<T: Float>(self, p: *mut T, v: Self::V);
    /// Narrows the first n < `LANES` lanes to p and leaves what follows untouched.
    ///
    /// # Safety
    /// n elements are writable from p.
    unsafe fn store_first_ptr<T: Float>(self, p: *mut T, n: usize, v: Self::V);

    /// Writes `LANES` f32 past the caches, where there is such a store ([`Past`]).
    ///
    /// # Safety
    /// They are writable from p, which `LANES` f32 divide; [`Simd::fence_past`] follows before another thread looks.
    #[inline(always)]
    unsafe fn store_past_ptr(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { self.store_ptr(p, v) }
    }
    /// Waits for the stores past the caches.
    #[inline(always)]
    fn fence_past(self) {}

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// The greater, or NaN if either is.
    #[inline(always)]
    fn max_nan(self, a: Self::V, b: Self::V) -> Self::V {
        self.select(self.eq(a, a), self.max(a, b), a)
    }

    /// Widens the first `LANES` elements. Panics if there are fewer.
    #[inline(always)]
    fn load<T: Float>(self, x: &[T]) -> Self::V {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the slice holds LANES elements.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    /// Widens min(len, `LANES`) elements; missing lanes are 0.
    #[inline(always)]
    fn load_first<T: Float>(self, x: &[T]) -> Self::V {
        if x.len() >= Self::LANES {
            self.load(x)
        } else {
            // SAFETY: the slice holds len < LANES elements.
            unsafe { self.load_first_ptr(x.as_ptr(), x.len()) }
        }
    }

    /// Narrows to the first `LANES` elements. Panics if there are fewer.
    #[inline(always)]
    fn store<T: Float>(self, y: &mut [T], v: Self::V) {
        assert!(y.len() >= Self::LANES);
        // SAFETY: the slice holds LANES elements.
        unsafe { self.store_ptr(y.as_mut_ptr(), v) }
    }

    /// Narrows to the first min(len, `LANES`) elements.
    #[inline(always)]
    fn store_first<T: Float>(self, y: &mut [T], v: Self::V) {
        if y.len() >= Self::LANES {
            self.store(y, v);
        } else {
            // SAFETY: the slice holds len < LANES elements.
            unsafe { self.store_first_ptr(y.as_mut_ptr(), y.len(), v) }
        }
    }
}

/// An instruction set that this build has code for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Isa {
    /// AVX-512 and the instruction that multiplies pairs of bf16 ([`PairUnit`]).
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON, part of every 64-bit ARM.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Arrays in the shape of AVX-512.
    #[cfg(test)]
    Emulated16,
    /// Plain Rust.
    Portable,
}

impl Isa {
    const ALL: &[Isa] = &[
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon,
        #[cfg(test)]
        Isa::Emulated16,
        Isa::Portable,
    ];

    /// The instruction sets that this CPU has, best first; `Portable` is always the last.
    pub(crate) fn available() -> Vec<Isa> {
        Self::ALL.iter().copied().filter(|i| i.is_here()).collect()
    }

    fn is_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512Bf16::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::new().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::new().is_some(),
            #[cfg(test)]
            Isa::Emulated16 => Emulated16::new().is_some(),
            Isa::Portable => true,
        }
    }

    /// The instruction that multiplies pairs of bf16, if it belongs to this set.
    pub(crate) fn pair_unit(self) -> Option<PairUnit> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512Bf16::new(),
            _ => None,
        }
    }
}

#[cfg(test)]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<Isa>> = const { std::cell::Cell::new(None) };
}

/// The instruction set for kernels called now: the CPU's fastest. Read it once where a kernel is entered and hand it to
/// workers by value, so that a test's choice ([`with_isa`]) reaches them.
pub(crate) fn isa() -> Isa {
    #[cfg(test)]
    if let Some(isa) = CHOSEN.get() {
        return isa;
    }
    static BEST: OnceLock<Isa> = OnceLock::new();
    *BEST.get_or_init(|| {
        let mut here = Isa::available().into_iter();
        here.find(|&isa| isa.pair_unit().is_none() || units::pairs_are_wanted())
            .expect("plain Rust is everywhere")
    })
}

/// Runs f with [`isa`] fixed on this thread.
#[cfg(test)]
pub(crate) fn with_isa<R>(isa: Isa, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CHOSEN.set(self.0);
        }
    }
    let _restore = Restore(CHOSEN.replace(Some(isa)));
    f()
}

/// Runs `kernel` on `isa`. Panics if this CPU lacks it.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => Avx512::with_bf16()
            .expect("this CPU lacks AVX512-BF16")
            .run(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Avx512::new().expect("this CPU lacks AVX-512").run(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Avx2::new().expect("this CPU lacks AVX2").run(kernel),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Neon::new().expect("this CPU lacks NEON").run(kernel),
        #[cfg(test)]
        Isa::Emulated16 => Emulated16::new().expect("no FMA").run(kernel),
        Isa::Portable => Portable.run(kernel),
    }
}
