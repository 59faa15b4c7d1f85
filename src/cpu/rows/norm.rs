//! Layer norm (Ba, Kiros, Hinton 2016) and RMS norm (Zhang, Sennrich 2019) over rows of c elements.
//!
//! Both are one kernel: RMS norm is layer norm that takes the mean for 0 and has no bias. The variance is the mean of
//! squared differences from the mean (two passes over a row that sits in the first cache), because the difference of mean
//! square and squared mean loses all digits when the mean is large.

use super::lanes::{map, sums, update, widen, widen_into, written};
use super::parallel::{Out, column_block, for_columns, for_rows};
use crate::cpu::Accum;
use crate::cpu::memory::with_scratch_f32;
use crate::cpu::simd::{Kernel, Simd, dispatch, isa};
use crate::dtype::{Slice, SliceMut};
use std::ops::Range;

/// y = (x - mean) rstd weight + bias per row, with mean = sum x / c, rstd = 1 / sqrt(sum (x - mean)^2 / c + eps).
///
/// x, y: [r, c]; weight, bias: [c], taken for 1 and 0 if absent; mean, rstd: [r], written. Panics on other lengths.
pub(crate) fn layer_norm(
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
/// x, y: [r, c]; weight: [c], taken for 1 if absent; rstd: [r], written. Panics on other lengths.
pub(crate) fn rms_norm(x: Slice, weight: Option<Slice>, eps: f32, y: SliceMut, rstd: &mut [f32]) {
    forward(x, weight, None, eps, y, None, rstd);
}

/// The gradients of [`layer_norm`]: with h = (x - mean) rstd and g = dy weight,
/// dx = rstd (g - sum g / c - h sum (g h) / c), dweight = sum over rows of dy h, dbias = sum over rows of dy.
///
/// Each is computed if given. Panics on lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub(crate) fn layer_norm_backward(
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
    if let Some(dx) = dx {
        input_gradient(dy, x, weight, Some(mean), rstd, dx);
    }
    if let Some((dweight, accum)) = dweight {
        weight_gradient(dy, x, Some(mean), rstd, dweight, accum);
    }
    if let Some((dbias, accum)) = dbias {
        super::reduce::column_sum(dy, dbias, accum);
    }
}

/// The gradients of [`rms_norm`]: with h = x rstd and g = dy weight, dx = rstd (g - h sum (g h) / c),
/// dweight = sum over rows of dy h. Each is computed if given. Panics on lengths that do not fit.
pub(crate) fn rms_norm_backward(
    dy: Slice,
    x: Slice,
    weight: Option<Slice>,
    rstd: &[f32],
    dx: Option<SliceMut>,
    dweight: Option<(&mut [f32], Accum)>,
) {
    if let Some(dx) = dx {
        input_gradient(dy, x, weight, None, rstd, dx);
    }
    if let Some((dweight, accum)) = dweight {
        weight_gradient(dy, x, None, rstd, dweight, accum);
    }
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
    let (rows, isa) = (rstd.len(), isa());
    let c = width(x, rows);
    assert_eq!(y.len(), x.len(), "x and y differ in length");
    for p in [weight, bias].into_iter().flatten() {
        assert!(rows == 0 || p.len() == c, "a parameter is not [c]");
    }
    if c == 0 {
        return;
    }
    let out = (Out { data: y, width: c }, mean, rstd);
    for_rows(rows, c, out, |range, (y, mean, rstd)| {
        with_scratch_f32(4 * c, |scratch| {
            dispatch(
                isa,
                Forward {
                    c,
                    eps,
                    x,
                    weight,
                    bias,
                    range,
                    y: y.data,
                    mean,
                    rstd,
                    scratch,
                },
            );
        });
    });
}

struct Forward<'a> {
    c: usize,
    eps: f32,
    x: Slice<'a>,
    weight: Option<Slice<'a>>,
    bias: Option<Slice<'a>>,
    range: Range<usize>,
    y: SliceMut<'a>,
    mean: Option<&'a mut [f32]>,
    rstd: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let c = self.c;
        let (weight, rest) = self.scratch.split_at_mut(c);
        let (bias, rest) = rest.split_at_mut(c);
        let (wide, narrow) = rest.split_at_mut(c);
        fill(s, self.weight, 1.0, weight);
        fill(s, self.bias, 0.0, bias);
        let shifted = self.bias.is_some();
        for (i, row) in self.range.enumerate() {
            let x = widen(s, self.x, row * c..(row + 1) * c, wide);
            let mut mean = 0.0;
            if let Some(means) = &mut self.mean {
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
            let [squares] = sums_centered(s, x, m);
            let rstd = 1.0 / (squares / c as f32 + self.eps).sqrt();
            self.rstd[i] = rstd;
            let r = s.splat(rstd);
            written(
                s,
                &mut self.y,
                i * c..(i + 1) * c,
                narrow,
                #[inline(always)]
                |y| {
                    map(
                        s,
                        [x, weight, bias],
                        y,
                        #[inline(always)]
                        |[x, w, b]| {
                            let h = s.mul(s.sub(x, m), r);
                            // Without a bias nothing is added, so that a negative zero stays one.
                            if shifted { s.fma(h, w, b) } else { s.mul(h, w) }
                        },
                    );
                },
            );
        }
    }
}

/// The sum of (x - m)^2. Missing elements of a ragged group stand for m, hence add nothing.
#[inline(always)]
fn sums_centered<S: Simd>(s: S, x: &[f32], m: S::V) -> [f32; 1] {
    let mut first = [0f32; super::lanes::GROUP];
    s.store(&mut first, m);
    super::lanes::fold(
        s,
        [x],
        [first[0]],
        [0.0],
        #[inline(always)]
        |[x], [sum]| {
            let d = s.sub(x, m);
            [s.fma(d, d, sum)]
        },
    )
    .map(super::lanes::tree_sum)
}

#[inline(always)]
fn fill<S: Simd>(s: S, x: Option<Slice>, otherwise: f32, to: &mut [f32]) {
    match x {
        Some(x) => widen_into(s, x, to),
        None => to.fill(otherwise),
    }
}

fn input_gradient(
    dy: Slice,
    x: Slice,
    weight: Option<Slice>,
    mean: Option<&[f32]>,
    rstd: &[f32],
    dx: SliceMut,
) {
    let (rows, isa) = (rstd.len(), isa());
    let c = width(x, rows);
    assert_eq!(dy.len(), x.len(), "x and dy differ in length");
    assert_eq!(dx.len(), x.len(), "x and dx differ in length");
    assert!(
        rows == 0 || weight.is_none_or(|w| w.len() == c),
        "the weight is not [c]"
    );
    if c == 0 {
        return;
    }
    for_rows(rows, c, Out { data: dx, width: c }, |range, dx| {
        with_scratch_f32(4 * c, |scratch| {
            dispatch(
                isa,
                InputGradient {
                    c,
                    dy,
                    x,
                    weight,
                    mean,
                    rstd,
                    range,
                    dx: dx.data,
                    scratch,
                },
            );
        });
    });
}

struct InputGradient<'a> {
    c: usize,
    dy: Slice<'a>,
    x: Slice<'a>,
    weight: Option<Slice<'a>>,
    mean: Option<&'a [f32]>,
    rstd: &'a [f32],
    range: Range<usize>,
    dx: SliceMut<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for InputGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let c = self.c;
        let (weight, rest) = self.scratch.split_at_mut(c);
        let (wide_x, rest) = rest.split_at_mut(c);
        let (wide_dy, narrow) = rest.split_at_mut(c);
        fill(s, self.weight, 1.0, weight);
        let count = c as f32;
        for (i, row) in self.range.enumerate() {
            let elements = row * c..(row + 1) * c;
            let x = widen(s, self.x, elements.clone(), wide_x);
            let dy = widen(s, self.dy, elements, wide_dy);
            let m = s.splat(self.mean.map_or(0.0, |mean| mean[row]));
            let r = s.splat(self.rstd[row]);
            let [sum_g, sum_gh] = sums(
                s,
                [x, dy, weight],
                #[inline(always)]
                |[x, dy, w], [g_sum, gh_sum]| {
                    let g = s.mul(dy, w);
                    let h = s.mul(s.sub(x, m), r);
                    [s.add(g_sum, g), s.fma(g, h, gh_sum)]
                },
            );
            // RMS norm has no mean, so none is taken out of its gradient.
            let mean_g = s.splat(self.mean.map_or(0.0, |_| sum_g / count));
            let mean_gh = s.splat(sum_gh / count);
            written(
                s,
                &mut self.dx,
                i * c..(i + 1) * c,
                narrow,
                #[inline(always)]
                |dx| {
                    map(
                        s,
                        [x, dy, weight],
                        dx,
                        #[inline(always)]
                        |[x, dy, w]| {
                            let h = s.mul(s.sub(x, m), r);
                            let g = s.sub(s.mul(dy, w), mean_g);
                            s.mul(s.neg_fma(h, mean_gh, g), r)
                        },
                    );
                },
            );
        }
    }
}

fn weight_gradient(
    dy: Slice,
    x: Slice,
    mean: Option<&[f32]>,
    rstd: &[f32],
    dweight: &mut [f32],
    accum: Accum,
) {
    let (rows, c, isa) = (rstd.len(), dweight.len(), isa());
    assert_eq!(dy.len(), x.len(), "x and dy differ in length");
    assert_eq!(x.len(), rows * c, "x is not [r, c]");
    let block = column_block(rows, c);
    for_columns(c, block, dweight, |columns, dweight| {
        with_scratch_f32(2 * columns.len(), |scratch| {
            dispatch(
                isa,
                WeightGradient {
                    c,
                    dy,
                    x,
                    mean,
                    rstd,
                    columns,
                    dweight,
                    accum,
                    scratch,
                },
            );
        });
    });
}

struct WeightGradient<'a> {
    c: usize,
    dy: Slice<'a>,
    x: Slice<'a>,
    mean: Option<&'a [f32]>,
    rstd: &'a [f32],
    columns: Range<usize>,
    dweight: &'a mut [f32],
    accum: Accum,
    scratch: &'a mut [f32],
}

impl Kernel for WeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (wide_x, wide_dy) = self.scratch.split_at_mut(self.columns.len());
        if self.accum == Accum::Replace {
            self.dweight.fill(0.0);
        }
        for (row, &rstd) in self.rstd.iter().enumerate() {
            let elements = row * self.c + self.columns.start..row * self.c + self.columns.end;
            let x = widen(s, self.x, elements.clone(), wide_x);
            let dy = widen(s, self.dy, elements, wide_dy);
            let m = s.splat(self.mean.map_or(0.0, |mean| mean[row]));
            let r = s.splat(rstd);
            update(
                s,
                [x, dy],
                self.dweight,
                #[inline(always)]
                |[x, dy], sum| s.fma(dy, s.mul(s.sub(x, m), r), sum),
            );
        }
    }
}
