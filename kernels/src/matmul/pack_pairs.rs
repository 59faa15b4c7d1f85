//! Panels of pairs of bf16: of k and k + 1 side by side, the even one lower in memory, 4 bytes together, for the instruction that
//! multiplies pairs. An odd k at the end of a product has 0 beside it.
//!
//! The format is that of `pack` with pairs for f32, so what lies along k is packed by its code: 4 bytes move as an f32 would.

#![allow(unsafe_code)]

use super::super::simd::{Kernel, Simd};
use super::pack::{Block, Lines, transpose_lines};

/// The arguments of [`super::pack::pack_rows`] for panels of `W` lines, whose promise holds wherever one is made.
pub(super) struct PackPairs<const W: usize>(pub Block, pub *mut f32);

impl<const W: usize> Kernel for PackPairs<W> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let PackPairs(block, to) = self;
        // SAFETY: the promise of `pack_rows`.
        unsafe {
            if block.line_stride == 1 {
                pair_lines::<S, W>(s, block, to.cast());
            } else if block.depth_stride == 1 {
                let (whole, rows) = (block.depth / 2, block.depth.div_ceil(2));
                let lines = Lines {
                    data: block.data.cast::<f32>(),
                    lines: block.lines,
                    depth: whole,
                    bytes: 2 * block.line_stride,
                };
                transpose_lines::<S, f32, false>(s, lines, W, rows, to);
                pairs_one_by_one::<W>(block, whole, to.cast());
            } else {
                pairs_one_by_one::<W>(block, 0, to.cast());
            }
        }
    }
}

/// Element (line, p), 0 if there is none.
///
/// # Safety
/// The block's elements are readable.
#[inline(always)]
unsafe fn element(block: &Block, line: usize, p: usize) -> u32 {
    if line >= block.lines || p >= block.depth {
        return 0;
    }
    let at = line * block.line_stride + p * block.depth_stride;
    // SAFETY: the caller's promise.
    u32::from(unsafe { *block.data.cast::<u16>().add(at) })
}

/// All pairs from number `first` on.
///
/// # Safety
/// As [`super::pack::pack_rows`].
#[inline(always)]
unsafe fn pairs_one_by_one<const W: usize>(block: Block, first: usize, to: *mut u32) {
    let rows = block.depth.div_ceil(2);
    for line in 0..block.lines.next_multiple_of(W) {
        let to = to.wrapping_add(line / W * W * rows + line % W);
        for p in first..rows {
            // SAFETY: the caller's promise; element p of this line of a panel.
            unsafe {
                let (even, odd) = (
                    element(&block, line, 2 * p),
                    element(&block, line, 2 * p + 1),
                );
                *to.add(p * W) = even | odd << 16;
            }
        }
    }
}

/// Pairs in a band: as `BAND` of [`super::pack`].
const BAND: usize = 4;

/// Lines that lie side by side.
///
/// # Safety
/// As [`super::pack::pack_rows`].
#[inline(always)]
unsafe fn pair_lines<S: Simd, const W: usize>(s: S, block: Block, to: *mut u32) {
    let (data, rows) = (block.data.cast::<u16>(), block.depth.div_ceil(2));
    let whole = block.depth / 2;
    for band in (0..whole).step_by(BAND) {
        for line in (0..block.lines).step_by(W) {
            let left = block.lines - line;
            for p in band..(band + BAND).min(whole) {
                let even = data.wrapping_add(2 * p * block.depth_stride + line);
                let odd = even.wrapping_add(block.depth_stride);
                s.prefetch(even.wrapping_add(2 * BAND * block.depth_stride));
                s.prefetch(odd.wrapping_add(2 * BAND * block.depth_stride));
                let to = to.wrapping_add(line * rows + p * W);
                // SAFETY: min(left, W) lines of two k lie in the block, and W pairs in a row of the panel.
                unsafe {
                    if left >= W {
                        let (even, odd) = (*even.cast::<[u16; W]>(), *odd.cast::<[u16; W]>());
                        let to = &mut *to.cast::<[u32; W]>();
                        for i in 0..W {
                            to[i] = u32::from(even[i]) | u32::from(odd[i]) << 16;
                        }
                    } else {
                        for i in 0..W {
                            *to.add(i) = if i < left {
                                u32::from(*even.add(i)) | u32::from(*odd.add(i)) << 16
                            } else {
                                0
                            };
                        }
                    }
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { pairs_one_by_one::<W>(block, whole, to) }
}

/// Copies lines that lie along k, `pitch` pairs apart.
///
/// # Safety
/// As [`super::pack::copy_rows`].
pub(super) unsafe fn copy_pairs(block: Block, pitch: usize, to: *mut f32) {
    for line in 0..block.lines {
        let from = block.data.cast::<u16>();
        let from = from.wrapping_add(line * block.line_stride);
        let to = to.wrapping_add(line * pitch).cast::<u16>();
        // SAFETY: the caller's promise: a line of the block, and room for its pairs.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, block.depth);
            if block.depth % 2 == 1 {
                *to.add(block.depth) = 0;
            }
        }
    }
}
