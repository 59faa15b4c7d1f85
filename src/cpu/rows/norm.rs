//! Layer norm (Ba, Kiros, Hinton 2016) and RMS norm (Zhang, Sennrich 2019) over rows of c elements.
//!
//! Both are one kernel: RMS norm is layer norm that takes the mean for 0 and has no bias. The variance is the mean of
//! squared differences from the mean (two passes over a row that sits in the first cache), because the difference of mean
//! square and squared mean loses all digits when the mean is large.

use super::driver::{Run, over_columns, over_rows};
use super::lanes::{fold, map, sums, transform, tree_sum, widen, written};
use super::parallel::{Out, SMALL, part, part_mut};
use crate::cpu::Accum;
use crate::cpu::simd::Simd;
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
    backward(dy, x, weight, Some(mean), rstd, dx, dweight, dbias);
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

/// Elements of x for which the gradients of inputs and of parameters are computed in turn on one thread: x, dy and dx
/// stay in its second cache between the two.
const NEAR: usize = 32 * 1024;

/// All gradients, in one pass over memory: blocks of rows, for each block first dx by rows, then the sums by columns. A
/// column's sum stays one chain over all rows, because a block resumes where the one before ended.
#[allow(clippy::too_many_arguments)]
fn backward(
    dy: Slice,
    x: Slice,
    weight: Option<Slice>,
    mean: Option<&[f32]>,
    rstd: &[f32],
    mut dx: Option<SliceMut>,
    mut dweight: Option<(&mut [f32], Accum)>,
    mut dbias: Option<(&mut [f32], Accum)>,
) {
    let rows = rstd.len();
    let c = match dweight.iter().chain(&dbias).next() {
        Some((p, _)) => p.len(),
        None => width(x, rows),
    };
    assert_eq!(x.len(), rows * c, "x is not [{rows}, {c}]");
    assert_eq!(dy.len(), x.len(), "x and dy differ in length");
    if let Some(dx) = &dx {
        assert_eq!(dx.len(), x.len(), "x and dx differ in length");
    }
    for p in dweight.iter().chain(&dbias) {
        assert_eq!(p.0.len(), c, "a parameter's gradient is not [c]");
    }
    let fits = weight.is_none_or(|w| w.len() == c);
    assert!(rows == 0 || fits, "the weight is not [c]");
    if let Some((p, Accum::Replace)) = &mut dweight {
        p.fill(0.0);
    }
    if let Some((p, Accum::Replace)) = &mut dbias {
        p.fill(0.0);
    }
    if c == 0 {
        return;
    }
    // Threads meet twice a block, which costs microseconds: their blocks are longer, and come back from the third cache.
    let threads = rayon::current_num_threads();
    let elements = if threads == 1 {
        NEAR
    } else {
        8 * threads * NEAR
    };
    let elements = if dx.is_none() { usize::MAX } else { elements };
    let block = (elements / c).max(SMALL / c).max(1);
    for first in (0..rows).step_by(block) {
        let last = first.saturating_add(block).min(rows);
        let range = first * c..last * c;
        let kernel = Backward {
            c,
            dy: part(dy, range.clone()),
            x: part(x, range.clone()),
            weight,
            mean: mean.map(|m| &m[first..last]),
            rstd: &rstd[first..last],
        };
        if let Some(dx) = &mut dx {
            let data = part_mut(dx, range);
            over_rows(&kernel, last - first, c, 4 * c, Out { data, width: c });
        }
        let dweight = dweight.as_mut().map(|(p, _)| &mut **p);
        let dbias = dbias.as_mut().map(|(p, _)| &mut **p);
        match (dweight, dbias) {
            (Some(w), Some(b)) => over_columns(&kernel, last - first, c, 2 * STRIP, [w, b]),
            (Some(w), None) => over_columns(&kernel, last - first, c, 2 * STRIP, [w]),
            (None, Some(b)) => super::reduce::column_sum(kernel.dy, b, Accum::Add),
            (None, None) => {}
        }
    }
}

struct Backward<'a> {
    c: usize,
    dy: Slice<'a>,
    x: Slice<'a>,
    weight: Option<Slice<'a>>,
    mean: Option<&'a [f32]>,
    rstd: &'a [f32],
}

/// dx.
impl<'a> Run<Out<'a>> for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut dx: Out<'a>, scratch: &mut [f32]) {
        let c = self.c;
        let (weight, rest) = scratch.split_at_mut(c);
        let (wide_x, rest) = rest.split_at_mut(c);
        let (wide_dy, narrow) = rest.split_at_mut(c);
        let weight = parameter(s, self.weight, 1.0, weight);
        let count = c as f32;
        for (i, row) in range.enumerate() {
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
                &mut dx.data,
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

/// Rows that are added to a column's sums at a time, so that these are loaded and stored once for all of them.
const STRIP: usize = 4;

/// dweight, and dbias if M is 2, added to what is there.
impl<'a, const M: usize> Run<[&'a mut [f32]; M]> for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        s: S,
        columns: Range<usize>,
        mut sums: [&'a mut [f32]; M],
        scratch: &mut [f32],
    ) {
        let rows = self.rstd.len();
        let strips = rows / STRIP * STRIP;
        for row in (0..strips).step_by(STRIP) {
            let mut wide = scratch.chunks_exact_mut(columns.len());
            let mut x = [&[][..]; 2 * STRIP];
            for (i, x) in x.iter_mut().enumerate() {
                let from = if i < STRIP { self.x } else { self.dy };
                let wide = wide.next().expect("one a row");
                *x = widen(s, from, self.elements(row + i % STRIP, &columns), wide);
            }
            let [m0, m1, m2, m3] = std::array::from_fn(
                #[inline(always)]
                |i| s.splat(self.mean.map_or(0.0, |mean| mean[row + i])),
            );
            let [r0, r1, r2, r3] = std::array::from_fn(
                #[inline(always)]
                |i| s.splat(self.rstd[row + i]),
            );
            transform::<S, f32, true, { 2 * STRIP }, M>(
                s,
                x,
                sums.each_mut().map(|sum| &mut **sum),
                #[inline(always)]
                |[x0, x1, x2, x3, dy0, dy1, dy2, dy3], mut sums| {
                    sums[0] = s.fma(dy0, s.mul(s.sub(x0, m0), r0), sums[0]);
                    sums[0] = s.fma(dy1, s.mul(s.sub(x1, m1), r1), sums[0]);
                    sums[0] = s.fma(dy2, s.mul(s.sub(x2, m2), r2), sums[0]);
                    sums[0] = s.fma(dy3, s.mul(s.sub(x3, m3), r3), sums[0]);
                    if M == 2 {
                        let sum = s.add(s.add(sums[M - 1], dy0), dy1);
                        sums[M - 1] = s.add(s.add(sum, dy2), dy3);
                    }
                    sums
                },
            );
        }
        for row in strips..rows {
            let (wide_x, wide_dy) = scratch.split_at_mut(columns.len());
            let x = widen(s, self.x, self.elements(row, &columns), wide_x);
            let dy = widen(s, self.dy, self.elements(row, &columns), wide_dy);
            let m = s.splat(self.mean.map_or(0.0, |mean| mean[row]));
            let r = s.splat(self.rstd[row]);
            transform::<S, f32, true, 2, M>(
                s,
                [x, dy],
                sums.each_mut().map(|sum| &mut **sum),
                #[inline(always)]
                |[x, dy], mut sums| {
                    sums[0] = s.fma(dy, s.mul(s.sub(x, m), r), sums[0]);
                    if M == 2 {
                        sums[M - 1] = s.add(sums[M - 1], dy);
                    }
                    sums
                },
            );
        }
    }
}

impl Backward<'_> {
    /// Where the columns of a row lie.
    #[inline(always)]
    fn elements(&self, row: usize, columns: &Range<usize>) -> Range<usize> {
        row * self.c + columns.start..row * self.c + columns.end
    }
}
