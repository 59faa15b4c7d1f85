//! Softmax over rows, and its gradient.

use super::driver::{Run, over_rows};
use super::lanes::{fold, map, sums, transform, widen, written};
use super::parallel::Out;
use crate::dtype::{Slice, SliceMut};
use crate::polynomial::exp_normal;
use crate::simd::Simd;
use std::ops::Range;

/// y[i, j] = e^(x[i, j] - max over j of x[i, j]) / its sum over j. x, y: [r, c]. Panics unless c divides the length.
pub fn softmax(x: Slice, c: usize, y: SliceMut) {
    assert_eq!(x.len(), y.len(), "x and y differ in length");
    if x.is_empty() {
        return;
    }
    assert_eq!(x.len() % c, 0, "x is not [r, {c}]");
    let out = Out { data: y, width: c };
    over_rows(&Softmax { c, x }, x.len() / c, c, 2 * c, out);
}

struct Softmax<'a> {
    c: usize,
    x: Slice<'a>,
}

impl<'a> Run<Out<'a>> for Softmax<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut y: Out<'a>, scratch: &mut [f32]) {
        let c = self.c;
        let (wide, powers) = scratch.split_at_mut(c);
        for (i, row) in range.enumerate() {
            let x = widen(s, self.x, row * c..(row + 1) * c, wide);
            let none = f32::NEG_INFINITY;
            // Blind for NaN: one anywhere makes the sum NaN, and with it the whole row.
            let [lanes] = fold(
                s,
                [x],
                [none],
                [none],
                #[inline(always)]
                |[x], [m]| [s.max(x, m)],
            );
            let m = s.splat(lanes.into_iter().fold(none, f32::max));
            transform::<S, f32, false, 1, 1>(
                s,
                [x],
                [&mut *powers],
                #[inline(always)]
                |[x], _| [exp_normal(s, s.sub(x, m))],
            );
            let [sum] = sums(
                s,
                [&*powers],
                #[inline(always)]
                |[x], [sum]| [s.add(sum, x)],
            );
            let factor = s.splat(1.0 / sum);
            written(
                s,
                &mut y.data,
                i * c..(i + 1) * c,
                wide,
                #[inline(always)]
                |y| {
                    map(
                        s,
                        [&*powers],
                        y,
                        #[inline(always)]
                        |[x]| s.mul(x, factor),
                    );
                },
            );
        }
    }
}

/// dx = y dy - y sum over j of y dy, in f32 and rounded once. All [r, c]. Panics unless c divides the lengths.
pub fn softmax_backward(y: Slice, dy: Slice, c: usize, dx: SliceMut) {
    assert!(
        [dy.len(), dx.len()] == [y.len(); 2],
        "y, dy and dx differ in length"
    );
    if y.is_empty() {
        return;
    }
    assert_eq!(y.len() % c, 0, "y is not [r, {c}]");
    let out = Out { data: dx, width: c };
    over_rows(&Backward { c, y, dy }, y.len() / c, c, 3 * c, out);
}

struct Backward<'a> {
    c: usize,
    y: Slice<'a>,
    dy: Slice<'a>,
}

impl<'a> Run<Out<'a>> for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut dx: Out<'a>, scratch: &mut [f32]) {
        let c = self.c;
        let (wide_y, rest) = scratch.split_at_mut(c);
        let (wide_dy, narrow) = rest.split_at_mut(c);
        for (i, row) in range.enumerate() {
            let y = widen(s, self.y, row * c..(row + 1) * c, wide_y);
            let dy = widen(s, self.dy, row * c..(row + 1) * c, wide_dy);
            let [sum] = sums(
                s,
                [y, dy],
                #[inline(always)]
                |[y, dy], [sum]| [s.add(sum, s.mul(y, dy))],
            );
            let sum = s.splat(sum);
            written(
                s,
                &mut dx.data,
                i * c..(i + 1) * c,
                narrow,
                #[inline(always)]
                |dx| {
                    map(
                        s,
                        [y, dy],
                        dx,
                        #[inline(always)]
                        |[y, dy]| s.neg_fma(sum, y, s.mul(y, dy)),
                    );
                },
            );
        }
    }
}
