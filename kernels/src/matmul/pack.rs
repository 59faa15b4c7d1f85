//! Copies of blocks of A and B in the order in which the microkernel reads them, widened to f32.
//!
//! Both operands are cut into panels: W lines (rows of A, columns of B) side by side, element (p, i) of a panel at
//! p W + i. One function serves both, since a panel of A is a panel of B transposed. What is contiguous in memory
//! decides how: along the lines (vectors are copied, in bands of a few k across all panels), along k (squares are
//! transposed in registers), or neither. Panel by panel the copy took two cycles an element, a page for each 64 bytes.
//!
//! Products of bf16 by bf16 change places here ([`Terms`]): a chain then only ever adds its next term.

#![allow(unsafe_code)]

use super::super::simd::{Kernel, PairUnit, Simd};
use super::pack_pairs::{PackPairs, copy_pairs};
use crate::dtype::{DType, Float};
use half::{bf16, f16};
use std::marker::PhantomData;

/// What follows what in a chain, and so what packed panels hold.
#[derive(Clone, Copy, Debug)]
pub(super) enum Terms {
    /// k in ascending order.
    Ascending,
    /// Of k and k + 1, k even, the odd one first: the order of the instruction that multiplies pairs of bf16.
    OddFirst,
    /// Pairs for that instruction, 4 bytes each, the even one lower in memory.
    Pairs(PairUnit),
}

impl Terms {
    /// Elements of 4 bytes of a packed line of so many k, which begin at an even one.
    pub(super) fn packed(self, k: usize) -> usize {
        match self {
            Terms::Ascending | Terms::OddFirst => k,
            Terms::Pairs(_) => k.div_ceil(2),
        }
    }

    /// What multiplies pairs.
    pub(super) fn pairs(self) -> Option<PairUnit> {
        match self {
            Terms::Pairs(unit) => Some(unit),
            _ => None,
        }
    }
}

/// The k of the term that stands at place p of `depth`.
#[inline(always)]
pub(super) fn term<const ODD_FIRST: bool>(p: usize, depth: usize) -> usize {
    if ODD_FIRST && (p ^ 1) < depth {
        p ^ 1
    } else {
        p
    }
}

/// Part of an operand: `lines` (rows of A, columns of B) by `depth` (k), at any distance from one another.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub data: *const u8,
    pub dtype: DType,
    pub lines: usize,
    pub depth: usize,
    /// Elements from a line to the next.
    pub line_stride: usize,
    /// Elements from one k to the next.
    pub depth_stride: usize,
}

/// Writes panels of W = R lines of A, `depth * W` f32 each ([`Terms::packed`] for depth); the missing lines of the last panel
/// are 0.
///
/// # Safety
/// The block's elements are readable. From `to`, `lines` rounded up to W, times `depth`, plus 16 f32 are writable.
#[inline(always)]
pub(super) unsafe fn pack_rows<S: Simd, const R: usize>(
    s: S,
    terms: Terms,
    block: Block,
    to: *mut f32,
) {
    // A function of its own for each type, not a copy wherever something is packed.
    match (block.dtype, terms) {
        (DType::F32, _) => s.run(PackRows::<f32, R, false>(block, to, PhantomData)),
        (DType::F16, _) => s.run(PackRows::<f16, R, false>(block, to, PhantomData)),
        (DType::Bf16, Terms::Ascending) => {
            s.run(PackRows::<bf16, R, false>(block, to, PhantomData))
        }
        (DType::Bf16, Terms::OddFirst) => s.run(PackRows::<bf16, R, true>(block, to, PhantomData)),
        (DType::Bf16, Terms::Pairs(_)) => s.run(PackPairs::<R>(block, to)),
        (DType::U32, _) => unreachable!("checked on entry"),
    }
}

/// As [`pack_rows`], for panels of V vectors of columns of B.
///
/// # Safety
/// As [`pack_rows`].
#[inline(always)]
pub(super) unsafe fn pack_columns<S: Simd, const V: usize>(
    s: S,
    terms: Terms,
    block: Block,
    to: *mut f32,
) {
    match (block.dtype, terms) {
        (DType::F32, _) => s.run(PackColumns::<f32, V, false>(block, to, PhantomData)),
        (DType::F16, _) => s.run(PackColumns::<f16, V, false>(block, to, PhantomData)),
        (DType::Bf16, Terms::Ascending) => {
            s.run(PackColumns::<bf16, V, false>(block, to, PhantomData))
        }
        (DType::Bf16, Terms::OddFirst) => {
            s.run(PackColumns::<bf16, V, true>(block, to, PhantomData))
        }
        // The instruction's tile is 32 columns wide.
        (DType::Bf16, Terms::Pairs(_)) => s.run(PackPairs::<32>(block, to)),
        (DType::U32, _) => unreachable!("checked on entry"),
    }
}

/// The arguments of [`pack_rows`], whose promise holds wherever one is made.
struct PackRows<T, const R: usize, const ODD_FIRST: bool>(Block, *mut f32, PhantomData<T>);

impl<T: Float, const R: usize, const ODD_FIRST: bool> Kernel for PackRows<T, R, ODD_FIRST> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        // SAFETY: made by `pack_rows` only, under its promise.
        unsafe { pack::<S, T, ODD_FIRST>(s, self.0, R, self.1) }
    }
}

/// The arguments of [`pack_columns`], whose promise holds wherever one is made.
struct PackColumns<T, const V: usize, const ODD_FIRST: bool>(Block, *mut f32, PhantomData<T>);

impl<T: Float, const V: usize, const ODD_FIRST: bool> Kernel for PackColumns<T, V, ODD_FIRST> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        // SAFETY: made by `pack_columns` only, under its promise.
        unsafe { pack::<S, T, ODD_FIRST>(s, self.0, V * S::LANES, self.1) }
    }
}

/// `width` is a constant once inlined.
///
/// # Safety
/// As [`pack_rows`].
#[inline(always)]
unsafe fn pack<S: Simd, T: Float, const ODD_FIRST: bool>(
    s: S,
    block: Block,
    width: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's promise, handed on; the last loop stays in the block and in the panels.
    unsafe {
        if block.line_stride == 1 {
            copy_lines::<S, T, ODD_FIRST>(s, block, width, to);
        } else if block.depth_stride == 1 {
            let lines = Lines {
                data: block.data.cast::<T>(),
                lines: block.lines,
                depth: block.depth,
                bytes: block.line_stride * size_of::<T>(),
            };
            transpose_lines::<S, T, ODD_FIRST>(s, lines, width, block.depth, to);
        } else {
            let data = block.data.cast::<T>();
            for line in 0..block.lines.next_multiple_of(width) {
                let to = to.add(line / width * width * block.depth + line % width);
                for p in 0..block.depth {
                    *to.add(p * width) = if line < block.lines {
                        let p = term::<ODD_FIRST>(p, block.depth);
                        let at = line * block.line_stride + p * block.depth_stride;
                        (*data.add(at)).to_f32()
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}

/// k in a band of [`copy_lines`]: so many rows are read at a time, each from panel to panel as it lies, so that memory
/// sees a few long streams instead of a piece from every page.
const BAND: usize = 8;

/// # Safety
/// As [`pack_rows`].
#[inline(always)]
unsafe fn copy_lines<S: Simd, T: Float, const ODD_FIRST: bool>(
    s: S,
    block: Block,
    width: usize,
    to: *mut f32,
) {
    let (data, depth) = (block.data.cast::<T>(), block.depth);
    let vectors = width.next_multiple_of(S::LANES);
    for band in (0..depth).step_by(BAND) {
        let band = band..(band + BAND).min(depth);
        for line in (0..block.lines).step_by(width) {
            let left = block.lines - line;
            for p in band.clone() {
                // SAFETY: `left` lines from this one on lie in the block; the vectors stay in the panel but for the
                // last row of a panel, which may not spill into the next one's first.
                unsafe {
                    let from = data.add(term::<ODD_FIRST>(p, depth) * block.depth_stride + line);
                    let to = to.add(line * depth + p * width);
                    s.prefetch(from.wrapping_add(BAND * block.depth_stride));
                    for i in (0..width).step_by(S::LANES) {
                        let v = if left >= vectors || i + S::LANES <= left {
                            s.load_ptr(from.add(i))
                        } else if i < left {
                            s.load_first_ptr(from.add(i), left - i)
                        } else {
                            s.zero()
                        };
                        // Beyond `left` lies a line of the next panel: it is overwritten, or not stored.
                        store_line(s, to, width, i, p + 1 == depth, v);
                    }
                }
            }
        }
    }
    let ragged = block.lines % width;
    if ragged > 0 && !width.is_multiple_of(S::LANES) {
        // SAFETY: the last panel's missing lines.
        unsafe { clear_missing(block, width, ragged, to) }
    }
}

/// # Safety
/// As [`pack_rows`], for a last panel with only `ragged` lines.
#[inline(always)]
unsafe fn clear_missing(block: Block, width: usize, ragged: usize, to: *mut f32) {
    let first = block.lines - ragged;
    for p in 0..block.depth {
        for i in ragged..width {
            // SAFETY: row p of the last panel.
            unsafe { *to.add(first * block.depth + p * width + i) = 0.0 };
        }
    }
}

/// Stores lanes for lines i.. of a row of a panel. What exceeds the row belongs to the next one, which is written later,
/// except after the panel's last row.
///
/// # Safety
/// The panel is writable.
#[inline(always)]
unsafe fn store_line<S: Simd>(s: S, to: *mut f32, width: usize, i: usize, last: bool, v: S::V) {
    // SAFETY: the caller's promise.
    unsafe {
        if i + S::LANES <= width || !last {
            s.store_ptr(to.add(i), v);
        } else {
            s.store_first_ptr(to.add(i), width - i, v);
        }
    }
}

/// Lines of `depth` elements each that lie along k, `bytes` from line to line.
#[derive(Clone, Copy)]
pub(super) struct Lines<T> {
    pub data: *const T,
    pub lines: usize,
    pub depth: usize,
    pub bytes: usize,
}

/// Packs lines into panels of `rows` rows.
///
/// # Safety
/// As [`pack_rows`], with `rows` >= depth for depth.
#[inline(always)]
pub(super) unsafe fn transpose_lines<S: Simd, T: Float, const ODD_FIRST: bool>(
    s: S,
    all: Lines<T>,
    width: usize,
    rows: usize,
    to: *mut f32,
) {
    let (depth, bytes) = (all.depth, all.bytes);
    for line in (0..all.lines).step_by(width) {
        for i in (0..width).step_by(S::LANES) {
            // Whole squares of this panel, without a question inside.
            let lanes = S::LANES.min(width - i);
            let here = lanes.min((all.lines - line).saturating_sub(i));
            let from = all.data.wrapping_byte_add((line + i) * bytes);
            let mut p = 0;
            while p < depth {
                let deep = S::LANES.min(depth - p);
                let mut square = [s.zero(); 16];
                let square = &mut square[..S::LANES];
                // SAFETY: `here` lines of the block from `from` on, each with `deep` more elements; rows p.. of the
                // panel, which `store_line` keeps to.
                unsafe {
                    if here == lanes && deep == S::LANES {
                        for (row, v) in square.iter_mut().enumerate().take(lanes) {
                            *v = s.load_ptr(from.byte_add(row * bytes).add(p));
                        }
                    } else {
                        for (row, v) in square.iter_mut().enumerate().take(here) {
                            let from = from.byte_add(row * bytes).add(p);
                            *v = if deep == S::LANES {
                                s.load_ptr(from)
                            } else {
                                s.load_first_ptr(from, deep)
                            };
                        }
                    }
                    s.transpose(square);
                    let to = to.add(line * rows + p * width);
                    if deep == S::LANES && p + deep < depth {
                        for q in 0..S::LANES {
                            let v = square[term::<ODD_FIRST>(q, S::LANES)];
                            store_line(s, to.add(q * width), width, i, i > 0, v);
                        }
                    } else {
                        for q in 0..deep {
                            let last = i > 0 || p + q + 1 == depth;
                            let v = square[term::<ODD_FIRST>(q, deep)];
                            store_line(s, to.add(q * width), width, i, last, v);
                        }
                    }
                }
                p += deep;
            }
        }
    }
}

/// Copies lines that lie along k, widened unless they are pairs, `pitch` f32 apart.
///
/// # Safety
/// The block's elements are readable; `depth` f32 ([`Terms::packed`] of it) are writable from every `pitch`th on.
#[inline(always)]
pub(super) unsafe fn copy_rows<S: Simd>(
    s: S,
    terms: Terms,
    block: Block,
    pitch: usize,
    to: *mut f32,
) {
    debug_assert_eq!(block.depth_stride, 1);
    match (block.dtype, terms) {
        (DType::F32, _) => s.run(CopyRows::<f32>(block, pitch, to, PhantomData)),
        (DType::F16, _) => s.run(CopyRows::<f16>(block, pitch, to, PhantomData)),
        (DType::Bf16, Terms::Ascending) => s.run(CopyRows::<bf16>(block, pitch, to, PhantomData)),
        (DType::Bf16, Terms::OddFirst) => s.run(CopyOddFirst(block, pitch, to)),
        // SAFETY: the caller's promise.
        (DType::Bf16, Terms::Pairs(_)) => unsafe { copy_pairs(block, pitch, to) },
        (DType::U32, _) => unreachable!("checked on entry"),
    }
}

/// The arguments of [`copy_rows`], whose promise holds wherever one is made.
struct CopyRows<T>(Block, usize, *mut f32, PhantomData<T>);

impl<T: Float> Kernel for CopyRows<T> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let CopyRows(block, pitch, to, _) = self;
        for line in 0..block.lines {
            let from = block
                .data
                .cast::<T>()
                .wrapping_add(line * block.line_stride);
            let to = to.wrapping_add(line * pitch);
            let mut p = 0;
            // SAFETY: the promise of `copy_rows`, within one line.
            unsafe {
                while p + S::LANES <= block.depth {
                    s.store_ptr(to.add(p), s.load_ptr(from.add(p)));
                    p += S::LANES;
                }
                if p < block.depth {
                    let left = block.depth - p;
                    s.store_first_ptr(to.add(p), left, s.load_first_ptr(from.add(p), left));
                }
            }
        }
    }
}

/// [`CopyRows`] of bf16 where of each two k the odd one comes first.
struct CopyOddFirst(Block, usize, *mut f32);

impl Kernel for CopyOddFirst {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, _: S) {
        let CopyOddFirst(block, pitch, to) = self;
        for line in 0..block.lines {
            let from = block.data.cast::<u16>();
            let from = from.wrapping_add(line * block.line_stride);
            let to = to.wrapping_add(line * pitch).cast::<u32>();
            // SAFETY: the promise of `copy_rows`, within one line. The compiler makes vectors of it.
            unsafe {
                for p in 0..block.depth / 2 {
                    *to.add(2 * p) = u32::from(*from.add(2 * p + 1)) << 16;
                    *to.add(2 * p + 1) = u32::from(*from.add(2 * p)) << 16;
                }
                if block.depth % 2 == 1 {
                    *to.add(block.depth - 1) = u32::from(*from.add(block.depth - 1)) << 16;
                }
            }
        }
    }
}
