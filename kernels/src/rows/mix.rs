//! Rows made of other rows: each result is a sum of few picked rows, each times a number. Dispatch and combine of a mixture
//! of experts, and the gradients of both, are this one loop.

use super::driver::{Run, over_rows};
use super::lanes::{sums, update, widen, written};
use super::parallel::{Out, part, part_mut};
use crate::dtype::{Slice, SliceMut};
use crate::simd::Simd;
use std::ops::Range;

/// A row to take and what to multiply it by.
pub type Picked = Option<(usize, f32)>;

/// `y[i] = sum over j < k of factor x[row]` with `(row, factor) = pick(i, j)`, one chain of fused multiply-adds from 0 over
/// ascending j; picks of nothing are left out. x: [r, c], y: [n, c], any float types.
///
/// Panics unless c divides the lengths.
pub fn mix(
    x: Slice,
    c: usize,
    k: usize,
    pick: impl Fn(usize, usize) -> Picked + Sync,
    y: SliceMut,
) {
    if y.is_empty() {
        return;
    }
    assert_eq!([x.len() % c, y.len() % c], [0, 0], "rows are not of {c}");
    let rows = y.len() / c;
    let out = Out { data: y, width: c };
    over_rows(&Mix { c, k, x, pick }, rows, c * k, 2 * c, out);
}

struct Mix<'a, F> {
    c: usize,
    k: usize,
    x: Slice<'a>,
    pick: F,
}

impl<'a, F: Fn(usize, usize) -> Picked + Sync> Run<Out<'a>> for Mix<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut y: Out<'a>, scratch: &mut [f32]) {
        let c = self.c;
        let (wide, narrow) = scratch.split_at_mut(c);
        for (at, i) in range.enumerate() {
            written(
                s,
                &mut y.data,
                at * c..(at + 1) * c,
                narrow,
                #[inline(always)]
                |y| {
                    y.fill(0.0);
                    for j in 0..self.k {
                        let Some((row, factor)) = (self.pick)(i, j) else {
                            continue;
                        };
                        let x = widen(s, self.x, row * c..(row + 1) * c, wide);
                        let factor = s.splat(factor);
                        update(
                            s,
                            [x],
                            y,
                            #[inline(always)]
                            |[x], y| s.fma(factor, x, y),
                        );
                    }
                },
            );
        }
    }
}

/// `y[i, j] = sum over c of a[i] x[row]` with `(row, _) = pick(i, j)`, 0 for a pick of nothing: a: [n, c], x: [r, c],
/// y: [n, k] in f32.
///
/// Panics unless c divides the lengths.
pub fn mix_dots(
    a: Slice,
    x: Slice,
    [c, k]: [usize; 2],
    pick: impl Fn(usize, usize) -> Picked + Sync,
    y: &mut [f32],
) {
    if y.is_empty() {
        return;
    }
    assert!(c > 0, "rows are empty");
    assert_eq!([a.len() % c, x.len() % c], [0, 0], "rows are not of {c}");
    assert_eq!(y.len(), a.len() / c * k, "y is not [n, {k}]");
    let out = Out {
        data: SliceMut::F32(y),
        width: k,
    };
    over_rows(&Dots { c, k, a, x, pick }, a.len() / c, c * k, 2 * c, out);
}

struct Dots<'a, F> {
    c: usize,
    k: usize,
    a: Slice<'a>,
    x: Slice<'a>,
    pick: F,
}

impl<'a, F: Fn(usize, usize) -> Picked + Sync> Run<Out<'a>> for Dots<'_, F> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut y: Out<'a>, scratch: &mut [f32]) {
        let (c, k) = (self.c, self.k);
        let (wide_a, wide_x) = scratch.split_at_mut(c);
        for (at, i) in range.enumerate() {
            let a = widen(s, self.a, i * c..(i + 1) * c, wide_a);
            let row_of_y = part_mut(&mut y.data, at * k..(at + 1) * k).typed::<f32>();
            for (j, y) in row_of_y.iter_mut().enumerate() {
                let Some((row, _)) = (self.pick)(i, j) else {
                    *y = 0.0;
                    continue;
                };
                let x = widen(s, part(self.x, row * c..(row + 1) * c), 0..c, wide_x);
                let [sum] = sums(
                    s,
                    [a, x],
                    #[inline(always)]
                    |[a, x], [sum]| [s.fma(a, x, sum)],
                );
                *y = sum;
            }
        }
    }
}
