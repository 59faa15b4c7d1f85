//! How large the blocks of a product are, and where they lie in a thread's scratch. None of this changes a bit.

use super::super::simd::second_cache;
use crate::dtype::DType;
use std::ops::Range;

/// k in a block at most.
pub(super) const KC: usize = 512;
/// Rows in a block: whole tiles of 4, 6, 12 and 14.
pub(super) const MC: usize = 1092;
/// Columns in a strip at most.
pub(super) const NC: usize = 640;
/// Rows and columns whose sums are kept in scratch where C is narrow and k takes several blocks.
pub(super) const KEPT: (usize, usize) = (MC, 512);
/// Bytes asked for at a time: two cache lines.
pub(super) const PIECE: usize = 128;
/// Bytes at whose multiples the rows of a panel meet in too few sets of the first cache.
pub(super) const ALIAS: usize = 4096;
/// Rows that hide the latency of a multiply-add.
pub(super) const LOW: usize = 4;
/// The largest tile of any instruction set.
pub(super) const TILE: (usize, usize) = (14, 32);
/// Vectors may be stored beyond the end of a packed block.
pub(super) const EXCESS: usize = 16;
/// With so few rows in a region, B is not packed.
pub(super) const FEW_ROWS: usize = 24;
/// With so few columns in a region, A is not packed.
pub(super) const FEW_COLS: usize = 64;
/// k in a block where B is read in place by few rows: its rows then are as many streams as the hardware can follow. With
/// blocks of KC each row of B is another page, and every line comes from afar.
pub(super) const SHALLOW: usize = 32;
/// Elements of B up to which it comes from the second cache anyway.
pub(super) const SHALLOW_FROM: usize = 1 << 16;
/// Up to this many multiply-adds neither is.
pub(super) const SMALL: usize = 96 * 96 * 96;
/// Up to so many rows B is streamed.
pub(super) const STREAMED: usize = 4;
/// Sums that stay in the first cache while B streams by: rows of B are read in long pieces. (Of 4 KiB each they gave a sixth less.)
pub(super) const STREAM_SUMS: usize = 4096;

/// k in a block and columns in a strip on this machine, [`KC`] and [`NC`] at most: the packed strip takes half to two thirds of
/// the second cache, a panel of A as much of the first. Scratch does not follow them, so that a ghost can tell it.
pub(super) fn block_sizes() -> (usize, usize) {
    match second_cache() >> 20 {
        0 => (256, 320),
        1 => (512, 256),
        _ => (KC, NC),
    }
}

/// f32 from row to row of copied panels: whole cache lines, and in another set of the first cache where `depth` is a power of
/// two.
pub(super) fn pitch(depth: usize) -> usize {
    depth.next_multiple_of(16) + 16
}

/// Where the pieces of one thread's scratch begin, in f32; A's is the first.
pub(super) struct Layout {
    pub b: usize,
    pub sums: usize,
    pub tile: usize,
    pub end: usize,
}

impl Layout {
    pub(super) fn new(m: usize, n: usize, k: usize, c: DType) -> Self {
        let depth = k.min(KC);
        // Whole tiles of any height.
        let rows = m.min(MC) + TILE.0 - 1;
        let cols = n.min(NC).next_multiple_of(TILE.1);
        let b = (rows * pitch(depth) + EXCESS).next_multiple_of(16);
        let sums = (b + cols * depth + EXCESS).next_multiple_of(16);
        let kept = if c != DType::F32 && k > SHALLOW {
            m.min(KEPT.0) * n.min(KEPT.1).next_multiple_of(TILE.1)
        } else {
            0
        };
        let streamed = if m <= STREAMED {
            STREAM_SUMS.min(m * n) + m * depth
        } else {
            0
        };
        let tile = (sums + kept.max(streamed)).next_multiple_of(16);
        Layout {
            b,
            sums,
            tile,
            end: tile + TILE.0 * TILE.1,
        }
    }
}

/// f32 of scratch for a region of a product m x n x k.
pub(super) fn scratch_f32(m: usize, n: usize, k: usize, c: DType) -> usize {
    Layout::new(m, n, k, c).end
}

/// `range` in pieces of at most `step`.
pub(super) fn pieces(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(step)
        .map(move |start| start..end.min(start + step))
}

/// `range` in nearly equal pieces of at most `most`, which `tile` divides: whole tiles but for the last.
pub(super) fn strips(
    range: Range<usize>,
    most: usize,
    tile: usize,
) -> impl Iterator<Item = Range<usize>> {
    let strips = range.len().div_ceil(most).max(1);
    let width = range.len().div_ceil(strips).next_multiple_of(tile);
    pieces(range, width)
}

/// 0..k in nearly equal blocks of at most `most`, an even number, that begin at even k; one empty block for k = 0, which still
/// writes C.
pub(super) fn depths(k: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let (blocks, pairs) = (k.div_ceil(most).max(1), k.div_ceil(2));
    (0..blocks).map(move |i| 2 * (pairs * i / blocks)..k.min(2 * (pairs * (i + 1) / blocks)))
}
