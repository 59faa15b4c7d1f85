//! Products of bf16 by bf16 on the matrix unit (AMX), whose order of sums is its own: see `simd::amx`.
//!
//! ```text
//! for a strip of NC columns
//!   for a block of KS of k             nearly always all of it
//!     pack B                           KS x NC, stays in the second cache
//!     for a panel of 32 rows           its sums wait in scratch: 32 x NC f32
//!       for a block of KC of k
//!         pack the panel               32 x KC, stays in the first cache
//!         for a panel of B             32 x 32 sums in tiles
//!       bias, activation, narrowing    the sums go to C
//! ```
//!
//! Up to four rows are summed by vectors in the same order (`unit_stream`): an element's sum must not depend on how many rows
//! there are. For all others packing is what such a
//! product waits for: 1024^3 is 0.6 ms of the unit's time, and reading and writing A, B and C once is as much again. So each
//! is touched once where k allows: B fits the second cache over all of k, and sums seldom wait in memory. At 1024^3 on a Xeon
//! two thirds of the time are in the tiles, which take 32 bytes a cycle of B from the second cache, about what it gives; the
//! rest is packing and narrowing. Asking for C's lines ahead and narrowing by the CPU's instruction made two threads a
//! third faster; asking for A's too cost more than it gave, as did larger strips (1.5 MiB) and longer ones (k of 2048: 0.85).

#![allow(unsafe_code)]

use super::super::Accum;
use super::super::memory::with_scratch;
use super::super::simd::Simd;
use super::super::simd::amx::{Amx, BLOCK, DEPTH, Lines, SIDE, Tiles, pack_left, pack_right};
use super::microkernel::{Sums, finish, widen_output};
use super::unit_stream::{is_streamed, stream};
use super::{Operand, Product};
use half::bf16;
use std::ops::Range;

/// k in a packed panel of A: 32 KiB.
const KC: usize = 512;
/// k whose sums are made in one go; beyond, they wait in scratch.
const KS: usize = 1024;
/// The same for a single panel of rows, whose waiting sums are few: wider strips read B in longer pieces.
const KS_FEW: usize = 512;
/// Rows whose sums wait, or that are packed in one go.
const MC: usize = 512;
/// Elements of packed B: 1 MiB.
const PACKED: usize = 1 << 19;
/// Columns of a strip at most.
const NC: usize = 1024;

/// Where the pieces of one thread's scratch begin, in bytes, and the blocks they are for.
struct Layout {
    /// Columns of a strip.
    cols: usize,
    /// k of a strip.
    depth: usize,
    b: usize,
    sums: usize,
    end: usize,
}

impl Layout {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let depth = if m <= SIDE { KS_FEW } else { KS };
        let deep = k.min(depth).next_multiple_of(DEPTH).max(DEPTH);
        let most = (PACKED / deep / SIDE * SIDE).clamp(SIDE, NC);
        let cols = n.next_multiple_of(SIDE).min(most);
        let rows = m.next_multiple_of(SIDE).min(MC);
        let b = rows * deep * size_of::<bf16>();
        let sums = b + deep * cols * size_of::<bf16>();
        let waiting = if k <= depth { SIDE } else { rows };
        let end = sums + waiting * cols * size_of::<f32>();
        Layout {
            cols,
            depth,
            b,
            sums,
            end,
        }
    }
}

/// Bytes of scratch for a region of a product m x n x k, at most.
pub(super) fn scratch(m: usize, n: usize, k: usize) -> usize {
    let few = Layout::new(m.min(SIDE), n, k).end;
    Layout::new(m, n, k).end.max(few)
}

/// `range` in pieces of at most `step`; an empty range is one empty piece.
fn pieces(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let count = range.len().div_ceil(step).max(1);
    (0..count).map(move |i| {
        let start = range.start + i * step;
        start..range.end.min(start + step)
    })
}

/// Computes a region of each matrix of the batch in turn.
pub(super) fn run(
    product: &Product,
    unit: Amx,
    (batch, rows, cols): (Range<usize>, Range<usize>, Range<usize>),
) {
    let (m, n) = (rows.len(), cols.len());
    if m == 0 || n == 0 {
        return;
    }
    if is_streamed(product, m) {
        return stream(product, unit, batch, rows, cols);
    }
    let layout = Layout::new(m, n, product.k);
    with_scratch(layout.end, |scratch| {
        let data = scratch.as_mut_ptr();
        unit.with_tiles(|tiles| {
            let strip = Strip {
                product,
                unit,
                tiles,
                depth: layout.depth,
                a: data.cast(),
                b: data.wrapping_add(layout.b).cast(),
                sums: Sums {
                    data: data.wrapping_add(layout.sums).cast(),
                    row_stride: layout.cols,
                },
            };
            // Sums that wait need a place for each row.
            let step = if product.k <= layout.depth { m } else { MC };
            for batch in batch {
                for cols in pieces(cols.clone(), layout.cols) {
                    for rows in pieces(rows.clone(), step) {
                        // SAFETY: the region lies in the product, and no other thread has it; the scratch holds
                        // `layout.cols` columns and as many rows as wait at a time.
                        unsafe { strip.run(batch, rows, cols.clone()) }
                    }
                }
            }
        });
    });
}

/// One thread's scratch, and what it computes with.
struct Strip<'p> {
    product: &'p Product,
    unit: Amx,
    tiles: Tiles,
    /// k of a strip.
    depth: usize,
    a: *mut bf16,
    b: *mut bf16,
    sums: Sums,
}

impl Strip<'_> {
    /// # Safety
    /// Rows and columns lie in C and belong to nobody else; the scratch holds the columns, and all rows if sums wait.
    unsafe fn run(&self, batch: usize, rows: Range<usize>, cols: Range<usize>) {
        let p = self.product;
        for depth in pieces(0..p.k, self.depth) {
            let b = lines(&p.b, batch, (depth.start, cols.start), true);
            // SAFETY: columns and k lie in B; the scratch holds whole panels of both.
            unsafe {
                let (lines, depth) = (cols.len(), depth.len());
                pack_right(self.unit, Lines { lines, depth, ..b }, self.b);
            }
            for block in pieces(rows.clone(), MC) {
                // What lies along the rows is read in long pieces, so many panels are packed at a time.
                let packed = p.a.col_stride != 1;
                if packed {
                    let a = lines(&p.a, batch, (block.start, depth.start), false);
                    let (lines, depth) = (block.len(), depth.len());
                    // SAFETY: rows and k lie in A; the scratch holds whole panels of MC rows.
                    unsafe { pack_left(self.unit, Lines { lines, depth, ..a }, self.a) }
                }
                for panel in pieces(block.clone(), SIDE) {
                    let waiting = if p.k <= self.depth {
                        0
                    } else {
                        panel.start - rows.start
                    };
                    let sums = Sums {
                        data: self.sums.data.wrapping_add(waiting * self.sums.row_stride),
                        ..self.sums
                    };
                    let ready = packed.then(|| {
                        let before = (panel.start - block.start) / SIDE;
                        let blocks = depth.len().div_ceil(DEPTH);
                        self.a.cast_const().wrapping_add(before * blocks * BLOCK)
                    });
                    // SAFETY: the panel's rows and columns lie in C, and its sums in scratch.
                    unsafe { self.panel(batch, panel, (&cols, &depth), ready, sums) }
                }
            }
        }
    }

    /// The sums of at most 32 rows over a block of k, B packed; A too if it is `ready`.
    ///
    /// # Safety
    /// As [`Strip::run`].
    unsafe fn panel(
        &self,
        batch: usize,
        rows: Range<usize>,
        (cols, depth): (&Range<usize>, &Range<usize>),
        ready: Option<*const bf16>,
        sums: Sums,
    ) {
        let p = self.product;
        let (at, shape) = ((batch, rows.start, cols.start), (rows.len(), cols.len()));
        let s = self.unit.vectors();
        if depth.start == 0 && p.accum == Accum::Add {
            // SAFETY: rows and columns lie in C, and the scratch holds them.
            unsafe { widen_output(s, &p.c, at, shape, sums) }
        }
        let b_panel = depth.len().div_ceil(DEPTH) * BLOCK;
        for part in pieces(depth.clone(), KC) {
            let skipped = (part.start - depth.start) / DEPTH * BLOCK;
            let a = match ready {
                Some(a) => a.wrapping_add(skipped),
                None => {
                    let a = lines(&p.a, batch, (rows.start, part.start), false);
                    let (lines, depth) = (rows.len(), part.len());
                    // SAFETY: rows and k lie in A; the scratch holds a panel of KC.
                    unsafe { pack_left(self.unit, Lines { lines, depth, ..a }, self.a) }
                    self.a.cast_const()
                }
            };
            let fresh = part.start == 0 && p.accum == Accum::Replace;
            let blocks = part.len().div_ceil(DEPTH);
            // The rows of C where these sums go are asked for meanwhile.
            for j in (0..cols.len()).step_by(SIDE) {
                if part.end == p.k {
                    for i in rows.clone() {
                        s.prefetch(p.c.at((batch, i, cols.start + j)));
                    }
                }
                let b = self.b.wrapping_add(j / SIDE * b_panel + skipped);
                let size = [rows.len(), cols.len() - j];
                let c = sums.data.wrapping_add(j);
                // SAFETY: these blocks lie in packed panels; the sums hold whole squares.
                unsafe {
                    self.tiles
                        .multiply(blocks, a, b, c, sums.row_stride, size, fresh);
                }
            }
        }
        if depth.end == p.k {
            // SAFETY: rows and columns of C are this thread's.
            unsafe {
                let narrow = p.narrowed_by(Some(self.unit.pairs()));
                finish((s, narrow), &p.c, at, shape, sums);
            }
        }
    }
}

/// The lines of an operand of bf16 from row and column on: columns if `of_columns`, else rows.
fn lines(x: &Operand, batch: usize, (i, j): (usize, usize), of_columns: bool) -> Lines {
    let (line_stride, depth_stride) = if of_columns {
        (x.col_stride, x.row_stride)
    } else {
        (x.row_stride, x.col_stride)
    };
    Lines {
        data: x.at(batch, i, j).cast(),
        lines: 0,
        depth: 0,
        line_stride,
        depth_stride,
    }
}
