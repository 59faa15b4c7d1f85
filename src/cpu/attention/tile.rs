//! The one product inside attention: C = A B on tiles of f32 that sit in cache.
//!
//! A is read one element at a time and broadcast, so it may be transposed; B and C are rows of vectors. Each element of C
//! is one chain of fused multiply-adds over k, ascending, so neither the register block nor the instruction set shows.
//!
//! A row of B or C takes an odd number of cache lines ([`pitch`]): with rows of 2^n lines, a column of a tile would fall
//! into a few sets of the first cache and push itself out.

// Bounds are checked once for a whole tile; a check for each vector would cost as much as its arithmetic.
#![allow(unsafe_code)]

use crate::cpu::simd::{Kernel, Simd};

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

/// A tile to read: element (i, j) at i `row` + j `column`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row: usize,
    pub(super) column: usize,
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
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Product { m, n, k, .. } = self;
        assert!(n % LINE == 0, "columns come in whole lines");
        if m == 0 || n == 0 {
            return;
        }
        assert!(self.c.len() >= (m - 1) * self.c_pitch + n, "C is too small");
        if k > 0 {
            let reach = (m - 1) * self.a.row + (k - 1) * self.a.column;
            assert!(self.a.data.len() > reach, "A is too small");
            assert!(self.b.len() >= (k - 1) * self.b_pitch + n, "B is too small");
        }
        if let Start::Scaled(factors) = self.start {
            assert!(factors.len() >= m, "one factor a row");
        }
        let tile = Tile {
            k,
            a: self.a.data.as_ptr(),
            a_row: self.a.row,
            a_column: self.a.column,
            b: self.b.as_ptr(),
            b_pitch: self.b_pitch,
            c: self.c.as_mut_ptr(),
            c_pitch: self.c_pitch,
            start: self.start,
        };
        let mut j = 0;
        while j < n {
            // SAFETY: rows up to m and columns up to n were checked above.
            unsafe {
                j += match (S::LANES, n - j >= 2 * LINE) {
                    (16, true) => tile.columns::<S, 12, 2>(s, m, j),
                    (16, false) => tile.columns::<S, 12, 1>(s, m, j),
                    (8, _) => tile.columns::<S, 6, 2>(s, m, j),
                    _ => tile.columns::<S, 6, 4>(s, m, j),
                };
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Tile<'a> {
    k: usize,
    a: *const f32,
    a_row: usize,
    a_column: usize,
    b: *const f32,
    b_pitch: usize,
    c: *mut f32,
    c_pitch: usize,
    start: Start<'a>,
}

impl Tile<'_> {
    /// `V` vectors of columns from j, all m rows in blocks of `R`; gives the number of columns.
    ///
    /// # Safety
    /// The product has m rows and the columns from j on.
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize, const V: usize>(
        self,
        s: S,
        m: usize,
        j: usize,
    ) -> usize {
        let mut i = 0;
        // SAFETY: i + rows <= m in each call.
        unsafe {
            while i + R <= m {
                self.block::<S, R, V>(s, i, j);
                i += R;
            }
            while i + 4 <= m {
                self.block::<S, 4, V>(s, i, j);
                i += 4;
            }
            while i < m {
                self.block::<S, 1, V>(s, i, j);
                i += 1;
            }
        }
        V * S::LANES
    }

    /// # Safety
    /// The product has `R` rows from i and `V` vectors of columns from j.
    #[inline(always)]
    unsafe fn block<S: Simd, const R: usize, const V: usize>(self, s: S, i: usize, j: usize) {
        // SAFETY: every pointer below stays in rows i..i + R, columns j..j + V LANES and k, which the caller vouches for.
        unsafe {
            let c = self.c.add(i * self.c_pitch + j);
            let mut sums = [[s.zero(); V]; R];
            if !matches!(self.start, Start::Zero) {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = s.load_ptr(c.add(r * self.c_pitch + v * S::LANES));
                    }
                }
            }
            if let Start::Scaled(factors) = self.start {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let factor = s.splat(*factors.get_unchecked(i + r));
                    for sum in sums.iter_mut() {
                        *sum = s.mul(*sum, factor);
                    }
                }
            }
            let mut a = self.a.add(i * self.a_row);
            let mut b = self.b.add(j);
            for _ in 0..self.k {
                let mut row = [s.zero(); V];
                for (v, x) in row.iter_mut().enumerate() {
                    *x = s.load_ptr(b.add(v * S::LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = s.splat(*a.add(r * self.a_row));
                    for (sum, &y) in sums.iter_mut().zip(&row) {
                        *sum = s.fma(x, y, *sum);
                    }
                }
                // The last step may point past the end, where nothing is read.
                a = a.wrapping_add(self.a_column);
                b = b.wrapping_add(self.b_pitch);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    s.store_ptr(c.add(r * self.c_pitch + v * S::LANES), *sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, dispatch};

    #[test]
    fn a_product_is_a_chain_for_every_shape_and_touches_nothing_else() {
        for isa in Isa::available() {
            for (m, n, k) in [
                (0, 16, 3),
                (1, 16, 0),
                (1, 16, 1),
                (5, 32, 7),
                (12, 48, 2),
                (23, 64, 3),
            ] {
                for transposed in [false, true] {
                    for start in 0..3 {
                        case(isa, m, n, k, transposed, start);
                    }
                }
            }
        }
    }

    fn case(isa: Isa, m: usize, n: usize, k: usize, transposed: bool, start: usize) {
        let value = |i: usize, salt: usize| ((i * 37 + salt * 11) % 101) as f32 / 17.0 - 2.5;
        let (b_pitch, c_pitch) = (n + 3, n + 5);
        let a: Vec<f32> = (0..m * k).map(|i| value(i, 1)).collect();
        let b: Vec<f32> = (0..k * b_pitch).map(|i| value(i, 2)).collect();
        let factors: Vec<f32> = (0..m).map(|i| value(i, 3)).collect();
        let old: Vec<f32> = (0..m * c_pitch).map(|i| value(i, 4)).collect();
        let (row, column) = if transposed { (1, m) } else { (k, 1) };
        let mut c = old.clone();
        let start_kind = [Start::Zero, Start::Resume, Start::Scaled(&factors)][start];
        let a_left = Left {
            data: &a,
            row,
            column,
        };
        let product = Product {
            m,
            n,
            k,
            a: a_left,
            b: &b,
            b_pitch,
            c: &mut c,
            c_pitch,
            start: start_kind,
        };
        dispatch(isa, product);
        for (at, &got) in c.iter().enumerate() {
            let (i, j) = (at / c_pitch, at % c_pitch);
            let mut want = old[at];
            if j < n {
                want = [0.0, want, want * factors[i]][start];
                for p in 0..k {
                    want = a[i * row + p * column].mul_add(b[p * b_pitch + j], want);
                }
            }
            assert!(got == want, "{isa:?} ({i}, {j}): {got}, not {want}");
        }
    }
}
