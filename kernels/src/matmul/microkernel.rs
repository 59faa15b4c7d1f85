//! The innermost loops: a tile of C in registers, and what happens to it on its way to memory.
//!
//! The tile's rows are broadcast from A, its columns are vectors of B. Each accumulator is one chain of fused
//! multiply-adds over ascending p, begun at 0, at C, or where the block of k before it ended: the order is the contract
//! (house decision 3), so nothing here may split a chain. Everything is generic over the instruction set and must inline
//! into the caller, which runs under the token's features.
//!
//! On AVX-512 the compiler left the loops over 14 rows as loops and the accumulators in memory (53 GFLOP/s of 240 on a
//! Xeon, 200 since they are written out), and moved the finished array through the stack (a quarter of the time). Look at the
//! assembly after every change here.

#![allow(unsafe_code)]

use super::super::simd::{Asks, Kernel, PairUnit, Simd, TileLoop};
use super::Output;
use crate::dtype::{DType, Float};
use half::{bf16, f16};

/// Writes `body` out for each row of a tile, i a constant. A loop over 14 rows is more than the compiler unrolls by itself,
/// and a tile that a loop counts through lies in memory, not in registers: a quarter of the speed.
macro_rules! each_row {
    ($i:ident < $rows:ident => $body:block) => {
        each_row!(@ $i $rows $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13)
    };
    (@ $i:ident $rows:ident $body:block $($row:literal)*) => {
        const { assert!($rows <= 14) }
        $(if const { $row < $rows } {
            let $i: usize = $row;
            $body
        })*
    };
}

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
/// With `pairs`, elements of a and b are pairs of bf16 in 4 bytes, which that unit multiplies; V vectors are 32 columns then.
///
/// # Safety
/// `a` and `b` are readable for `rows` x k and k x V vectors; `from` is readable and `to` writable for rows x V vectors.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const MR: usize, const V: usize>(
    (s, pairs): (S, Option<PairUnit>),
    rows: usize,
    k: usize,
    (a, b): (Rows, Columns),
    (from, to): (Option<Sums>, To),
    asks: &Asks,
) {
    if !S::HAS_TILE_LOOP && pairs.is_none() {
        // Not the first, which is C: without turns to spread it over that costs small products 2 %.
        for ask in &asks[1..] {
            for turn in 0..ask.turns {
                let at = ask.at.wrapping_add(turn * ask.step);
                s.prefetch(at);
                s.prefetch(at.wrapping_add(64));
            }
        }
    }
    // One function per number of rows, so that all accumulators live in registers. A constant condition keeps the
    // compiler from generating those beyond MR.
    macro_rules! of_rows {
        ($($r:literal)*) => {
            $(if const { $r < MR } {
                if rows == $r {
                    some_rows::<S, $r, V, false>((s, pairs), Chains { k, a, b, from, to }, asks);
                    return;
                }
            })*
        };
    }
    of_rows!(1 2 3 4 5 6 7 8 9 10 11 12 13);
    debug_assert_eq!(rows, MR);
    some_rows::<S, MR, V, true>((s, pairs), Chains { k, a, b, from, to }, asks);
}

/// [`tile`] of R rows, `WHOLE` if there are no more: by the instruction set's own loop, or the compiler's.
#[inline(always)]
fn some_rows<S: Simd, const R: usize, const V: usize, const WHOLE: bool>(
    (s, pairs): (S, Option<PairUnit>),
    tile: Chains<R, V>,
    asks: &Asks,
) {
    let Chains { k, a, b, from, to } = tile;
    let packed = a.row_stride == 1;
    let looped = const { S::HAS_TILE_LOOP && V * S::LANES == 32 };
    debug_assert!(if pairs.is_some() { looped } else { !to.narrow });
    if looped && (packed || a.k_stride == 1) {
        let tile = TileLoop {
            k,
            a: a.data,
            a_packed: packed,
            a_step: 4 * if packed { a.k_stride } else { a.row_stride },
            b: b.data,
            b_step: 4 * b.k_stride,
            from: from.map_or(std::ptr::null(), |from| from.data),
            from_row: 4 * from.map_or(0, |from| from.row_stride),
            to: to.data.cast(),
            to_row: to.row_bytes,
            narrow: to.narrow,
            asks: asks.as_ptr(),
        };
        // SAFETY: made by `tile` only, under its promise.
        unsafe {
            match pairs {
                Some(unit) => unit.tile_loop::<R>(&tile),
                None => s.tile_loop::<R>(&tile),
            }
        }
        return;
    }
    // Constant conditions, because each version is compiled for every instruction set.
    if const { S::ROW_BY_ROW || (S::HAS_TILE_LOOP && V * S::LANES == 32) } {
        return tile.row_by_row(s);
    }
    // Constant strides free registers.
    if const { WHOLE } {
        if packed && a.k_stride == R {
            return s.run(PackedChains(tile));
        }
        if a.k_stride == 1 {
            return s.run(LongChains(tile));
        }
    }
    s.run(tile);
}

/// Where sums go: f32, or, of pairs only, rounded to bf16.
#[derive(Clone, Copy)]
pub(super) struct To {
    pub data: *mut u8,
    pub row_bytes: usize,
    pub narrow: bool,
}

/// The arguments of [`tile`], whose promise holds wherever one is made.
#[derive(Clone, Copy)]
struct Chains<const R: usize, const V: usize> {
    k: usize,
    a: Rows,
    b: Columns,
    from: Option<Sums>,
    to: To,
}

impl<const R: usize, const V: usize> Chains<R, V> {
    /// One row after another, where this is no way that has to be fast.
    #[inline(always)]
    fn row_by_row<S: Simd>(self, s: S) {
        for i in 0..R {
            let row = |sums: Sums| Sums {
                data: sums.data.wrapping_add(i * sums.row_stride),
                ..sums
            };
            s.run(Chains::<1, V> {
                k: self.k,
                a: Rows {
                    data: self.a.data.wrapping_add(i * self.a.row_stride),
                    ..self.a
                },
                b: self.b,
                from: self.from.map(row),
                to: To {
                    data: self.to.data.wrapping_add(i * self.to.row_bytes),
                    ..self.to
                },
            });
        }
    }
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
    to: To,
) {
    let mut acc = [[s.zero(); V]; R];
    if let Some(from) = from {
        each_row!(i < R => {
            for (j, v) in acc[i].iter_mut().enumerate() {
                // SAFETY: the caller vouches for R rows of V vectors.
                *v = unsafe { s.load_ptr(from.data.add(i * from.row_stride + j * S::LANES)) };
            }
        });
    }
    // A pointer for every three rows: the rest is an address with a scaled stride. One for all would be a chain of additions.
    let mut a_p = [a.data; 5];
    for (g, p) in a_p.iter_mut().enumerate() {
        *p = a.data.wrapping_add(3 * g * a.row_stride);
    }
    let mut b_p = b.data;
    // No closure here: one that is not inlined is compiled without the token's features, at a hundredth of the speed.
    for _ in 0..k {
        // SAFETY: the caller vouches for k rows of V vectors, and for R rows of k elements.
        unsafe { step(s, &mut acc, a_p, a.row_stride, b_p) }
        // One step past the last element at the end, where nothing is read.
        for p in &mut a_p {
            *p = p.wrapping_add(a.k_stride);
        }
        b_p = b_p.wrapping_add(b.k_stride);
    }
    each_row!(i < R => {
        for (j, &v) in acc[i].iter().enumerate() {
            // SAFETY: the caller vouches for R rows of V vectors.
            unsafe {
                let row = to.data.add(i * to.row_bytes).cast::<f32>();
                s.store_ptr(row.add(j * S::LANES), v)
            }
        }
    });
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
    each_row!(i < R => {
        // SAFETY: the caller's promise.
        let x = s.splat(unsafe { *a[i / 3].add(i % 3 * row_stride) });
        for (v, column) in acc[i].iter_mut().zip(columns) {
            *v = s.fma(x, column, *v);
        }
    });
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

/// Takes finished sums to C: adds the bias, keeps the preactivation, applies the activation, narrows; or has a unit narrow them
/// ([`super::Product::narrowed_by`]).
///
/// # Safety
/// As [`widen_output`], with `from` readable and C's elements writable by nobody else.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd>(
    (s, narrow): (S, Option<PairUnit>),
    c: &Output,
    at: (usize, usize, usize),
    shape: (usize, usize),
    from: Sums,
) {
    match narrow {
        Some(unit) => {
            let to = (c.at(at).cast(), c.row_stride);
            let from = (from.data.cast_const(), from.row_stride);
            // SAFETY: the caller's promise.
            unsafe { unit.narrow(shape.into(), from, to) }
        }
        None => s.run(Finish { c, at, shape, from }),
    }
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
    /// The type is asked for once, not at each vector: for k of 768 that was 3 % of a product.
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        match self.c.dtype {
            DType::F32 => self.typed::<S, f32>(s),
            DType::Bf16 => self.typed::<S, bf16>(s),
            DType::F16 => self.typed::<S, f16>(s),
            DType::U32 => unreachable!("checked on entry"),
        }
    }
}

impl Finish<'_> {
    /// For C of type T.
    #[inline(always)]
    fn typed<S: Simd, T: Float>(self, s: S) {
        let Finish { c, from, .. } = self;
        let (batch, i, j) = self.at;
        let (rows, cols) = self.shape;
        for r in 0..rows {
            let to = c.at((batch, i + r, j));
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
                    store(s, (to, T::DTYPE), x, n, v);
                }
            }
        }
    }
}
