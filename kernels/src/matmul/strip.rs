//! Rows and columns of C, tile by tile: what is packed when, and where sums wait between blocks of k.

// Tiles are read and written by address: the microkernel's operands lie in A, B, C or scratch.
#![allow(unsafe_code)]

use super::super::Accum;
use super::super::simd::{Ask, Asks, Simd};
use super::Product;
use super::blocks::*;
use super::microkernel::{Columns, Rows, Sums, To, finish, keep, tile, widen_output};
use super::pack::{Block, Terms, copy_rows, pack_columns, pack_rows};
use super::wanted::Wanted;
use crate::dtype::DType;
use std::ops::Range;

/// Rows and columns of C whose sums wait between blocks of k: in C itself, or in scratch.
pub(super) struct Strip<'p, S, const MR: usize, const V: usize> {
    pub s: S,
    pub product: &'p Product,
    pub terms: Terms,
    pub batch: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    pub left: Left,
    pub pack_b: bool,
    /// k in a block.
    pub deep: usize,
    /// Columns in a strip of B.
    pub wide: usize,
}

/// How the microkernel gets at A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// As it lies.
    InPlace,
    /// Rows that lie along k are copied, each panel just before its first use, for a whole block: widened, and away from strides
    /// that send all rows to the same few sets of the first cache.
    Copied,
    /// Packed for a whole block: rows lie far apart along k.
    Packed,
}

impl Left {
    pub(super) fn choose(p: &Product, terms: Terms, m: usize, n: usize) -> Self {
        let aliased = (p.a.row_stride * p.a.dtype.size()).is_multiple_of(ALIAS);
        // Pairs are read in place only where all are whole and rows are a number of pairs apart.
        let ready = match terms {
            Terms::Pairs(_) => p.k.is_multiple_of(2) && p.a.row_stride.is_multiple_of(2),
            _ => p.a.dtype == DType::F32,
        };
        if p.a.col_stride == 1 {
            if !ready || (aliased && n > FEW_COLS) {
                Left::Copied
            } else {
                Left::InPlace
            }
        } else if p.a.dtype != DType::F32 || (n > FEW_COLS && m * n * p.k > SMALL) {
            Left::Packed
        } else {
            Left::InPlace
        }
    }
}

/// Columns of a strip in a block of k.
struct Part {
    depth: Range<usize>,
    cols: Range<usize>,
}

/// Pieces of scratch, as the microkernel takes them.
#[derive(Clone, Copy)]
struct Places {
    a: *mut f32,
    b: *mut f32,
    sums: Sums,
    tile: Sums,
}

impl<S: Simd, const MR: usize, const V: usize> Strip<'_, S, MR, V> {
    const NR: usize = V * S::LANES;

    #[inline(always)]
    pub(super) fn run(&self, scratch: &mut [f32], layout: &Layout) {
        let p = self.product;
        assert!(scratch.len() >= layout.end && MR <= TILE.0 && Self::NR <= TILE.1);
        let data = scratch.as_mut_ptr();
        let places = Places {
            a: data,
            b: data.wrapping_add(layout.b),
            sums: Sums {
                data: data.wrapping_add(layout.sums),
                row_stride: self.cols.len().next_multiple_of(TILE.1),
            },
            tile: Sums {
                data: data.wrapping_add(layout.tile),
                row_stride: Self::NR,
            },
        };
        for depth in depths(p.k, self.deep) {
            if self.left == Left::Packed {
                let block = self.left_block(&depth, 0, self.rows.len());
                // SAFETY: the block lies in A; the layout has room for MC rows, whole tiles, and the excess.
                unsafe { pack_rows::<S, MR>(self.s, self.terms, block, places.a) }
            }
            for cols in strips(self.cols.clone(), self.wide, TILE.1) {
                let depth = depth.clone();
                self.part(&Part { depth, cols }, places);
            }
        }
    }

    /// About what follows, to ask for its columns: blocks and strips have nearly equal sizes.
    fn after(&self, part: &Part) -> Option<Part> {
        let following = |x: &Range<usize>, end: usize| x.end..end.min(x.end + x.len());
        if part.cols.end < self.cols.end {
            let (depth, cols) = (part.depth.clone(), following(&part.cols, self.cols.end));
            Some(Part { depth, cols })
        } else if part.depth.end < self.product.k {
            let depth = following(&part.depth, self.product.k);
            let cols = self.cols.start..self.cols.end.min(self.cols.start + self.wide);
            Some(Part { depth, cols })
        } else {
            None
        }
    }

    /// Whether it is the first to need its block of A.
    fn is_first(&self, part: &Part) -> bool {
        part.cols.start == self.cols.start
    }

    /// Rows i.. of the strip's A in a block of k.
    fn left_block(&self, depth: &Range<usize>, i: usize, lines: usize) -> Block {
        let a = &self.product.a;
        Block {
            data: a.at(self.batch, self.rows.start + i, depth.start),
            dtype: a.dtype,
            lines,
            depth: depth.len(),
            line_stride: a.row_stride,
            depth_stride: a.col_stride,
        }
    }

    /// Columns of B in a block of k.
    fn right_block(&self, depth: &Range<usize>, cols: Range<usize>) -> Block {
        let b = &self.product.b;
        Block {
            data: b.at(self.batch, depth.start, cols.start),
            dtype: b.dtype,
            lines: cols.len(),
            depth: depth.len(),
            line_stride: b.col_stride,
            depth_stride: b.row_stride,
        }
    }

    /// One block of k, one strip of columns.
    #[inline(always)]
    fn part(&self, part: &Part, places: Places) {
        let (p, rows, Part { depth, cols }) = (self.product, &self.rows, part);
        // Read in place, only a ragged last panel is packed: vectors must not read beyond B.
        let ragged = cols.len() % Self::NR;
        let lines = if self.pack_b { cols.len() } else { ragged };
        let block = self.right_block(depth, cols.end - lines..cols.end);
        // SAFETY: the block lies in B; the layout has room for the block's columns, whole tiles, and the excess.
        unsafe { pack_columns::<S, V>(self.s, self.terms, block, places.b) }
        let packed = self.terms.packed(depth.len());
        let tiles = cols.len().div_ceil(Self::NR);
        let mut right = Wanted::NOTHING;
        if self.pack_b
            && let Some(next) = self.after(part)
        {
            let block = self.right_block(&next.depth, next.cols);
            right = Wanted::piece_by_piece(block, tiles * rows.len().div_ceil(MR));
        }
        let mut i = 0;
        while i < rows.len() {
            let height = self.height(rows.len() - i);
            let a = self.panel(part, i, height, places);
            let mut left = self.wanted(part, i + height, places);
            for j in (0..cols.len()).step_by(Self::NR) {
                let width = Self::NR.min(cols.len() - j);
                let b = if self.pack_b {
                    Columns {
                        data: places.b.wrapping_add(j * packed),
                        k_stride: Self::NR,
                    }
                } else if width < Self::NR {
                    Columns {
                        data: places.b,
                        k_stride: Self::NR,
                    }
                } else {
                    Columns {
                        data: p.b.at(self.batch, depth.start, cols.start + j).cast(),
                        k_stride: p.b.row_stride,
                    }
                };
                let mut asks = [Ask::NOTHING; 4];
                // The loop stops at the first of no turns.
                asks[1] = left.part();
                asks[1 + usize::from(asks[1].turns > 0)] = right.part();
                let at = (rows.start + i, cols.start + j - self.cols.start);
                self.tile(depth, at, (height, width), (a, b), &mut asks, places);
            }
            i += height;
        }
    }

    /// Rows of the next panel, of `left` ones. A low last panel would wait for its own sums, so the last two share.
    #[inline(always)]
    fn height(&self, left: usize) -> usize {
        if left > MR && left < MR + LOW && self.left != Left::Packed {
            left.div_ceil(2)
        } else {
            left.min(MR)
        }
    }

    /// What the next panel, from row i on, will read; with few tiles before it, of its first rows.
    #[inline(always)]
    fn wanted(&self, part: &Part, i: usize, places: Places) -> Wanted {
        // Packed panels follow one another.
        if self.left == Left::Packed || self.product.a.col_stride != 1 {
            return Wanted::NOTHING;
        }
        let mut block = self.left_block(&part.depth, i, self.height(self.rows.len() - i));
        if self.left == Left::Copied && !self.is_first(part) {
            block = Block {
                data: self.copied(part, i, places).cast(),
                dtype: DType::F32,
                depth: self.terms.packed(part.depth.len()),
                line_stride: self.pitch(part),
                ..block
            };
        }
        Wanted::line_by_line(block)
    }

    /// Where the copy of a panel lies: what is used once takes one place, in the first cache.
    fn copied(&self, part: &Part, i: usize, places: Places) -> *mut f32 {
        let again = part.cols != self.cols;
        let i = if again { i } else { 0 };
        places.a.wrapping_add(i * self.pitch(part))
    }

    fn pitch(&self, part: &Part) -> usize {
        pitch(self.terms.packed(part.depth.len()))
    }

    /// Rows i.. of the strip for the microkernel.
    #[inline(always)]
    fn panel(&self, part: &Part, i: usize, height: usize, places: Places) -> Rows {
        let (a, block) = (&self.product.a, self.left_block(&part.depth, i, height));
        match self.left {
            Left::InPlace if self.terms.pairs().is_some() => Rows {
                data: block.data.cast(),
                row_stride: a.row_stride / 2,
                k_stride: 1,
            },
            Left::InPlace => Rows {
                data: block.data.cast(),
                row_stride: a.row_stride,
                k_stride: a.col_stride,
            },
            Left::Copied => {
                let (data, row_stride) = (self.copied(part, i, places), self.pitch(part));
                if self.is_first(part) {
                    // SAFETY: the block lies in A; the layout has room for MC rows.
                    unsafe { copy_rows(self.s, self.terms, block, row_stride, data) }
                }
                Rows {
                    data,
                    row_stride,
                    k_stride: 1,
                }
            }
            Left::Packed => Rows {
                data: places
                    .a
                    .wrapping_add(i * self.terms.packed(part.depth.len())),
                row_stride: 1,
                k_stride: MR,
            },
        }
    }

    /// One tile: from where its sums wait, through the microkernel, to where they go. `j` counts from the strip's start.
    #[inline(always)]
    fn tile(
        &self,
        depth: &Range<usize>,
        (i, j): (usize, usize),
        shape: (usize, usize),
        (a, b): (Rows, Columns),
        asks: &mut Asks,
        places: Places,
    ) {
        let (s, p) = (self.s, self.product);
        let at = (self.batch, i, self.cols.start + j);
        let (first, last) = (depth.start == 0, depth.end == p.k);
        let in_c = p.c.dtype == DType::F32;
        let whole = shape.1 == Self::NR;
        // The tile's place in C, for sums that wait there or end there as they are.
        let c = Sums {
            data: p.c.at(at).cast(),
            row_stride: p.c.row_stride,
        };
        let kept = Sums {
            data: places
                .sums
                .data
                .wrapping_add((i - self.rows.start) * places.sums.row_stride + j),
            ..places.sums
        };
        let begins = !first || p.accum == Accum::Add;
        let from = match (begins, in_c, first) {
            (false, ..) => None,
            (true, true, _) if whole => Some(c),
            (true, false, false) => Some(kept),
            // SAFETY: the tile lies in this region of C, `places.tile` holds the largest tile.
            _ => unsafe {
                widen_output(s, &p.c, at, shape, places.tile);
                Some(places.tile)
            },
        };
        let to = match (last, in_c) {
            (false, false) => kept,
            (false, true) if whole => c,
            (true, true) if whole && p.c.is_plain() => c,
            _ => places.tile,
        };
        // Sums that stay where they are, or narrowed at once: the next tile's place, or this one's.
        let (rows, row_stride): (*const u8, _) = if last && to.data != c.data {
            (p.c.at(at), p.c.row_stride * p.c.dtype.size())
        } else {
            (to.data.wrapping_add(Self::NR).cast(), 4 * to.row_stride)
        };
        asks[0] = Ask {
            at: rows,
            step: row_stride,
            turns: shape.0,
        };
        let pairs = self.terms.pairs();
        let unit = p.narrowed_by(pairs);
        let narrow = last && whole && unit.is_some();
        let sums = To {
            data: if narrow { p.c.at(at) } else { to.data.cast() },
            row_bytes: if narrow {
                2 * p.c.row_stride
            } else {
                4 * to.row_stride
            },
            narrow,
        };
        // SAFETY: a and b are packed panels or lie in A and B; C's whole tiles, kept sums and the scratch tile hold
        // shape.0 rows of NR columns. Where from and to are one place, all is read before it is written.
        unsafe {
            let k = self.terms.packed(depth.len());
            if shape.1 <= S::LANES && pairs.is_none() {
                tile::<S, MR, 1>((s, pairs), shape.0, k, (a, b), (from, sums), asks)
            } else {
                tile::<S, MR, V>((s, pairs), shape.0, k, (a, b), (from, sums), asks)
            }
        }
        if last && !narrow && !(whole && p.c.is_plain()) {
            // SAFETY: the tile lies in this region of C, which no other region shares.
            unsafe { finish((s, unit), &p.c, at, shape, to) }
        } else if !last && in_c && !whole {
            // SAFETY: as above.
            unsafe { keep(s, &p.c, at, shape, to) }
        }
    }
}
