//! Layer norm (Ba, Kiros, Hinton 2016) and RMS norm (Zhang, Sennrich 2019) over rows of c elements.
//!
//! Both are one kernel: RMS norm is layer norm that takes the mean for 0 and has no bias. The variance is the mean of
//! squared differences from the mean (two passes over a row that sits in the first cache), because the difference of mean
//! square and squared mean loses all digits when the mean is large.

mod backward;

use super::driver::{Run, over_rows};
use super::lanes::{fold, map, sums, tree_sum, widen, written};
use super::parallel::Out;
use crate::Accum;
use crate::dtype::{Slice, SliceMut};
use crate::simd::Simd;
use backward::backward;
use std::ops::Range;

/// y = (x - mean) rstd weight + bias per row, with mean = sum x / c, rstd = 1 / sqrt(sum (x - mean)^2 / c + eps).
///
/// x, y: `[r, c]`; weight, bias: `[c]`, taken for 1 and 0 if absent; mean, rstd: `[r]`, written. Panics on other lengths.
pub fn layer_norm(
    x: Slice,
    weight: Option<Slice>,
    bias: Option<Slice>,
    eps: f32,
    y: SliceMut,
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    assert_eq!(mean.len(), rstd.len(), "one mean and one rstd a row");
    forward(x, weight, bias, eps, y, Some(mean), rstd);
}

/// y = x rstd weight per row, with rstd = 1 / sqrt(sum x^2 / c + eps).
///
/// x, y: `[r, c]`; weight: `[c]`, taken for 1 if absent; rstd: `[r]`, written. Panics on other lengths.
pub fn rms_norm(x: Slice, weight: Option<Slice>, eps: f32, y: SliceMut, rstd: &mut [f32]) {
    forward(x, weight, None, eps, y, None, rstd);
}

/// The gradients of [`layer_norm`]: with h = (x - mean) rstd and g = dy weight,
/// dx = rstd (g - sum g / c - h sum (g h) / c), dweight = sum over rows of dy h, dbias = sum over rows of dy.
///
/// Each is computed if given. Panics on lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn layer_norm_backward(
    dy: Slice,
    x: Slice,
    weight: Option<Slice>,
    mean: &[f32],
    rstd: &[f32],
    dx: Option<SliceMut>,
    dweight: Option<(&mut [f32], Accum)>,
    dbias: Option<(&mut [f32], Accum)>,
) {
    assert_eq!(mean.len(), rstd.len(), "one mean and one rstd a row");
    backward(dy, x, weight, Some(mean), rstd, dx, dweight, dbias);
}

/// The gradients of [`rms_norm`]: with h = x rstd and g = dy weight, dx = rstd (g - h sum (g h) / c),
/// dweight = sum over rows of dy h. Each is computed if given. Panics on lengths that do not fit.
pub fn rms_norm_backward(
    dy: Slice,
    x: Slice,
    weight: Option<Slice>,
    rstd: &[f32],
    dx: Option<SliceMut>,
    dweight: Option<(&mut [f32], Accum)>,
) {
    backward(dy, x, weight, None, rstd, dx, dweight, None);
}

/// Elements a row. Panics unless `x` has `rows` whole rows.
fn width(x: Slice, rows: usize) -> usize {
    let c = x.len().checked_div(rows).unwrap_or(0);
    assert_eq!(
        x.len(),
        rows * c,
        "{} elements are not {rows} rows",
        x.len()
    );
    c
}

fn forward(
    x: Slice,
    weight: Option<Slice>,
    bias: Option<Slice>,
    eps: f32,
    y: SliceMut,
    mean: Option<&mut [f32]>,
    rstd: &mut [f32],
) {
    let rows = rstd.len();
    let c = width(x, rows);
    assert_eq!(y.len(), x.len(), "x and y differ in length");
    for p in [weight, bias].into_iter().flatten() {
        assert!(rows == 0 || p.len() == c, "a parameter is not [c]");
    }
    if c == 0 {
        return;
    }
    let kernel = Forward {
        c,
        eps,
        x,
        weight,
        bias,
    };
    let out = (Out { data: y, width: c }, mean, rstd);
    over_rows(&kernel, rows, c, 4 * c, out);
}

struct Forward<'a> {
    c: usize,
    eps: f32,
    x: Slice<'a>,
    weight: Option<Slice<'a>>,
    bias: Option<Slice<'a>>,
}

type ForwardOut<'a> = (Out<'a>, Option<&'a mut [f32]>, &'a mut [f32]);

impl<'a> Run<ForwardOut<'a>> for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        s: S,
        range: Range<usize>,
        (mut y, mut means, rstds): ForwardOut<'a>,
        scratch: &mut [f32],
    ) {
        let c = self.c;
        let (weight, rest) = scratch.split_at_mut(c);
        let (bias, rest) = rest.split_at_mut(c);
        let (wide, narrow) = rest.split_at_mut(c);
        let weight = parameter(s, self.weight, 1.0, weight);
        let bias = parameter(s, self.bias, 0.0, bias);
        let shifted = self.bias.is_some();
        for (i, row) in range.enumerate() {
            let x = widen(s, self.x, row * c..(row + 1) * c, wide);
            let mut mean = 0.0;
            if let Some(means) = &mut means {
                let [sum] = sums(
                    s,
                    [x],
                    #[inline(always)]
                    |[x], [sum]| [s.add(sum, x)],
                );
                mean = sum / c as f32;
                means[i] = mean;
            }
            let m = s.splat(mean);
            let rstd = 1.0 / (squares(s, x, mean) / c as f32 + self.eps).sqrt();
            rstds[i] = rstd;
            let r = s.splat(rstd);
            written(
                s,
                &mut y.data,
                i * c..(i + 1) * c,
                narrow,
                #[inline(always)]
                |y| {
                    if shifted {
                        map(
                            s,
                            [x, weight, bias],
                            y,
                            #[inline(always)]
                            |[x, w, b]| s.fma(s.mul(s.sub(x, m), r), w, b),
                        );
                    } else {
                        // Without a bias nothing is added, so that a negative zero stays one.
                        map(
                            s,
                            [x, weight],
                            y,
                            #[inline(always)]
                            |[x, w]| s.mul(s.mul(s.sub(x, m), r), w),
                        );
                    }
                },
            );
        }
    }
}

/// The sum of (x - m)^2. Missing elements of a ragged group stand for m, hence add nothing.
#[inline(always)]
fn squares<S: Simd>(s: S, x: &[f32], mean: f32) -> f32 {
    let m = s.splat(mean);
    let [lanes] = fold(
        s,
        [x],
        [mean],
        [0.0],
        #[inline(always)]
        |[x], [sum]| {
            let d = s.sub(x, m);
            [s.fma(d, d, sum)]
        },
    );
    tree_sum(lanes)
}

/// A parameter in f32: where it lies, or in `to`.
#[inline(always)]
fn parameter<'a, S: Simd>(
    s: S,
    x: Option<Slice<'a>>,
    otherwise: f32,
    to: &'a mut [f32],
) -> &'a [f32] {
    match x {
        Some(x) => widen(s, x, 0..x.len(), to),
        None => {
            to.fill(otherwise);
            to
        }
    }
}
