//! One thread's part of C: blocks that fit the caches, and which operands are packed.
//!
//! ```text
//! for a strip of NC columns            its B, KC x NC, stays in the shared cache
//!   for a block of KC of k             chains resume from C, or from f32 scratch where C is narrow
//!     pack B
//!     for a block of MC rows           its A, MC x KC, stays in the second cache
//!       pack A
//!       for a panel of B               KC x 32 or less, stays in the first cache
//!         for a panel of A             the microkernel: a tile of C in registers
//! ```
//!
//! Packing pays when a packed element is used often. With few rows B is read in place, with few columns A is; with very
//! few rows the product is bound by reading B, which is streamed row by row (`stream`). The block sizes suit 32 KiB,
//! 512 KiB and a few MiB of cache. They change no bits, and are the same on all instruction sets, so that scratch is.

#![allow(unsafe_code)]

use super::super::Accum;
use super::super::memory::with_scratch_f32;
use super::super::simd::{Isa, Kernel, Simd, TileKernel, dispatch};
use super::Product;
use super::microkernel::{Columns, Rows, Sums, finish, keep, stream, tile, widen_output};
use super::pack::{Block, pack};
use crate::dtype::{DType, Float};
use half::{bf16, f16};
use std::ops::Range;

/// k in a block.
const KC: usize = 256;
/// Rows in a block: whole tiles of 4, 6, 12 and 14.
const MC: usize = 252;
/// Columns in a strip.
const NC: usize = 2048;
/// Rows and columns whose sums are kept in scratch where C is narrow and k takes several blocks.
const KEPT: (usize, usize) = (504, 512);
/// The largest tile of any instruction set.
const TILE: (usize, usize) = (14, 32);
/// Vectors may be stored beyond the end of a packed block.
const EXCESS: usize = 16;
/// With so few rows in a region, B is not packed.
const FEW_ROWS: usize = 24;
/// With so few columns in a region, A is not packed.
const FEW_COLS: usize = 64;
/// Up to this many multiply-adds neither is.
const SMALL: usize = 96 * 96 * 96;
/// Up to so many rows B is streamed.
const STREAMED: usize = 4;
/// Columns whose sums stay in the first cache while B streams by.
const STREAM_COLS: usize = 1024;

/// The part of C that one thread computes.
pub(super) struct Region<'p> {
    product: &'p Product,
    batch: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    /// [`scratch_f32`] of them.
    scratch: &'p mut [f32],
}

/// Where the pieces of one thread's scratch begin, in f32.
struct Layout {
    b: usize,
    sums: usize,
    tile: usize,
    end: usize,
}

impl Layout {
    fn new(m: usize, n: usize, k: usize, c: DType) -> Self {
        let depth = k.min(KC);
        // Whole tiles of any height.
        let rows = m.min(MC) + TILE.0 - 1;
        let cols = n.min(NC).next_multiple_of(TILE.1);
        let b = (rows * depth + EXCESS).next_multiple_of(16);
        let sums = (b + cols * depth + EXCESS).next_multiple_of(16);
        let kept = if keeps_sums(k, c) {
            m.min(KEPT.0) * n.min(KEPT.1).next_multiple_of(TILE.1)
        } else {
            0
        };
        let streamed = if m <= STREAMED {
            m * n.min(STREAM_COLS) + m * depth
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

/// Whether sums wait in f32 scratch between blocks of k.
fn keeps_sums(k: usize, c: DType) -> bool {
    c != DType::F32 && k > KC
}

/// f32 of scratch for a region of a product m x n x k.
pub(super) fn scratch_f32(m: usize, n: usize, k: usize, c: DType) -> usize {
    Layout::new(m, n, k, c).end
}

/// `range` in pieces of at most `step`.
fn pieces(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(step)
        .map(move |start| start..end.min(start + step))
}

/// 0..k in nearly equal blocks of at most KC; one empty block for k = 0, which still writes C.
fn depths(k: usize) -> impl Iterator<Item = Range<usize>> {
    let blocks = k.div_ceil(KC).max(1);
    (0..blocks).map(move |i| k * i / blocks..k * (i + 1) / blocks)
}

impl Kernel for Region<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        s.tiled(self);
    }
}

impl TileKernel for Region<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd, const MR: usize, const V: usize>(mut self, s: S) {
        let (m, n, p) = (self.rows.len(), self.cols.len(), self.product);
        let layout = Layout::new(m, n, p.k, p.c.dtype);
        if self.is_streamed() {
            let scratch = std::mem::take(&mut self.scratch);
            self.stream(s, &mut scratch[layout.sums..layout.tile]);
            return;
        }
        let (rows, cols) = if keeps_sums(p.k, p.c.dtype) {
            KEPT
        } else {
            (m, NC)
        };
        for rows in pieces(self.rows.clone(), rows) {
            for cols in pieces(self.cols.clone(), cols) {
                let strip = Strip::<S, MR, V> {
                    s,
                    product: p,
                    batch: self.batch,
                    rows: rows.clone(),
                    cols,
                    pack_a: p.a.dtype != DType::F32 || (n > FEW_COLS && m * n * p.k > SMALL),
                    pack_b: p.b.dtype != DType::F32
                        || p.b.col_stride != 1
                        || (m > FEW_ROWS && m * n * p.k > SMALL),
                };
                strip.run(self.scratch, &layout);
            }
        }
    }
}

impl Region<'_> {
    /// Computes each matrix of the batch in turn.
    pub(super) fn run(
        product: &Product,
        isa: Isa,
        (batch, rows, cols): (Range<usize>, Range<usize>, Range<usize>),
    ) {
        let (m, n) = (rows.len(), cols.len());
        if m == 0 || n == 0 {
            return;
        }
        // Outside of `dispatch`: the closure of a function that does not inline is compiled without the token's features.
        with_scratch_f32(scratch_f32(m, n, product.k, product.c.dtype), |scratch| {
            for batch in batch {
                let region = Region {
                    product,
                    batch,
                    rows: rows.clone(),
                    cols: cols.clone(),
                    scratch,
                };
                dispatch(isa, region);
            }
        });
    }

    fn is_streamed(&self) -> bool {
        self.rows.len() <= STREAMED && self.product.b.col_stride == 1
    }

    /// Few rows: sums of a strip of columns stay in the first cache, and B streams by once.
    #[inline(always)]
    fn stream<S: Simd>(&self, s: S, scratch: &mut [f32]) {
        match self.product.b.dtype {
            DType::F32 => self.stream_typed::<S, f32>(s, scratch),
            DType::Bf16 => self.stream_typed::<S, bf16>(s, scratch),
            DType::F16 => self.stream_typed::<S, f16>(s, scratch),
            DType::U32 => unreachable!("checked on entry"),
        }
    }

    #[inline(always)]
    fn stream_typed<S: Simd, T: Float>(&self, s: S, scratch: &mut [f32]) {
        let (p, m) = (self.product, self.rows.len());
        let width = self.cols.len().min(STREAM_COLS);
        let (sums, panel) = scratch.split_at_mut(m * width);
        let y = Sums {
            data: sums.as_mut_ptr(),
            row_stride: width,
        };
        for cols in pieces(self.cols.clone(), STREAM_COLS) {
            let (at, shape) = ((self.batch, self.rows.start, cols.start), (m, cols.len()));
            match p.accum {
                Accum::Replace => sums.fill(0.0),
                // SAFETY: rows and columns of this region of C; the scratch holds m rows of `width`.
                Accum::Add => unsafe { widen_output(s, &p.c, at, shape, y) },
            }
            for depth in depths(p.k) {
                for (i, line) in panel.chunks_mut(depth.len().max(1)).enumerate().take(m) {
                    for (x, q) in line.iter_mut().zip(depth.clone()) {
                        let a = p.a.at(self.batch, self.rows.start + i, q);
                        // SAFETY: row i and k = q lie in A, whose type this is.
                        *x = unsafe {
                            match p.a.dtype {
                                DType::F32 => *a.cast::<f32>(),
                                DType::Bf16 => (*a.cast::<bf16>()).to_f32(),
                                DType::F16 => (*a.cast::<f16>()).to_f32(),
                                DType::U32 => unreachable!("checked on entry"),
                            }
                        };
                    }
                }
                let shape = (depth.len(), cols.len());
                let a = Rows {
                    data: panel.as_ptr(),
                    row_stride: depth.len(),
                    k_stride: 1,
                };
                let b = p.b.at(self.batch, depth.start, cols.start).cast::<T>();
                let b = (b, p.b.row_stride);
                // SAFETY: `panel` holds m rows of this depth, B these rows and columns, `sums` m rows of `width`.
                unsafe {
                    match m {
                        1 => stream::<S, T, 1, 8>(s, shape, a, b, y),
                        2 => stream::<S, T, 2, 4>(s, shape, a, b, y),
                        3 => stream::<S, T, 3, 2>(s, shape, a, b, y),
                        _ => stream::<S, T, 4, 2>(s, shape, a, b, y),
                    }
                }
            }
            // SAFETY: as above; no other region has these elements of C.
            unsafe { finish(s, &p.c, at, shape, y) }
        }
    }
}

/// Rows and columns of C whose sums wait between blocks of k: in C itself, or in scratch.
struct Strip<'p, S, const MR: usize, const V: usize> {
    s: S,
    product: &'p Product,
    batch: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    pack_a: bool,
    pack_b: bool,
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
    fn run(&self, scratch: &mut [f32], layout: &Layout) {
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
        for depth in depths(p.k) {
            // Read in place, only a ragged last panel is packed: vectors must not read beyond B.
            let ragged = self.cols.len() % Self::NR;
            let packed = if self.pack_b { self.cols.len() } else { ragged };
            let first = self.cols.end - packed;
            let block = Block {
                data: p.b.at(self.batch, depth.start, first),
                dtype: p.b.dtype,
                lines: packed,
                depth: depth.len(),
                line_stride: p.b.col_stride,
                depth_stride: p.b.row_stride,
            };
            // SAFETY: the block lies in B; the layout has room for the strip's columns, whole tiles, and the excess.
            unsafe { pack(self.s, block, Self::NR, places.b) }
            for rows in pieces(self.rows.clone(), MC) {
                self.rows(&depth, rows, places);
            }
        }
    }

    /// One block of rows, one of k.
    #[inline(always)]
    fn rows(&self, depth: &Range<usize>, rows: Range<usize>, places: Places) {
        let p = self.product;
        if self.pack_a {
            let block = Block {
                data: p.a.at(self.batch, rows.start, depth.start),
                dtype: p.a.dtype,
                lines: rows.len(),
                depth: depth.len(),
                line_stride: p.a.row_stride,
                depth_stride: p.a.col_stride,
            };
            // SAFETY: the block lies in A; the layout has room for MC rows, whole tiles, and the excess.
            unsafe { pack(self.s, block, MR, places.a) }
        }
        for j in (0..self.cols.len()).step_by(Self::NR) {
            let cols = Self::NR.min(self.cols.len() - j);
            let b = if self.pack_b {
                Columns {
                    data: places.b.wrapping_add(j * depth.len()),
                    k_stride: Self::NR,
                }
            } else if cols < Self::NR {
                Columns {
                    data: places.b,
                    k_stride: Self::NR,
                }
            } else {
                Columns {
                    data: p.b.at(self.batch, depth.start, self.cols.start + j).cast(),
                    k_stride: p.b.row_stride,
                }
            };
            for i in (0..rows.len()).step_by(MR) {
                let a = if self.pack_a {
                    Rows {
                        data: places.a.wrapping_add(i * depth.len()),
                        row_stride: 1,
                        k_stride: MR,
                    }
                } else {
                    Rows {
                        data: p.a.at(self.batch, rows.start + i, depth.start).cast(),
                        row_stride: p.a.row_stride,
                        k_stride: p.a.col_stride,
                    }
                };
                let shape = (MR.min(rows.len() - i), cols);
                // The next tile's sums, which its chains cannot begin without.
                for r in i + MR..i + 2 * MR {
                    let next = p.c.at((self.batch, rows.start + r, self.cols.start + j));
                    self.s.prefetch(next);
                    self.s
                        .prefetch(next.wrapping_add((Self::NR - 1) * p.c.dtype.size()));
                }
                self.tile(depth, (rows.start + i, j), shape, a, b, places);
            }
        }
    }

    /// One tile: from where its sums wait, through the microkernel, to where they go. `j` counts from the strip's start.
    #[inline(always)]
    fn tile(
        &self,
        depth: &Range<usize>,
        (i, j): (usize, usize),
        shape: (usize, usize),
        a: Rows,
        b: Columns,
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
        // SAFETY: a and b are packed panels or lie in A and B; C's whole tiles, kept sums and the scratch tile hold
        // shape.0 rows of NR columns. Where from and to are one place, all is read before it is written.
        unsafe { tile::<S, MR, V>(s, shape.0, depth.len(), a, b, from, to) }
        if last && !(whole && p.c.is_plain()) {
            // SAFETY: the tile lies in this region of C, which no other region shares.
            unsafe { finish(s, &p.c, at, shape, to) }
        } else if !last && in_c && !whole {
            // SAFETY: as above.
            unsafe { keep(s, &p.c, at, shape, to) }
        }
    }
}
