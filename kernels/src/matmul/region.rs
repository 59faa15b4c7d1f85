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
//! On a Zen 5 (a second cache of 1 MiB) f32 reached 0.97 at 512^3, 0.92 to 0.95 at 1024^3 and 0.88 to 0.92 at 512x768x3072
//! (m x k x n), where B comes from far for 512 rows alone: packing B took 2 to 5 % and waiting for A's copy, made anew for each
//! strip, 3 %. With B asked for while the strip before it is multiplied (`wanted`) and A copied once for all strips 1024^3 has
//! 0.95, 2048^3 0.94, 512x3072x768 0.93 and 512x768x3072 0.94. Tried before that, 1 % at most: all of k in one block, A where it
//! lies, A packed, asking for the next strip beside the last tiles only, a farther prefetch while packing. What is left: packing
//! from the second cache (1.5 %), a tile's beginning and end (1 to 2 %; 4 % where k has four blocks and C comes from memory).
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
use super::microkernel::{Rows, Sums, finish, widen_output};
use super::pack::Terms;
use super::stream::{stream, stream_columns};
use super::strip::{Left, Strip};
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
        } else if left == Left::InPlace {
            (m, n)
        } else {
            (MC, n)
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
        for cols in pieces(self.cols.clone(), most) {
            let (at, shape) = ((self.batch, self.rows.start, cols.start), (m, cols.len()));
            if p.accum == Accum::Replace {
                sums.fill(0.0);
            }
            // Taken after the slice's own last use, which would end what a pointer from before may do.
            let y = Sums {
                data: sums.as_mut_ptr(),
                row_stride: width,
            };
            if p.accum == Accum::Add {
                // SAFETY: rows and columns of this region of C; the scratch holds m rows of `width`.
                unsafe { widen_output(s, &p.c, at, shape, y) }
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
                    if const { S::ROW_BY_ROW } {
                        for i in 0..m {
                            let a = Rows {
                                data: a.data.add(i * a.row_stride),
                                ..a
                            };
                            let y = Sums {
                                data: y.data.add(i * y.row_stride),
                                ..y
                            };
                            if p.b.col_stride != 1 {
                                let b = (b, p.b.col_stride);
                                stream_columns::<S, T, 1, ODD_FIRST>(s, shape, a, b, y);
                            } else {
                                let b = (b, p.b.row_stride);
                                stream::<S, T, 1, 2, ODD_FIRST>(s, shape, a, b, y);
                            }
                        }
                        continue;
                    }
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
