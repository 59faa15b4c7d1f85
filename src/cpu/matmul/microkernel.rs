//! The innermost loops: a tile of C in registers, and what happens to it on its way to memory.
//!
//! The tile's rows are broadcast from A, its columns are vectors of B. Each accumulator is one chain of fused
//! multiply-adds over ascending p, begun at 0, at C, or where the block of k before it ended: the order is the contract
//! (house decision 3), so nothing here may split a chain. Everything is generic over the instruction set and must inline
//! into the caller, which runs under the token's features.

#![allow(unsafe_code)]

use super::super::simd::{Kernel, Simd};
use super::Output;
use crate::dtype::{DType, Float};
use half::{bf16, f16};

/// Rows of A for a tile: element (i, p) at `data + i row_stride + p k_stride`.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub data: *const f32,
    pub row_stride: usize,
    pub k_stride: usize,
}

/// Columns of B for a tile: element (p, j) at `data + p k_stride + j`, all of the tile's columns readable.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub data: *const f32,
    pub k_stride: usize,
}

/// f32 that a tile's chains begin from or end in: element (i, j) at `data + i row_stride + j`.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub data: *mut f32,
    pub row_stride: usize,
}

/// to\[i, j\] = from\[i, j\] + sum over p < k of a\[i, p\] b\[p, j\] for `rows` <= MR and all V vectors of columns; from absent is 0.
///
/// # Safety
/// `a` and `b` are readable for `rows` x k and k x V vectors; `from` is readable and `to` writable for rows x V vectors.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const MR: usize, const V: usize>(
    s: S,
    rows: usize,
    k: usize,
    a: Rows,
    b: Columns,
    from: Option<Sums>,
    to: Sums,
) {
    // One function per number of rows, so that all accumulators live in registers. A constant condition keeps the
    // compiler from generating those beyond MR.
    macro_rules! of_rows {
        ($($r:literal)*) => {
            $(if const { $r < MR } {
                if rows == $r {
                    s.run(Chains::<$r, V> { k, a, b, from, to });
                    return;
                }
            })*
        };
    }
    of_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13);
    debug_assert_eq!(rows, MR);
    if a.row_stride == 1 && a.k_stride == MR {
        s.run(PackedChains(Chains::<MR, V> { k, a, b, from, to }));
    } else if a.k_stride == 1 {
        s.run(LongChains(Chains::<MR, V> { k, a, b, from, to }));
    } else {
        s.run(Chains::<MR, V> { k, a, b, from, to });
    }
}

/// The arguments of [`tile`], whose promise holds wherever one is made.
struct Chains<const R: usize, const V: usize> {
    k: usize,
    a: Rows,
    b: Columns,
    from: Option<Sums>,
    to: Sums,
}

impl<const R: usize, const V: usize> Kernel for Chains<R, V> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        // SAFETY: made by `tile` only, under its promise.
        unsafe { chains::<S, R, V>(s, self.k, self.a, self.b, self.from, self.to) }
    }
}

/// [`Chains`] over rows that lie along k.
struct LongChains<const R: usize, const V: usize>(Chains<R, V>);

impl<const R: usize, const V: usize> Kernel for LongChains<R, V> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        self.0.a.k_stride = 1;
        self.0.call(s);
    }
}

/// [`Chains`] over a packed panel of A, whose constant strides free registers.
struct PackedChains<const R: usize, const V: usize>(Chains<R, V>);

impl<const R: usize, const V: usize> Kernel for PackedChains<R, V> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        self.0.a.row_stride = 1;
        self.0.a.k_stride = R;
        self.0.call(s);
    }
}

#[inline(always)]
unsafe fn chains<S: Simd, const R: usize, const V: usize>(
    s: S,
    k: usize,
    a: Rows,
    b: Columns,
    from: Option<Sums>,
    to: Sums,
) {
    let mut acc = [[s.zero(); V]; R];
    if let Some(from) = from {
        for (i, row) in acc.iter_mut().enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                // SAFETY: the caller vouches for R rows of V vectors.
                *v = unsafe { s.load_ptr(from.data.add(i * from.row_stride + j * S::LANES)) };
            }
        }
    }
    // A pointer for every three rows: the rest is an address with a scaled stride. One for all would be a chain of additions.
    let mut a_p = [a.data; 5];
    for (g, p) in a_p.iter_mut().enumerate() {
        *p = a.data.wrapping_add(3 * g * a.row_stride);
    }
    let mut b_p = b.data;
    for _ in 0..k {
        // SAFETY: the caller vouches for k rows of V vectors, and for R rows of k elements.
        unsafe { step(s, &mut acc, a_p, a.row_stride, b_p) }
        // One step past the last element at the end, where nothing is read.
        for p in &mut a_p {
            *p = p.wrapping_add(a.k_stride);
        }
        b_p = b_p.wrapping_add(b.k_stride);
    }
    for (i, row) in acc.into_iter().enumerate() {
        for (j, v) in row.into_iter().enumerate() {
            // SAFETY: the caller vouches for R rows of V vectors.
            unsafe { s.store_ptr(to.data.add(i * to.row_stride + j * S::LANES), v) }
        }
    }
}

/// One p: every chain grows by one product.
///
/// # Safety
/// Of R elements `row_stride` apart every third is a pointer of a; they are readable, and V vectors at b.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize, const V: usize>(
    s: S,
    acc: &mut [[S::V; V]; R],
    a: [*const f32; 5],
    row_stride: usize,
    b: *const f32,
) {
    let mut columns = [s.zero(); V];
    for (j, v) in columns.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *v = unsafe { s.load_ptr(b.add(j * S::LANES)) };
    }
    for (i, row) in acc.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = s.splat(unsafe { *a[i / 3].add(i % 3 * row_stride) });
        for (v, column) in row.iter_mut().zip(columns) {
            *v = s.fma(x, column, *v);
        }
    }
}

/// y\[i, j\] += sum over p of a\[i, p\] b\[p, j\] for R rows and n columns, reading B row by row: `U` rows of it at a time, each
/// a stream that the hardware prefetches.
///
/// # Safety
/// Element (i, p) of A as in [`Rows`], (p, j) of B at `b + p b_row + j`, and (i, j) of y as in [`Sums`] for R rows, k and
/// n are readable, y's also writable; nothing else refers to y.
#[inline(always)]
pub(super) unsafe fn stream<S: Simd, T: Float, const R: usize, const U: usize>(
    s: S,
    (k, n): (usize, usize),
    a: Rows,
    (b, b_row): (*const T, usize),
    y: Sums,
) {
    s.run(Stream::<T, R, U> {
        k,
        n,
        a,
        b,
        b_row,
        y,
    });
}

/// The arguments of [`stream`], whose promise holds wherever one is made.
struct Stream<T, const R: usize, const U: usize> {
    k: usize,
    n: usize,
    a: Rows,
    b: *const T,
    b_row: usize,
    y: Sums,
}

impl<T: Float, const R: usize, const U: usize> Kernel for Stream<T, R, U> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let mut p = 0;
        while p < self.k {
            // SAFETY: the promise of `stream`; U rows from p on, or one, lie within k.
            unsafe {
                let a = Rows {
                    data: self.a.data.add(p * self.a.k_stride),
                    ..self.a
                };
                let b = (self.b.add(p * self.b_row), self.b_row);
                if p + U <= self.k {
                    stream_rows::<S, T, R, U>(s, self.n, a, b, self.y);
                    p += U;
                } else {
                    stream_rows::<S, T, R, 1>(s, self.n, a, b, self.y);
                    p += 1;
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn stream_rows<S: Simd, T: Float, const R: usize, const U: usize>(
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
        for (u, x) in x.iter().enumerate() {
            // SAFETY: as above, in row u of B.
            let column = unsafe {
                let b = b.add(u * b_row + j);
                if whole {
                    s.load_ptr(b)
                } else {
                    s.load_first_ptr(b, lanes)
                }
            };
            for (v, &x) in acc.iter_mut().zip(x) {
                *v = s.fma(x, column, *v);
            }
        }
        for (i, v) in acc.into_iter().enumerate() {
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
pub(super) unsafe fn stream_columns<S: Simd, T: Float, const R: usize>(
    s: S,
    (k, n): (usize, usize),
    a: Rows,
    (b, b_column): (*const T, usize),
    y: Sums,
) {
    s.run(StreamColumns::<T, R> {
        k,
        n,
        a,
        b,
        b_column,
        y,
    });
}

/// The arguments of [`stream_columns`], whose promise holds wherever one is made.
struct StreamColumns<T, const R: usize> {
    k: usize,
    n: usize,
    a: Rows,
    b: *const T,
    b_column: usize,
    y: Sums,
}

impl<T: Float, const R: usize> Kernel for StreamColumns<T, R> {
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
                stream_squares::<S, T, R>(s, (self.k, lanes), self.a, b, y, &mut copied);
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
unsafe fn stream_squares<S: Simd, T: Float, const R: usize>(
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
                for (q, &column) in square.iter().enumerate() {
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
    for (g, acc) in acc.into_iter().enumerate() {
        for (i, v) in acc.into_iter().enumerate() {
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

/// Widens n <= `LANES` elements at offset `at`.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(
    s: S,
    (data, dtype): (*const u8, DType),
    at: usize,
    n: usize,
) -> S::V {
    #[inline(always)]
    unsafe fn typed<S: Simd, T: Float>(s: S, p: *const T, n: usize) -> S::V {
        // SAFETY: the caller's promise, handed on.
        unsafe {
            if n == S::LANES {
                s.load_ptr(p)
            } else {
                s.load_first_ptr(p, n)
            }
        }
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match dtype {
            DType::F32 => typed(s, data.cast::<f32>().add(at), n),
            DType::Bf16 => typed(s, data.cast::<bf16>().add(at), n),
            DType::F16 => typed(s, data.cast::<f16>().add(at), n),
            DType::U32 => unreachable!("checked on entry"),
        }
    }
}

/// Narrows n <= `LANES` elements to offset `at`.
///
/// # Safety
/// They are writable.
#[inline(always)]
unsafe fn store<S: Simd>(s: S, (data, dtype): (*mut u8, DType), at: usize, n: usize, v: S::V) {
    #[inline(always)]
    unsafe fn typed<S: Simd, T: Float>(s: S, p: *mut T, n: usize, v: S::V) {
        // SAFETY: the caller's promise, handed on.
        unsafe {
            if n == S::LANES {
                s.store_ptr(p, v)
            } else {
                s.store_first_ptr(p, n, v)
            }
        }
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match dtype {
            DType::F32 => typed(s, data.cast::<f32>().add(at), n, v),
            DType::Bf16 => typed(s, data.cast::<bf16>().add(at), n, v),
            DType::F16 => typed(s, data.cast::<f16>().add(at), n, v),
            DType::U32 => unreachable!("checked on entry"),
        }
    }
}

/// Widens C's elements (rows i.., columns j.., `shape` many) of matrix `batch` into `to`.
///
/// # Safety
/// They lie in C, and `to` has room.
#[inline(always)]
pub(super) unsafe fn widen_output<S: Simd>(
    s: S,
    c: &Output,
    at: (usize, usize, usize),
    shape: (usize, usize),
    to: Sums,
) {
    s.run(Widen { c, at, shape, to });
}

/// The arguments of [`widen_output`], whose promise holds wherever one is made.
struct Widen<'c> {
    c: &'c Output,
    at: (usize, usize, usize),
    shape: (usize, usize),
    to: Sums,
}

impl Kernel for Widen<'_> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (batch, i, j) = self.at;
        let (rows, cols) = self.shape;
        for r in 0..rows {
            let from = (self.c.at((batch, i + r, j)).cast_const(), self.c.dtype);
            for x in (0..cols).step_by(S::LANES) {
                let n = S::LANES.min(cols - x);
                // SAFETY: the promise of `widen_output`; n columns from x lie within `cols`.
                unsafe {
                    let v = load(s, from, x, n);
                    let to = (self.to.data.cast(), DType::F32);
                    store(s, to, r * self.to.row_stride + x, n, v);
                }
            }
        }
    }
}

/// Leaves unfinished sums in C, which is f32, until the next block of k.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
pub(super) unsafe fn keep<S: Simd>(
    s: S,
    c: &Output,
    at: (usize, usize, usize),
    (rows, cols): (usize, usize),
    from: Sums,
) {
    for r in 0..rows {
        let to = c.at((at.0, at.1 + r, at.2));
        for x in (0..cols).step_by(S::LANES) {
            let n = S::LANES.min(cols - x);
            // SAFETY: the caller's promise; n columns from x lie within `cols`.
            unsafe {
                let sums = (from.data.cast_const().cast(), DType::F32);
                let v = load(s, sums, r * from.row_stride + x, n);
                store(s, (to, DType::F32), x, n, v);
            }
        }
    }
}

/// Takes finished sums to C: adds the bias, keeps the preactivation, applies the activation, narrows.
///
/// # Safety
/// As [`widen_output`], with `from` readable and C's elements writable by nobody else.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd>(
    s: S,
    c: &Output,
    at: (usize, usize, usize),
    shape: (usize, usize),
    from: Sums,
) {
    s.run(Finish { c, at, shape, from });
}

/// The arguments of [`finish`], whose promise holds wherever one is made.
struct Finish<'c> {
    c: &'c Output,
    at: (usize, usize, usize),
    shape: (usize, usize),
    from: Sums,
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Finish { c, from, .. } = self;
        let (batch, i, j) = self.at;
        let (rows, cols) = self.shape;
        for r in 0..rows {
            for x in (0..cols).step_by(S::LANES) {
                let n = S::LANES.min(cols - x);
                // SAFETY: the promise of `finish`; n columns from x lie within `cols`. Bias and preactivation have C's
                // columns and rows.
                unsafe {
                    let sums = (from.data.cast_const().cast(), DType::F32);
                    let mut v = load(s, sums, r * from.row_stride + x, n);
                    if let Some(bias) = c.bias {
                        v = s.add(v, load(s, bias, j + x, n));
                    }
                    if let Some(preactivation) = c.preactivation {
                        let row = (batch * c.rows + i + r) * c.cols;
                        store(s, preactivation, row + j + x, n, v);
                    }
                    if let Some(activation) = c.activation {
                        v = activation.apply(s, v);
                    }
                    store(s, (c.at((batch, i + r, j)), c.dtype), x, n, v);
                }
            }
        }
    }
}
