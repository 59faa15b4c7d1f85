//! Products of bf16 of few rows in the matrix unit's order of sums, by vectors: B streams by once, as it lies.
//!
//! The unit would have B packed first, which costs more than all else here (6 GFLOP/s instead of the stream's speed at
//! 1 x 4096 x 4096). Per block of 32 k the even and the odd chains of a strip of columns wait in the first cache, and eight
//! rows of B stream by at a time. What the unit flushes is flushed here by hand.

#![allow(unsafe_code)]

use super::super::Accum;
use super::super::memory::with_scratch_f32;
use super::super::simd::amx::{Amx, DEPTH};
use super::super::simd::{Kernel, Simd};
use super::Product;
use super::microkernel::{Sums, finish, widen_output};
use half::bf16;
use std::ops::Range;

/// Rows up to which B is streamed.
const STREAMED: usize = 4;
/// Columns whose sums and chains stay near while rows of B are read in long pieces: of 2 KiB each, a quarter slower.
const COLS: usize = 4096;
/// Rows of B at a time.
const ROWS: usize = 8;

/// Whether a region of m rows is computed here.
pub(super) fn is_streamed(product: &Product, m: usize) -> bool {
    m <= STREAMED && product.b.col_stride == 1
}

/// Computes a region of each matrix of the batch in turn.
pub(super) fn stream(
    product: &Product,
    unit: Amx,
    batch: Range<usize>,
    rows: Range<usize>,
    cols: Range<usize>,
) {
    let width = cols.len().min(COLS).next_multiple_of(16);
    with_scratch_f32(3 * rows.len() * width, |scratch| {
        for batch in batch {
            for from in cols.clone().step_by(COLS) {
                let strip = Strip {
                    product,
                    batch,
                    rows: rows.clone(),
                    cols: from..cols.end.min(from + COLS),
                    width,
                    scratch,
                };
                match rows.len() {
                    1 => unit.vectors().run(Few::<1>(strip)),
                    2 => unit.vectors().run(Few::<2>(strip)),
                    3 => unit.vectors().run(Few::<3>(strip)),
                    _ => unit.vectors().run(Few::<4>(strip)),
                }
            }
        }
    });
}

/// Some columns of a few rows.
struct Strip<'p> {
    product: &'p Product,
    batch: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    /// Elements between rows of sums.
    width: usize,
    /// Sums, even and odd chains, each of all rows.
    scratch: &'p mut [f32],
}

/// [`Strip`] of R rows.
struct Few<'p, const R: usize>(Strip<'p>);

impl<const R: usize> Kernel for Few<'_, R> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Strip {
            product: p,
            batch,
            rows,
            cols,
            width,
            scratch,
        } = self.0;
        assert!(rows.len() == R && cols.len() <= width && scratch.len() >= 3 * R * width);
        let (sums, chains) = scratch.split_at_mut(R * width);
        let (at, shape) = ((batch, rows.start, cols.start), (R, cols.len()));
        let c = Sums {
            data: sums.as_mut_ptr(),
            row_stride: width,
        };
        match p.accum {
            Accum::Replace => sums.fill(0.0),
            // SAFETY: rows and columns of this region of C; there is room for R rows.
            Accum::Add => unsafe { widen_output(s, &p.c, at, shape, c) },
        }
        for block in (0..p.k).step_by(DEPTH) {
            chains.fill(0.0);
            let depth = block..p.k.min(block + DEPTH);
            let mut q = depth.start;
            while q < depth.end {
                let b = p.b.at(batch, q, cols.start).cast::<bf16>();
                let a = |i: usize, u: usize| {
                    let a = p.a.at(batch, rows.start + i, q + u).cast::<bf16>();
                    // SAFETY: row i < R and k = q + u < depth.end lie in A.
                    unsafe { *a }.to_f32()
                };
                // SAFETY: as many rows of B from q on, of which these columns lie in B; the chains hold R rows each.
                unsafe {
                    if q + ROWS <= depth.end {
                        let x = std::array::from_fn(|u| std::array::from_fn(|i| a(i, u)));
                        let b = (b, p.b.row_stride);
                        grow::<S, R, ROWS>(s, cols.len(), x, b, (chains, width), 0);
                        q += ROWS;
                    } else {
                        let x = [std::array::from_fn(|i| a(i, 0))];
                        let parity = q % 2;
                        grow::<S, R, 1>(s, cols.len(), x, (b, 0), (chains, width), parity);
                        q += 1;
                    }
                }
            }
            let (even, odd) = chains.split_at(R * width);
            for j in (0..R * width).step_by(S::LANES) {
                let both = flush(s, s.add(s.load(&even[j..]), s.load(&odd[j..])));
                let old = flush(s, s.load(&sums[j..]));
                s.store(&mut sums[j..], flush(s, s.add(old, both)));
            }
        }
        // SAFETY: as above; no other region has these elements of C.
        unsafe { finish((s, None), &p.c, at, shape, c) }
    }
}

/// 0 of the same sign instead of a subnormal number.
#[inline(always)]
fn flush<S: Simd>(s: S, x: S::V) -> S::V {
    let tiny = s.lt(s.abs(x), s.splat(f32::MIN_POSITIVE));
    s.select(tiny, s.copysign(s.zero(), x), x)
}

/// Grows the chains of R rows by U rows of B, of which the first is of this parity.
///
/// # Safety
/// `n` elements of U rows are readable from `b.0`, `b.1` apart.
#[inline(always)]
unsafe fn grow<S: Simd, const R: usize, const U: usize>(
    s: S,
    n: usize,
    x: [[f32; R]; U],
    b: (*const bf16, usize),
    (chains, width): (&mut [f32], usize),
    parity: usize,
) {
    assert!(n <= width && chains.len() >= 2 * R * width);
    let mut left = [[s.zero(); R]; U];
    for (left, x) in left.iter_mut().zip(x) {
        for (v, x) in left.iter_mut().zip(x) {
            *v = flush(s, s.splat(x));
        }
    }
    for j in (0..n).step_by(S::LANES) {
        let mut acc = [[s.zero(); R]; 2];
        for (parity, acc) in acc.iter_mut().enumerate() {
            for (i, v) in acc.iter_mut().enumerate() {
                *v = s.load(&chains[(parity * R + i) * width + j..]);
            }
        }
        for (u, x) in left.iter().enumerate() {
            let from = b.0.wrapping_add(u * b.1 + j);
            // SAFETY: row u has n elements, so n - j from here on.
            let column = unsafe {
                if n - j >= S::LANES {
                    s.load_ptr(from)
                } else {
                    s.load_first_ptr(from, n - j)
                }
            };
            let column = flush(s, column);
            for (v, &x) in acc[(u + parity) % 2].iter_mut().zip(x) {
                *v = flush(s, s.fma(x, column, *v));
            }
        }
        for (parity, acc) in acc.iter().enumerate() {
            for (i, &v) in acc.iter().enumerate() {
                s.store(&mut chains[(parity * R + i) * width + j..], v);
            }
        }
    }
}
