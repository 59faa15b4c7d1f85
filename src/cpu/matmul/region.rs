//! One thread's part of C: blocks that fit the caches, and which operands are packed.
//!
//! ```text
//! for a block of MC rows
//!   for a block of KC of k             chains resume from C, or from f32 scratch where C is narrow
//!     pack A where it must be          MC x KC, in the shared cache
//!     for a block of NC columns
//!       pack B                         KC x NC, stays in the second cache
//!       for a panel of A               14 x KC or less, stays in the first cache
//!         for a panel of B             the microkernel: a tile of C in registers
//! ```
//!
//! Tiles follow one another along the rows of C, so that its lines come as streams; the other order, a panel of B against all
//! panels of A, reads a line of C from each of many pages. With it, and packing panel by panel, 1024^3 ran at 0.77 of the
//! FMA peak of a Zen 3, now at 0.80 to 0.88 (the gemm crate beside it: 0.82 to 0.88). There blocks of 384 or 512 of k make
//! fewer passes over C and won nothing, nor did prefetching C. On a Xeon with two units a core both do: 0.92 of its peak at
//! 512^3, 0.84 to 0.86 at 1024^3 (PyTorch beside it 0.79). What is missing there: 5 % is the clock, 4 % packing B from the third cache, 3 %
//! copying A. Packing B while the first panel of A is multiplied took longer, not shorter: its lines then come by software
//! prefetch alone, of which a core has 16 under way at a time, and not as long streams.
//! On a Zen 5 (a second cache of 1 MiB) bf16 in pairs reaches 0.95 of its peak at 1024^3 and 0.91 at 2048^3: 3 to 4 % is
//! packing B, as much packing A where it is. Asking for the next strip of B beside the last tiles before it won 1 % at most,
//! asking for it 2 to 8 bands ahead while packing nothing.
//! f32 there: 0.97 at 512^3, 0.93 at 1024^3, 0.94 at 2048^3, 0.96 at 1024x768x768, and 0.90 to 0.91 at 512x768x3072 (m x k x n), where B
//! comes from far for 512 rows alone. Tried on that one: all of k in one block with strips of 96 to 256 columns, A where it lies
//! (0 to 0.6 %), and A packed where it is copied (0.8 % at 1024^3, nothing elsewhere).
//!
//! Packing pays when a packed element is used often. With few rows B is read in place, with few columns A is; with very
//! few rows the product is bound by reading B, which is streamed row by row (`stream`). The block sizes follow the second
//! cache (`blocks`). They change no bits, and scratch is for the largest.

#![allow(unsafe_code)]

use super::super::Accum;
use super::super::memory::with_scratch_f32;
use super::super::simd::{Isa, Kernel, Simd, TileKernel, dispatch};
use super::Product;
use super::blocks::*;
use super::microkernel::{Ahead, Columns, Rows, Sums, finish, keep, tile, widen_output};
use super::pack::{Block, Terms, copy_rows, pack_columns, pack_rows};
use super::stream::{stream, stream_columns};
use crate::dtype::{DType, Float};
use half::{bf16, f16};
use std::ops::Range;

/// The part of C that one thread computes.
pub(super) struct Region<'p> {
    product: &'p Product,
    batch: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    terms: Terms,
    /// [`scratch_f32`] of them.
    scratch: &'p mut [f32],
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
            let scratch = &mut scratch[layout.sums..layout.tile];
            match (p.b.dtype, self.terms) {
                (DType::F32, _) => self.stream::<S, f32, false>(s, scratch),
                (DType::F16, _) => self.stream::<S, f16, false>(s, scratch),
                (DType::Bf16, Terms::Ascending) => self.stream::<S, bf16, false>(s, scratch),
                (DType::Bf16, _) => self.stream::<S, bf16, true>(s, scratch),
                (DType::U32, _) => unreachable!("checked on entry"),
            }
            return;
        }
        let in_place = p.b.dtype == DType::F32 && p.b.col_stride == 1;
        let pack_b = !in_place || (m > FEW_ROWS && m * n * p.k > SMALL);
        let (deep, wide) = block_sizes();
        let deep = if self.terms.pairs().is_some() {
            // As many bytes.
            2 * deep
        } else if pack_b || m > FEW_ROWS || n * p.k <= SHALLOW_FROM {
            deep
        } else {
            SHALLOW
        };
        let left = Left::choose(p, self.terms, m, n);
        let (rows, cols) = if p.c.dtype != DType::F32 && p.k > deep {
            KEPT
        } else if left == Left::Packed {
            (MC, n)
        } else {
            (m, n)
        };
        // Equal pieces: a few rows left over would have all of B packed once more.
        for rows in strips(self.rows.clone(), rows, MR) {
            for cols in pieces(self.cols.clone(), cols) {
                let strip = Strip::<S, MR, V> {
                    s,
                    product: p,
                    terms: self.terms,
                    batch: self.batch,
                    rows: rows.clone(),
                    cols,
                    left,
                    pack_b,
                    deep,
                    wide,
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
        let terms = product.terms(isa);
        // Outside of `dispatch`: the closure of a function that does not inline is compiled without the token's features.
        with_scratch_f32(scratch_f32(m, n, product.k, product.c.dtype), |scratch| {
            for batch in batch {
                let region = Region {
                    product,
                    batch,
                    rows: rows.clone(),
                    cols: cols.clone(),
                    terms,
                    scratch,
                };
                dispatch(isa, region);
            }
        });
    }

    fn is_streamed(&self) -> bool {
        let b = &self.product.b;
        self.rows.len() <= STREAMED && (b.col_stride == 1 || b.row_stride == 1)
    }

    /// Few rows: sums of a strip of columns stay in the first cache, and B streams by once.
    #[inline(always)]
    fn stream<S: Simd, T: Float, const ODD_FIRST: bool>(&self, s: S, scratch: &mut [f32]) {
        let (p, m) = (self.product, self.rows.len());
        let most = STREAM_SUMS / m;
        let width = self.cols.len().min(most);
        let (sums, panel) = scratch.split_at_mut(m * width);
        let y = Sums {
            data: sums.as_mut_ptr(),
            row_stride: width,
        };
        for cols in pieces(self.cols.clone(), most) {
            let (at, shape) = ((self.batch, self.rows.start, cols.start), (m, cols.len()));
            match p.accum {
                Accum::Replace => sums.fill(0.0),
                // SAFETY: rows and columns of this region of C; the scratch holds m rows of `width`.
                Accum::Add => unsafe { widen_output(s, &p.c, at, shape, y) },
            }
            for depth in depths(p.k, KC) {
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
                // SAFETY: `panel` holds m rows of this depth, B these rows and columns, `sums` m rows of `width`.
                unsafe {
                    if p.b.col_stride != 1 {
                        let b = (b, p.b.col_stride);
                        match m {
                            1 => stream_columns::<S, T, 1, ODD_FIRST>(s, shape, a, b, y),
                            2 => stream_columns::<S, T, 2, ODD_FIRST>(s, shape, a, b, y),
                            3 => stream_columns::<S, T, 3, ODD_FIRST>(s, shape, a, b, y),
                            _ => stream_columns::<S, T, 4, ODD_FIRST>(s, shape, a, b, y),
                        }
                        continue;
                    }
                    let b = (b, p.b.row_stride);
                    match m {
                        1 => stream::<S, T, 1, 8, ODD_FIRST>(s, shape, a, b, y),
                        2 => stream::<S, T, 2, 4, ODD_FIRST>(s, shape, a, b, y),
                        3 => stream::<S, T, 3, 2, ODD_FIRST>(s, shape, a, b, y),
                        _ => stream::<S, T, 4, 2, ODD_FIRST>(s, shape, a, b, y),
                    }
                }
            }
            // SAFETY: as above; no other region has these elements of C.
            unsafe { finish((s, None), &p.c, at, shape, y) }
        }
    }
}

/// Rows and columns of C whose sums wait between blocks of k: in C itself, or in scratch.
struct Strip<'p, S, const MR: usize, const V: usize> {
    s: S,
    product: &'p Product,
    terms: Terms,
    batch: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    left: Left,
    pack_b: bool,
    /// k in a block.
    deep: usize,
    /// Columns in a strip of B.
    wide: usize,
}

/// How the microkernel gets at A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// As it lies.
    InPlace,
    /// Rows that lie along k are copied, one panel just before its use: widened, and away from strides that send all rows
    /// to the same few sets of the first cache.
    Copied,
    /// Packed for a whole block: rows lie far apart along k.
    Packed,
}

impl Left {
    fn choose(p: &Product, terms: Terms, m: usize, n: usize) -> Self {
        let big = m * n * p.k > SMALL;
        let aliased = (p.a.row_stride * p.a.dtype.size()).is_multiple_of(ALIAS);
        // Pairs are read in place only where all are whole and rows are a number of pairs apart.
        let ready = match terms {
            Terms::Pairs(_) => p.k.is_multiple_of(2) && p.a.row_stride.is_multiple_of(2),
            _ => p.a.dtype == DType::F32,
        };
        if p.a.col_stride == 1 && (n <= 2 * NC || !big) {
            if !ready || (aliased && n > FEW_COLS) {
                Left::Copied
            } else {
                Left::InPlace
            }
        } else if p.a.dtype != DType::F32 || (n > FEW_COLS && big) {
            Left::Packed
        } else {
            Left::InPlace
        }
    }
}

/// Lines of A that are asked for while the panel before them is multiplied: rows begin anew in memory every KC elements,
/// too often for the hardware to follow.
struct Wanted {
    at: *const u8,
    /// Row and line.
    next: (usize, usize),
    rows: usize,
    /// Cache lines of a row.
    lines: usize,
    /// Bytes from row to row.
    stride: usize,
    /// Lines to ask for at a time, all of one row.
    part: usize,
}

impl Wanted {
    /// What to ask for beside the next tile: where, and how many bytes.
    #[inline(always)]
    fn some(&mut self) -> (*const u8, usize) {
        if self.next.1 >= self.lines {
            self.next = (self.next.0 + 1, 0);
        }
        let at = self.next.0 * self.stride + self.next.1 * LINE;
        let lines = if self.next.0 < self.rows {
            self.part.min(self.lines - self.next.1)
        } else {
            0
        };
        self.next.1 += lines;
        (self.at.wrapping_add(at), lines * LINE)
    }
}

/// Pieces of scratch, as the microkernel takes them.
#[derive(Clone, Copy)]
struct Places {
    panel: *mut f32,
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
            panel: data,
            a: data.wrapping_add(layout.a),
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
                let block = Block {
                    data: p.a.at(self.batch, self.rows.start, depth.start),
                    dtype: p.a.dtype,
                    lines: self.rows.len(),
                    depth: depth.len(),
                    line_stride: p.a.row_stride,
                    depth_stride: p.a.col_stride,
                };
                // SAFETY: the block lies in A; the layout has room for MC rows, whole tiles, and the excess.
                unsafe { pack_rows::<S, MR>(self.s, self.terms, block, places.a) }
            }
            for cols in strips(self.cols.clone(), self.wide, TILE.1) {
                self.block(&depth, cols, places);
            }
        }
    }

    /// One block of columns, one of k.
    #[inline(always)]
    fn block(&self, depth: &Range<usize>, cols: Range<usize>, places: Places) {
        let (p, rows) = (self.product, &self.rows);
        // Read in place, only a ragged last panel is packed: vectors must not read beyond B.
        let ragged = cols.len() % Self::NR;
        let lines = if self.pack_b { cols.len() } else { ragged };
        let first = cols.end - lines;
        let block = Block {
            data: p.b.at(self.batch, depth.start, first),
            dtype: p.b.dtype,
            lines,
            depth: depth.len(),
            line_stride: p.b.col_stride,
            depth_stride: p.b.row_stride,
        };
        // SAFETY: the block lies in B; the layout has room for the block's columns, whole tiles, and the excess.
        unsafe { pack_columns::<S, V>(self.s, self.terms, block, places.b) }
        let packed = self.terms.packed(depth.len());
        let mut i = 0;
        while i < rows.len() {
            let height = self.height(rows.len() - i);
            let a = self.panel(depth, i, height, places);
            let tiles = cols.len().div_ceil(Self::NR);
            let mut wanted = self.wanted(depth, i + height, tiles);
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
                let ahead = wanted.some();
                let at = (rows.start + i, cols.start + j - self.cols.start);
                self.tile(depth, at, (height, width), (a, b), ahead, places);
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

    /// What the next panel, from row i on, will read, in as many parts as there are tiles before it.
    #[inline(always)]
    fn wanted(&self, depth: &Range<usize>, i: usize, tiles: usize) -> Wanted {
        let a = &self.product.a;
        let rows = if self.left == Left::Packed || a.col_stride != 1 {
            0
        } else {
            self.height(self.rows.len() - i)
        };
        let lines = (depth.len() * a.dtype.size()).div_ceil(LINE);
        // With few tiles the first rows only.
        let parts = (tiles / rows.max(1)).max(1);
        Wanted {
            at: a.at(self.batch, self.rows.start + i, depth.start),
            next: (0, 0),
            rows,
            lines,
            stride: a.row_stride * a.dtype.size(),
            part: lines.div_ceil(parts).next_multiple_of(2),
        }
    }

    /// Rows i.. of the strip for the microkernel.
    #[inline(always)]
    fn panel(&self, depth: &Range<usize>, i: usize, height: usize, places: Places) -> Rows {
        let a = &self.product.a;
        let data = a.at(self.batch, self.rows.start + i, depth.start);
        match self.left {
            Left::InPlace if self.terms.pairs().is_some() => Rows {
                data: data.cast(),
                row_stride: a.row_stride / 2,
                k_stride: 1,
            },
            Left::InPlace => Rows {
                data: data.cast(),
                row_stride: a.row_stride,
                k_stride: a.col_stride,
            },
            Left::Copied => {
                let block = Block {
                    data,
                    dtype: a.dtype,
                    lines: height,
                    depth: depth.len(),
                    line_stride: a.row_stride,
                    depth_stride: 1,
                };
                // SAFETY: the block lies in A; the layout has room for the tallest panel.
                unsafe { copy_rows(self.s, self.terms, block, COPIED, places.panel) }
                Rows {
                    data: places.panel,
                    row_stride: COPIED,
                    k_stride: 1,
                }
            }
            Left::Packed => Rows {
                data: places.a.wrapping_add(i * self.terms.packed(depth.len())),
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
        (wanted, bytes): (*const u8, usize),
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
        let ahead = Ahead {
            at: wanted,
            bytes,
            rows,
            row_stride,
        };
        let pairs = self.terms.pairs();
        // SAFETY: a and b are packed panels or lie in A and B; C's whole tiles, kept sums and the scratch tile hold
        // shape.0 rows of NR columns. Where from and to are one place, all is read before it is written.
        unsafe {
            let k = self.terms.packed(depth.len());
            if shape.1 <= S::LANES && pairs.is_none() {
                tile::<S, MR, 1>((s, pairs), shape.0, k, (a, b), (from, to), ahead)
            } else {
                tile::<S, MR, V>((s, pairs), shape.0, k, (a, b), (from, to), ahead)
            }
        }
        if last && !(whole && p.c.is_plain()) {
            // SAFETY: the tile lies in this region of C, which no other region shares.
            unsafe { finish((s, p.narrowed_by(pairs)), &p.c, at, shape, to) }
        } else if !last && in_c && !whole {
            // SAFETY: as above.
            unsafe { keep(s, &p.c, at, shape, to) }
        }
    }
}
