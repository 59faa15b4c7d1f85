//! The one product inside attention: C = A B on tiles of f32 that sit in cache.
//!
//! A is read one element at a time and broadcast, so it may be transposed; B and C are rows of vectors. Each element of C
//! is one chain of fused multiply-adds over k, ascending, so neither the register block nor the instruction set shows.
//!
//! A row of B or C takes an odd number of cache lines ([`pitch`]): with rows of 2^n lines, a column of a tile would fall
//! into a few sets of the first cache and push itself out.

//! On a Xeon with two 512-bit units (240 GFLOP/s a core by the peak's loop) products of 64 x 64 x 64 in the first cache run at 190 to
//! 208 GFLOP/s with four vectors of columns by six rows and four steps of k between branches; three vectors by eight rows 196,
//! two by eight 174, one by sixteen 143. On AVX2 six rows by two vectors give 107 to 120 of 120.

// Bounds are checked once for a whole tile; a check for each vector would cost as much as its arithmetic.
#![allow(unsafe_code)]

#[cfg(test)]
mod tests;

use crate::polynomial::exp2_above;
use crate::simd::{Kernel, Simd};

/// f32 of a cache line: columns come in whole lines.
pub(super) const LINE: usize = 16;

/// Columns of a tile that hold `columns`, in whole lines.
pub(super) const fn padded(columns: usize) -> usize {
    columns.next_multiple_of(LINE)
}

/// Distance between the rows of a tile of `columns`: an odd number of lines.
pub(super) const fn pitch(columns: usize) -> usize {
    let lines = columns.div_ceil(LINE);
    (lines | 1) * LINE
}

/// What the chains start from.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// 0; C is not read.
    Zero,
    /// C.
    Resume,
    /// C with each row multiplied by its factor.
    Scaled(&'a [f32]),
}

/// A tile to read: rows `pitch` apart. `transposed` says that its rows are A's columns.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) pitch: usize,
    pub(super) transposed: bool,
}

/// Rows of a band, which share one bound on what they see.
pub(super) const BAND: usize = 16;

/// The part of a product that masks leave. `ends` holds, for each band of query rows, the end of the keys that its last row
/// sees, ascending: what lies beyond is neither read nor written. Bands belong to the op, not to the machine.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    /// Rows are keys, columns are query rows: whole bands of columns from the first one that sees a key of the band.
    Scores(&'a [usize]),
    /// Rows are query rows, k counts keys, up to the band's end.
    Keys(&'a [usize]),
    /// Rows are keys, k counts query rows, from the first band that sees a key of the band of rows.
    Queries(&'a [usize]),
}

/// First query row of the first band that sees key j.
#[inline(always)]
pub(super) fn first_row(ends: &[usize], j: usize) -> usize {
    ends.iter().take_while(|&&end| end <= j).count() * BAND
}

/// C (m x n) = start + A (m x k) B (k x n); n in whole lines, B and C with rows `b_pitch` and `c_pitch` apart.
pub(super) struct Product<'a> {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a: Left<'a>,
    pub(super) b: &'a [f32],
    pub(super) b_pitch: usize,
    pub(super) c: &'a mut [f32],
    pub(super) c_pitch: usize,
    pub(super) start: Start<'a>,
    pub(super) part: Part<'a>,
}

impl Product<'_> {
    /// Panics unless the operands hold what the shape says.
    #[inline(always)]
    fn check(&self) {
        let (m, n, k) = (self.m, self.n, self.k);
        assert!(n % LINE == 0, "columns come in whole lines");
        if m == 0 || n == 0 {
            return;
        }
        assert!(self.c.len() >= (m - 1) * self.c_pitch + n, "C is too small");
        if k > 0 {
            let (rows, columns) = if self.a.transposed { (k, m) } else { (m, k) };
            let reach = (rows - 1) * self.a.pitch + columns;
            assert!(self.a.data.len() >= reach, "A is too small");
            assert!(self.b.len() >= (k - 1) * self.b_pitch + n, "B is too small");
        }
    }
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Product { m, n, k, .. } = self;
        self.check();
        if m == 0 || n == 0 {
            return;
        }
        if let Start::Scaled(factors) = self.start {
            assert!(factors.len() >= m, "one factor a row");
        }
        for i in (0..m).step_by(BAND) {
            let rows = BAND.min(m - i);
            let (columns, depth) = match self.part {
                Part::Scores(ends) => (first_row(ends, i).min(n), 0..k),
                Part::Keys(ends) => (0, 0..ends[i / BAND].min(k)),
                Part::Queries(ends) => (0, first_row(ends, i).min(k)..k),
            };
            let a_at = if self.a.transposed {
                depth.start * self.a.pitch + i
            } else {
                i * self.a.pitch + depth.start
            };
            let band = Band {
                k: depth.len(),
                a: self.a.data.as_ptr().wrapping_add(a_at),
                a_pitch: self.a.pitch,
                b: self.b.as_ptr().wrapping_add(depth.start * self.b_pitch),
                b_pitch: self.b_pitch,
                c: self.c.as_mut_ptr().wrapping_add(i * self.c_pitch),
                c_pitch: self.c_pitch,
                factors: match self.start {
                    Start::Scaled(factors) => &factors[i..i + rows],
                    _ => &[],
                },
                fresh: matches!(self.start, Start::Zero),
                powers: None,
            };
            // SAFETY: rows i.. and columns up to n lie in C, and with k in A and B, as checked above.
            unsafe {
                if self.a.transposed {
                    band.run::<S, true, false>(s, rows, columns..n);
                } else {
                    band.run::<S, false, false>(s, rows, columns..n);
                }
            }
        }
    }
}

/// A product whose rows are keys and columns query rows, all of them seen; instead of it 2^(element - base of the column) is left in C.
pub(super) struct Powers<'a> {
    pub(super) product: Product<'a>,
    pub(super) columns: Columns<'a>,
}

/// What belongs to the columns of [`Powers`].
pub(super) struct Columns<'a> {
    /// Integral, and at most 2^20 in size ([`exp2_above`]).
    pub(super) base: &'a [f32],
    /// Sums of the powers over the rows, in ascending order, are added.
    pub(super) sum: &'a mut [f32],
    /// Raised to the greatest element of the product.
    pub(super) most: &'a mut [f32],
}

impl Kernel for Powers<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Powers { product, columns } = self;
        product.check();
        let n = product.n;
        assert!(columns.base.len() >= n && columns.sum.len() >= n && columns.most.len() >= n);
        assert!(matches!(product.start, Start::Zero) && !product.a.transposed);
        let at = ColumnsAt {
            base: columns.base.as_ptr(),
            sum: columns.sum.as_mut_ptr(),
            most: columns.most.as_mut_ptr(),
        };
        for i in (0..product.m).step_by(BAND) {
            let rows = BAND.min(product.m - i);
            let band = Band {
                k: product.k,
                a: product.a.data.as_ptr().wrapping_add(i * product.a.pitch),
                a_pitch: product.a.pitch,
                b: product.b.as_ptr(),
                b_pitch: product.b_pitch,
                c: product.c.as_mut_ptr().wrapping_add(i * product.c_pitch),
                c_pitch: product.c_pitch,
                factors: &[],
                fresh: true,
                powers: Some(at),
            };
            // SAFETY: rows i.. and all columns lie in A, B, C and what belongs to the columns, as checked above.
            unsafe { band.run::<S, false, true>(s, rows, 0..n) }
        }
    }
}

/// [`Columns`] by address.
#[derive(Clone, Copy)]
struct ColumnsAt {
    base: *const f32,
    sum: *mut f32,
    most: *mut f32,
}

/// At most `BAND` rows of a product; pointers stand at the band's first row, B's at its first column.
#[derive(Clone, Copy)]
struct Band<'a> {
    k: usize,
    a: *const f32,
    a_pitch: usize,
    b: *const f32,
    b_pitch: usize,
    c: *mut f32,
    c_pitch: usize,
    factors: &'a [f32],
    fresh: bool,
    powers: Option<ColumnsAt>,
}

impl Band<'_> {
    /// # Safety
    /// The product has these rows and columns; `T` says whether A is transposed, `P` whether powers are wanted.
    #[inline(always)]
    unsafe fn run<S: Simd, const T: bool, const P: bool>(
        self,
        s: S,
        rows: usize,
        columns: std::ops::Range<usize>,
    ) {
        let mut j = columns.start;
        while j < columns.end {
            // SAFETY: the caller's promise: columns end in whole lines.
            unsafe {
                // Constant conditions: a block that this instruction set does not use is not compiled.
                j += if const { S::LANES == 16 } {
                    // Pieces of equal width: a lone vector would wait for its broadcasts.
                    let lines = (columns.end - j) / LINE;
                    match lines.div_ceil(lines.div_ceil(4)) {
                        1 => self.columns::<S, T, P, 16, 1>(s, rows, j),
                        2 => self.columns::<S, T, P, 8, 2>(s, rows, j),
                        3 => self.columns::<S, T, P, 8, 3>(s, rows, j),
                        _ => self.columns::<S, T, P, 6, 4>(s, rows, j),
                    }
                } else if const { S::ROW_BY_ROW } {
                    self.columns::<S, T, P, 2, 1>(s, rows, j)
                } else if const { S::LANES == 8 } {
                    self.columns::<S, T, P, 6, 2>(s, rows, j)
                } else {
                    self.columns::<S, T, P, 6, 4>(s, rows, j)
                };
            }
        }
    }

    /// `V` vectors of columns from j, all rows in blocks of at most `R`; gives the number of columns.
    ///
    /// # Safety
    /// The product has these rows and the columns from j on.
    #[inline(always)]
    unsafe fn columns<S: Simd, const T: bool, const P: bool, const R: usize, const V: usize>(
        self,
        s: S,
        rows: usize,
        j: usize,
    ) -> usize {
        let mut i = 0;
        while i < rows {
            let left = rows - i;
            // A constant condition keeps the compiler from generating blocks beyond R. Not every number of rows has a block of
            // its own: with all of them the compiler spent a third of its time here.
            macro_rules! of_rows {
                ($($r:literal)*) => {
                    $(if const { $r <= R } {
                        if $r <= left {
                            // SAFETY: i + r <= rows.
                            unsafe { self.block::<S, T, P, $r, V>(s, i, j) }
                            i += $r;
                            continue;
                        }
                    })*
                };
            }
            of_rows!(16 8 6 4 2 1);
        }
        V * S::LANES
    }

    /// # Safety
    /// The product has `R` rows from i and `V` vectors of columns from j.
    #[inline(always)]
    unsafe fn block<S: Simd, const T: bool, const P: bool, const R: usize, const V: usize>(
        self,
        s: S,
        i: usize,
        j: usize,
    ) {
        // SAFETY: every pointer below stays in rows i..i + R, columns j..j + V LANES and k, which the caller vouches for.
        unsafe {
            let c = self.c.add(i * self.c_pitch + j);
            let mut sums = [[s.zero(); V]; R];
            if !self.fresh {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = s.load_ptr(c.add(r * self.c_pitch + v * S::LANES));
                    }
                }
            }
            if !self.factors.is_empty() {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let factor = s.splat(*self.factors.get_unchecked(i + r));
                    for sum in sums.iter_mut() {
                        *sum = s.mul(*sum, factor);
                    }
                }
            }
            // A pointer a row: one for all would be a chain of additions as long as the products.
            let mut a = [self.a; R];
            for (r, a) in a.iter_mut().enumerate() {
                let row = i + r;
                *a = self
                    .a
                    .wrapping_add(if T { row } else { row * self.a_pitch });
            }
            let b = self.b.add(j);
            let mut p = 0;
            while p + UNROLLED <= self.k {
                for p in p..p + UNROLLED {
                    self.step::<S, T, R, V>(s, &a, b, p, &mut sums);
                }
                p += UNROLLED;
            }
            for p in p..self.k {
                self.step::<S, T, R, V>(s, &a, b, p, &mut sums);
            }
            if let (true, Some(columns)) = (P, self.powers) {
                powers(s, columns, j, &mut sums);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    s.store_ptr(c.add(r * self.c_pitch + v * S::LANES), *sum);
                }
            }
        }
    }
}

/// Turns elements into powers, and counts them in.
///
/// # Safety
/// V vectors from j on belong to the columns.
#[inline(always)]
unsafe fn powers<S: Simd, const R: usize, const V: usize>(
    s: S,
    columns: ColumnsAt,
    j: usize,
    x: &mut [[S::V; V]; R],
) {
    // Written out: what a loop counts through lies in memory, not in registers, and all products with it.
    macro_rules! each {
        ($i:ident < $limit:ident: $($at:literal)* => $body:block) => {
            $(if const { $at < $limit } {
                let $i: usize = $at;
                $body
            })*
        };
    }
    each!(v < V: 0 1 2 3 => {
        let at = j + v * S::LANES;
        // SAFETY: the caller's promise.
        let (base, mut sum, mut most) = unsafe {
            (
                s.load_ptr(columns.base.add(at)),
                s.load_ptr(columns.sum.add(at)),
                s.load_ptr(columns.most.add(at)),
            )
        };
        each!(r < R: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => {
            most = s.max(most, x[r][v]);
            x[r][v] = exp2_above(s, x[r][v], base);
            sum = s.add(sum, x[r][v]);
        });
        // SAFETY: as above.
        unsafe {
            s.store_ptr(columns.sum.add(at), sum);
            s.store_ptr(columns.most.add(at), most);
        }
    });
}

/// Steps of k between two branches.
const UNROLLED: usize = 4;

impl Band<'_> {
    /// One step of all chains.
    ///
    /// # Safety
    /// Row p of B from `b` on, and element p of the rows of A, exist.
    #[inline(always)]
    unsafe fn step<S: Simd, const T: bool, const R: usize, const V: usize>(
        self,
        s: S,
        a: &[*const f32; R],
        b: *const f32,
        p: usize,
        sums: &mut [[S::V; V]; R],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let b = b.add(p * self.b_pitch);
            let mut row = [s.zero(); V];
            for (v, x) in row.iter_mut().enumerate() {
                *x = s.load_ptr(b.add(v * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = s.splat(*if T {
                    a[0].add(p * self.a_pitch + r)
                } else {
                    a[r].add(p)
                });
                for (sum, &y) in sums.iter_mut().zip(&row) {
                    *sum = s.fma(x, y, *sum);
                }
            }
        }
    }
}
