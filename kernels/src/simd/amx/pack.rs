//! bf16 from where it lies into the unit's panels: the one place where their format is made.

use super::super::Simd;
use super::{Amx, Avx512, BLOCK, DEPTH, SIDE, TILE};
use core::arch::x86_64::*;
use half::bf16;

/// `lines` rows of A or columns of B by `depth` k of bf16, at any distance from one another.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    pub(crate) data: *const bf16,
    pub(crate) lines: usize,
    pub(crate) depth: usize,
    /// Elements from a line to the next.
    pub(crate) line_stride: usize,
    /// Elements from one k to the next.
    pub(crate) depth_stride: usize,
}

/// Packs panels of 32 rows of A, each of its blocks of 32 k in turn; missing rows and k are 0.
///
/// # Safety
/// The lines are readable; ceil(lines / 32) ceil(depth / 32) [`BLOCK`] elements are writable at `to`.
pub(crate) unsafe fn pack_left(unit: Amx, from: Lines, to: *mut bf16) {
    // SAFETY: the token proves AVX-512; the caller's promise.
    unsafe { pack::<false>(unit.vectors(), from, to) }
}

/// As [`pack_left`], for panels of 32 columns of B.
///
/// # Safety
/// As [`pack_left`].
pub(crate) unsafe fn pack_right(unit: Amx, from: Lines, to: *mut bf16) {
    // SAFETY: the token proves AVX-512; the caller's promise.
    unsafe { pack::<true>(unit.vectors(), from, to) }
}

/// Tiles of 16 lines by 32 k: rows of a tile are lines, or pairs of k if `PAIRS`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack<const PAIRS: bool>(s: Avx512, from: Lines, to: *mut bf16) {
    let blocks = from.depth.div_ceil(DEPTH);
    let lines = from.lines.next_multiple_of(SIDE);
    // As it lies: what goes along k line by line, all else k by k.
    if from.depth_stride == 1 {
        for line in (0..lines).step_by(TILE) {
            for block in 0..blocks {
                // SAFETY: the caller's promise.
                unsafe { pack_tile::<PAIRS>(s, from, (line, block), to) }
            }
        }
    } else {
        for block in 0..blocks {
            for line in (0..lines).step_by(SIDE) {
                let whole = line + SIDE <= from.lines && (block + 1) * DEPTH <= from.depth;
                // SAFETY: the caller's promise.
                unsafe {
                    if PAIRS && from.line_stride == 1 && whole {
                        // A row of 32 columns is a cache line, which is read once.
                        let to = to.add((line / SIDE * blocks + block) * BLOCK);
                        whole_pairs(from, line, block * DEPTH, to);
                    } else {
                        pack_tile::<PAIRS>(s, from, (line, block), to);
                        pack_tile::<PAIRS>(s, from, (line + TILE, block), to);
                    }
                }
            }
        }
    }
}

/// A block of a panel of B whose 32 columns lie side by side, for 32 k that there are.
///
/// # Safety
/// The columns are readable; [`BLOCK`] elements are writable at `to`. The CPU has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn whole_pairs(from: Lines, line: usize, p: usize, to: *mut bf16) {
    // Word 2 i is word i of the first row, word 2 i + 1 that of the second; then the upper half of both.
    const LOW: [u16; 32] = interleaved(0);
    const HIGH: [u16; 32] = interleaved(16);
    let data = from.data.wrapping_add(line + p * from.depth_stride);
    // SAFETY: 32 elements of 32 rows from here on are the caller's; rows that are asked for need not exist.
    unsafe {
        let low = _mm512_loadu_si512(LOW.as_ptr().cast());
        let high = _mm512_loadu_si512(HIGH.as_ptr().cast());
        for q in 0..TILE {
            let even = data.wrapping_add(2 * q * from.depth_stride);
            let odd = even.wrapping_add(from.depth_stride);
            _mm_prefetch::<_MM_HINT_T0>(even.wrapping_add(2 * SIDE).cast());
            _mm_prefetch::<_MM_HINT_T0>(odd.wrapping_add(2 * SIDE).cast());
            let even = _mm512_loadu_si512(even.cast());
            let odd = _mm512_loadu_si512(odd.cast());
            let to = to.add(2 * TILE * q);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(even, low, odd));
            let second = to.add(TILE * DEPTH);
            _mm512_storeu_si512(second.cast(), _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

/// Indices of words from `first` on of two vectors in turn.
const fn interleaved(first: u16) -> [u16; 32] {
    let mut x = [0; 32];
    let mut i = 0;
    while i < 16 {
        (x[2 * i], x[2 * i + 1]) = (first + i as u16, 32 + first + i as u16);
        i += 1;
    }
    x
}

/// # Safety
/// As [`pack_left`].
#[inline(always)]
unsafe fn pack_tile<const PAIRS: bool>(
    s: Avx512,
    from: Lines,
    (line, block): (usize, usize),
    to: *mut bf16,
) {
    let blocks = from.depth.div_ceil(DEPTH);
    let at = (line / SIDE * blocks + block) * BLOCK + line % SIDE * DEPTH;
    // SAFETY: the caller's promise; both functions keep to the lines and k that there are.
    unsafe {
        let to = to.add(at).cast::<i32>();
        let mut tile = if from.depth_stride == 1 {
            along_k(from, line, block * DEPTH)
        } else {
            along_lines(from, line, block * DEPTH)
        };
        if PAIRS == (from.depth_stride == 1) {
            let mut square = [_mm512_setzero_ps(); TILE];
            for (x, v) in square.iter_mut().zip(tile) {
                *x = _mm512_castsi512_ps(v);
            }
            s.transpose(&mut square);
            for (v, x) in tile.iter_mut().zip(square) {
                *v = _mm512_castps_si512(x);
            }
        }
        for (row, v) in tile.iter().enumerate() {
            _mm512_storeu_si512(to.add(row * TILE).cast(), *v);
        }
    }
}

/// 16 lines that lie along k: 32 k of each.
///
/// # Safety
/// The lines are readable.
#[inline(always)]
unsafe fn along_k(from: Lines, line: usize, p: usize) -> [__m512i; TILE] {
    let deep = DEPTH.min(from.depth - p);
    let mask = ((1u64 << deep) - 1) as u32;
    let data = from.data.wrapping_add(line * from.line_stride + p);
    // SAFETY: lines below `lines` have `deep` elements from p on; others are not read. AVX-512 is the caller's.
    unsafe {
        let mut tile = [_mm512_setzero_si512(); TILE];
        for (l, v) in tile.iter_mut().enumerate() {
            if line + l < from.lines {
                let at = data.wrapping_add(l * from.line_stride);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(2 * DEPTH).cast());
                *v = _mm512_maskz_loadu_epi16(mask, at.cast());
            }
        }
        tile
    }
}

/// 16 pairs of k of 16 lines; lines lie side by side, or anywhere.
///
/// # Safety
/// The lines are readable.
#[inline(always)]
unsafe fn along_lines(from: Lines, line: usize, p: usize) -> [__m512i; TILE] {
    // SAFETY: the caller's promise; otherwise registers only. AVX-512 is the caller's.
    unsafe {
        let mut tile = [_mm512_setzero_si512(); TILE];
        for (q, v) in tile.iter_mut().enumerate() {
            let even = across(from, line, p + 2 * q);
            let odd = across(from, line, p + 2 * q + 1);
            *v = _mm512_or_si512(
                _mm512_cvtepu16_epi32(even),
                _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd)),
            );
        }
        tile
    }
}

/// Element p of 16 lines; 0 where there are none.
///
/// # Safety
/// The lines are readable.
#[inline(always)]
unsafe fn across(from: Lines, line: usize, p: usize) -> __m256i {
    let here = TILE.min(from.lines.saturating_sub(line));
    let at = from
        .data
        .wrapping_add(line * from.line_stride + p * from.depth_stride);
    // SAFETY: element p of `here` lines from this one on is readable. AVX-512 is the caller's.
    unsafe {
        if p >= from.depth {
            _mm256_setzero_si256()
        } else if from.line_stride == 1 {
            // The next cache line of this k, for the tile after the next.
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(3 * TILE).cast());
            _mm256_maskz_loadu_epi16(((1u32 << here) - 1) as u16, at.cast())
        } else {
            let mut all = [bf16::ZERO; TILE];
            for (l, x) in all.iter_mut().enumerate().take(here) {
                *x = *at.wrapping_add(l * from.line_stride);
            }
            _mm256_loadu_si256(all.as_ptr().cast())
        }
    }
}
