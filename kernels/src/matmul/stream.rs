//! Products of few rows, which are bound by reading B: it streams by once, and the sums of a strip of columns wait in the
//! first cache.
//!
//! Where the columns of B lie along k ("weights \[out, in\]") a chain over k cannot be a sum of lanes: squares are transposed in
//! registers instead. From memory that keeps up with the stream; from cache it has a third to a half of the speed of lane
//! sums (7 against 25 GFLOP/s at k = n = 1024 on a Zen 3), which is the price of one order of sums. Columns are copied first,
//! 64 k at a time: read in place, columns at a distance of 4 KiB met in one set of the first cache (4 GFLOP/s).

#![allow(unsafe_code)]

use super::super::simd::{Kernel, Simd};
use super::microkernel::{Rows, Sums};
use super::pack::term;
use crate::dtype::Float;

/// y\[i, j\] += sum over p of a\[i, p\] b\[p, j\] for R rows and n columns, reading B row by row: `U` rows of it at a time, each
/// a stream that the hardware prefetches. The chain runs over ascending p, or `ODD_FIRST` of each two.
///
/// # Safety
/// Element (i, p) of A as in [`Rows`], (p, j) of B at `b + p b_row + j`, and (i, j) of y as in [`Sums`] for R rows, k and
/// n are readable, y's also writable; nothing else refers to y.
#[inline(always)]
pub(super) unsafe fn stream<
    S: Simd,
    T: Float,
    const R: usize,
    const U: usize,
    const ODD_FIRST: bool,
>(
    s: S,
    (k, n): (usize, usize),
    a: Rows,
    (b, b_row): (*const T, usize),
    y: Sums,
) {
    s.run(Stream::<T, R, U, ODD_FIRST> {
        k,
        n,
        a,
        b,
        b_row,
        y,
    });
}

/// The arguments of [`stream`], whose promise holds wherever one is made.
struct Stream<T, const R: usize, const U: usize, const ODD_FIRST: bool> {
    k: usize,
    n: usize,
    a: Rows,
    b: *const T,
    b_row: usize,
    y: Sums,
}

impl<T: Float, const R: usize, const U: usize, const ODD_FIRST: bool> Kernel
    for Stream<T, R, U, ODD_FIRST>
{
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let mut p = 0;
        while p < self.k {
            // SAFETY: the promise of `stream`; U rows from p on, or one or two, lie within k.
            unsafe {
                let a = Rows {
                    data: self.a.data.add(p * self.a.k_stride),
                    ..self.a
                };
                let b = (self.b.add(p * self.b_row), self.b_row);
                if p + U <= self.k {
                    stream_rows::<S, T, R, U, ODD_FIRST>(s, self.n, a, b, self.y);
                    p += U;
                } else if ODD_FIRST && p + 2 <= self.k {
                    stream_rows::<S, T, R, 2, true>(s, self.n, a, b, self.y);
                    p += 2;
                } else {
                    stream_rows::<S, T, R, 1, ODD_FIRST>(s, self.n, a, b, self.y);
                    p += 1;
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn stream_rows<S: Simd, T: Float, const R: usize, const U: usize, const ODD_FIRST: bool>(
    s: S,
    n: usize,
    a: Rows,
    (b, b_row): (*const T, usize),
    y: Sums,
) {
    let mut x = [[s.zero(); R]; U];
    for (u, x) in x.iter_mut().enumerate() {
        for (i, x) in x.iter_mut().enumerate() {
            // SAFETY: the caller vouches for R x U elements of A.
            *x = s.splat(unsafe { *a.data.add(i * a.row_stride + u * a.k_stride) });
        }
    }
    let mut j = 0;
    while j < n {
        let lanes = S::LANES.min(n - j);
        let whole = lanes == S::LANES;
        let mut acc = [s.zero(); R];
        for (i, v) in acc.iter_mut().enumerate() {
            // SAFETY: `lanes` columns from j lie within n.
            *v = unsafe {
                let y = y.data.add(i * y.row_stride + j);
                if whole {
                    s.load_ptr(y)
                } else {
                    s.load_first_ptr(y, lanes)
                }
            };
        }
        for place in 0..U {
            let u = term::<ODD_FIRST>(place, U);
            // SAFETY: as above, in row u of B.
            let column = unsafe {
                let b = b.add(u * b_row + j);
                if whole {
                    s.load_ptr(b)
                } else {
                    s.load_first_ptr(b, lanes)
                }
            };
            for (v, x) in acc.iter_mut().zip(x[u]) {
                *v = s.fma(x, column, *v);
            }
        }
        for (i, &v) in acc.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                let y = y.data.add(i * y.row_stride + j);
                if whole {
                    s.store_ptr(y, v);
                } else {
                    s.store_first_ptr(y, lanes, v);
                }
            }
        }
        j += lanes;
    }
}

/// As [`stream`], where the columns of B lie along k: (p, j) at `b + p + j b_column`. As many columns as a vector has lanes are
/// read side by side, and squares of them transposed in registers.
///
/// # Safety
/// As [`stream`].
#[inline(always)]
pub(super) unsafe fn stream_columns<S: Simd, T: Float, const R: usize, const ODD_FIRST: bool>(
    s: S,
    (k, n): (usize, usize),
    a: Rows,
    (b, b_column): (*const T, usize),
    y: Sums,
) {
    s.run(StreamColumns::<T, R, ODD_FIRST> {
        k,
        n,
        a,
        b,
        b_column,
        y,
    });
}

/// The arguments of [`stream_columns`], whose promise holds wherever one is made.
struct StreamColumns<T, const R: usize, const ODD_FIRST: bool> {
    k: usize,
    n: usize,
    a: Rows,
    b: *const T,
    b_column: usize,
    y: Sums,
}

impl<T: Float, const R: usize, const ODD_FIRST: bool> Kernel for StreamColumns<T, R, ODD_FIRST> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let mut copied = [[0.0; COLUMN_PITCH]; 32];
        for j in (0..self.n).step_by(2 * S::LANES) {
            let lanes = (2 * S::LANES).min(self.n - j);
            // SAFETY: the promise of `stream_columns`, for `lanes` columns from j on.
            unsafe {
                let b = (self.b.add(j * self.b_column), self.b_column);
                let y = Sums {
                    data: self.y.data.add(j),
                    ..self.y
                };
                let shape = (self.k, lanes);
                stream_squares::<S, T, R, ODD_FIRST>(s, shape, self.a, b, y, &mut copied);
            }
        }
    }
}

/// k of a column that is copied at a time, and the distance between copies. Read in place, columns at a distance of a power
/// of two would drive one another out of the first cache between one square and the next.
const COLUMN: usize = 64;
const COLUMN_PITCH: usize = COLUMN + 16;

/// [`stream_columns`] for at most two vectors of columns: a chain alone would wait for itself.
#[inline(always)]
unsafe fn stream_squares<S: Simd, T: Float, const R: usize, const ODD_FIRST: bool>(
    s: S,
    (k, lanes): (usize, usize),
    a: Rows,
    (b, b_column): (*const T, usize),
    y: Sums,
    copied: &mut [[f32; COLUMN_PITCH]; 32],
) {
    let mut acc = [[s.zero(); R]; 2];
    for (g, acc) in acc.iter_mut().enumerate() {
        for (i, v) in acc.iter_mut().enumerate() {
            let here = lanes.saturating_sub(g * S::LANES);
            // SAFETY: the caller vouches for `lanes` columns of R rows.
            *v = unsafe {
                let y = y.data.wrapping_add(i * y.row_stride + g * S::LANES);
                if here >= S::LANES {
                    s.load_ptr(y)
                } else {
                    s.load_first_ptr(y, here)
                }
            };
        }
    }
    for from in (0..k).step_by(COLUMN) {
        let deep = COLUMN.min(k - from);
        for (l, copy) in copied.iter_mut().enumerate().take(lanes) {
            let b = b.wrapping_add(l * b_column + from);
            for p in (0..deep).step_by(S::LANES) {
                // SAFETY: `deep` elements of column l < lanes lie from here on.
                let v = unsafe {
                    s.prefetch(b.add(p).wrapping_add(COLUMN));
                    if p + S::LANES <= deep {
                        s.load_ptr(b.add(p))
                    } else {
                        s.load_first_ptr(b.add(p), deep - p)
                    }
                };
                s.store(&mut copy[p..], v);
            }
        }
        let lines = copied.as_ptr().cast::<f32>();
        for p in (0..deep).step_by(S::LANES) {
            for (g, acc) in acc.iter_mut().enumerate() {
                let mut square = [s.zero(); 16];
                let square = &mut square[..S::LANES];
                for (l, v) in square.iter_mut().enumerate() {
                    // SAFETY: copy g LANES + l < 32, whose pitch leaves a vector beyond its last p.
                    *v = unsafe { s.load_ptr(lines.add((g * S::LANES + l) * COLUMN_PITCH + p)) };
                }
                s.transpose(square);
                for place in 0..S::LANES {
                    let q = term::<ODD_FIRST>(place, S::LANES);
                    let column = square[q];
                    if p + q < deep {
                        for (i, v) in acc.iter_mut().enumerate() {
                            // SAFETY: the caller vouches for R x k elements of A.
                            let x = unsafe {
                                *a.data.add(i * a.row_stride + (from + p + q) * a.k_stride)
                            };
                            *v = s.fma(s.splat(x), column, *v);
                        }
                    }
                }
            }
        }
    }
    for (g, acc) in acc.iter().enumerate() {
        for (i, &v) in acc.iter().enumerate() {
            let here = lanes.saturating_sub(g * S::LANES);
            // SAFETY: as above.
            unsafe {
                let y = y.data.wrapping_add(i * y.row_stride + g * S::LANES);
                if here >= S::LANES {
                    s.store_ptr(y, v);
                } else {
                    s.store_first_ptr(y, here, v);
                }
            }
        }
    }
}
