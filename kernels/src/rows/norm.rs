//! Layer norm (Ba, Kiros, Hinton 2016) and RMS norm (Zhang, Sennrich 2019) over rows of c elements.
//!
//! Both are one kernel: RMS norm is layer norm that takes the mean for 0 and has no bias. The variance is the mean of
//! squared differences from the mean (two passes over a row that sits in the first cache), because the difference of mean
//! square and squared mean loses all digits when the mean is large. Rows at the ends of f32 are scaled by a power of two first.

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
    over_rows(&kernel, rows, c, 5 * c, out);
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
        let (wide, rest) = rest.split_at_mut(c);
        let (narrow, near) = rest.split_at_mut(c);
        let weight = parameter(s, self.weight, 1.0, weight);
        let bias = parameter(s, self.bias, 0.0, bias);
        let shifted = self.bias.is_some();
        for (i, row) in range.enumerate() {
            let x = widen(s, self.x, row * c..(row + 1) * c, wide);
            let (mean, variance) = moments(s, x, means.is_some());
            let v = variance + self.eps;
            let (mut x, mut row_of) = (x, Row::plain(mean, v));
            if !(SMALLEST..f32::INFINITY).contains(&v) {
                (x, row_of) = self.far(s, x, means.is_some(), near);
            }
            if let Some(means) = &mut means {
                means[i] = row_of.mean;
            }
            rstds[i] = row_of.rstd;
            let (m, r) = (s.splat(row_of.subtract), s.splat(row_of.factor));
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

/// What a row's results are made with: y = (x - subtract) factor weight + bias.
struct Row {
    mean: f32,
    rstd: f32,
    subtract: f32,
    factor: f32,
}

impl Row {
    #[inline(always)]
    fn plain(mean: f32, v: f32) -> Self {
        let rstd = 1.0 / v.sqrt();
        Row {
            mean,
            rstd,
            subtract: mean,
            factor: rstd,
        }
    }
}

/// Below this the sum of squares may have lost digits to subnormal numbers.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);

/// Its inverse is the greatest f32.
const SMALLEST_ROOT: f64 = 1.0 / f32::MAX as f64;

impl Forward<'_> {
    /// A row whose squares leave the range of f32 (elements beyond 1e18, or below 1e-15 with eps as small): multiplied by the
    /// power of two, into `near`, that brings its greatest element to about 1.
    #[inline(never)]
    fn far<'a, S: Simd>(
        &self,
        s: S,
        x: &[f32],
        centred: bool,
        near: &'a mut [f32],
    ) -> (&'a [f32], Row) {
        let greatest = x.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        let exponent = ((greatest.to_bits() >> 23) as i32 - 127).clamp(-126, 127);
        let scale = f64::from_bits(((1023 - exponent) as u64) << 52);
        for (near, x) in near.iter_mut().zip(x) {
            *near = x * scale as f32;
        }
        let (mean, variance) = moments(s, near, centred);
        // eps times the square of the scale may be beyond f32.
        let root = (f64::from(variance) + f64::from(self.eps) * scale * scale).sqrt();
        let row = Row {
            mean: (f64::from(mean) / scale) as f32,
            rstd: (scale / root) as f32,
            subtract: mean,
            // Finite, so that a row without deviation gives 0. A NaN stays.
            factor: if root < SMALLEST_ROOT {
                f32::MAX
            } else {
                (1.0 / root) as f32
            },
        };
        (near, row)
    }
}

/// Mean (0 unless `centred`) and variance around it of a row.
///
/// The first mean is off by a rounding of its sum, which is much where the elements lie far from 0 and near each other: the mean of
/// the differences from it, summed beside their squares, is added to it.
#[inline(always)]
fn moments<S: Simd>(s: S, x: &[f32], centred: bool) -> (f32, f32) {
    let c = x.len() as f32;
    if !centred {
        let [squares] = sums(
            s,
            [x],
            #[inline(always)]
            |[x], [sum]| [s.fma(x, x, sum)],
        );
        return (0.0, squares / c);
    }
    let [sum] = sums(
        s,
        [x],
        #[inline(always)]
        |[x], [sum]| [s.add(sum, x)],
    );
    let mean = sum / c;
    let m = s.splat(mean);
    // Missing elements of a ragged group stand for the mean, hence add nothing.
    let [rest, squares] = fold(
        s,
        [x],
        [mean],
        [0.0; 2],
        #[inline(always)]
        |[x], [sum, squares]| {
            let d = s.sub(x, m);
            [s.add(sum, d), s.fma(d, d, squares)]
        },
    )
    .map(tree_sum);
    let variance = (squares - rest * (rest / c)) / c;
    // A NaN stays.
    let variance = if variance < 0.0 { 0.0 } else { variance };
    (mean + rest / c, variance)
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
