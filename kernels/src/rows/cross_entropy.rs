//! Softmax cross-entropy in passes that a vocabulary split over chips can put collectives between: row
//! maxima (then a maximum over chips), sums of exponentials and the label's logit (then a sum over chips), the gradient.
//!
//! A shard holds the columns first..first + v of a vocabulary of which `valid` entries exist; columns past `valid` pad
//! the vocabulary to a multiple of the chips: they count as logits of minus infinity, whatever they contain.
//!
//! A row's sum adds blocks of 4096 columns in ascending order, each summed by 32 lanes and a tree.

use super::driver::{Run, over_rows};
use super::lanes::{GROUP, fold, map, tree_sum, update, widen, widen_into, written};
use super::one_pass::OnePass;
use super::parallel::{Out, part, shared};
use crate::dtype::{Slice, SliceMut};
use crate::memory::with_scratch_f32;
use crate::polynomial::{exp_normal, ln};
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

/// Columns of which gradients are computed at a time: a multiple of 32, small enough for the first cache.
const BLOCK: usize = 1024;

/// Columns of a block of a sum: what ends a block costs as much as 100 columns.
const PASS: usize = 4096;

/// Where a shard's columns lie in the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Shard {
    /// The vocabulary's index of the shard's first column.
    pub first: usize,
    /// Entries of the whole vocabulary that exist.
    pub valid: usize,
}

impl Shard {
    /// How many of `columns` columns exist.
    fn visible(self, columns: usize) -> usize {
        self.valid.saturating_sub(self.first).min(columns)
    }
}

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

/// `max[i]` = maximum over the shard's existing columns of `logits[i, j]`; minus infinity without any, NaN with a NaN.
///
/// logits: [r, v] with r = max.len(). Panics on other lengths.
pub fn row_max(logits: Slice, shard: Shard, max: &mut [f32]) {
    let (c, rows) = (width(logits, max.len()), max.len());
    let logits = Logits { c, logits, shard };
    over_rows(&logits, rows, c, 0, max);
}

/// Rows of logits.
struct Logits<'a> {
    c: usize,
    logits: Slice<'a>,
    shard: Shard,
}

impl Logits<'_> {
    /// Calls f with the row's existing columns in blocks of `PASS`.
    #[inline(always)]
    fn blocks<S: Simd>(&self, s: S, row: usize, mut f: impl FnMut(&[f32])) {
        let visible = self.shard.visible(self.c);
        let mut wide = [0f32; PASS];
        for at in (0..visible).step_by(PASS) {
            let end = (at + PASS).min(visible);
            let start = row * self.c;
            f(widen(s, self.logits, start + at..start + end, &mut wide));
        }
    }

    /// The row's maximum; NaN with a NaN.
    #[inline(always)]
    fn max<S: Simd>(&self, s: S, row: usize) -> f32 {
        let none = f32::NEG_INFINITY;
        let mut max = none;
        self.blocks(
            s,
            row,
            #[inline(always)]
            |x| {
                let [lanes] = fold(
                    s,
                    [x],
                    [none],
                    [none],
                    #[inline(always)]
                    |[x], [m]| [s.max_nan(m, x)],
                );
                max = lanes_max(max, lanes);
            },
        );
        max
    }

    #[inline(always)]
    fn exp_sum<S: Simd>(&self, s: S, row: usize, max: f32) -> f32 {
        if let Some(mut pass) = OnePass::below(max) {
            self.blocks(
                s,
                row,
                #[inline(always)]
                |x| {
                    pass.add(s, x);
                },
            );
            return pass.finish(s).1;
        }
        let max = s.splat(max);
        let mut total = 0.0;
        self.blocks(
            s,
            row,
            #[inline(always)]
            |x| {
                let [lanes] = fold(
                    s,
                    [x],
                    [f32::NEG_INFINITY],
                    [0.0],
                    #[inline(always)]
                    |[x], [sum]| [s.add(sum, exp_normal(s, s.sub(x, max)))],
                );
                total += tree_sum(lanes);
            },
        );
        total
    }

    /// The row's maximum and its sum of e^(x - maximum); both are NaN with a NaN.
    #[inline(always)]
    fn max_and_exp_sum<S: Simd>(&self, s: S, row: usize) -> (f32, f32) {
        let (mut pass, mut fits) = (OnePass::new(), true);
        self.blocks(
            s,
            row,
            #[inline(always)]
            |x| fits = fits && pass.add(s, x),
        );
        if fits {
            let (max, sum) = pass.finish(s);
            if !sum.is_nan() {
                return (max, sum);
            }
        }
        let max = self.max(s, row);
        (max, self.exp_sum(s, row, max))
    }

    /// The logit of `label` where it lies in the shard, else 0.
    #[inline(always)]
    fn target<S: Simd>(&self, s: S, row: usize, label: u32) -> f32 {
        let label = (label as usize).wrapping_sub(self.shard.first);
        if label >= self.shard.visible(self.c) {
            return 0.0;
        }
        let at = row * self.c + label;
        widen(s, self.logits, at..at + 1, &mut [0.0])[0]
    }
}

impl<'a> Run<&'a mut [f32]> for Logits<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, max: &'a mut [f32], _: &mut [f32]) {
        for (row, max) in range.zip(max) {
            *max = self.max(s, row);
        }
    }
}

/// `sum[i]` = sum over the shard's existing columns of `e^(logits[i, j] - max[i])`; `target[i]` = the logit of `labels[i]` where
/// it lies in the shard, else 0: shards add up to the whole.
///
/// logits: `[r, v]`; max, labels, sum, target: `[r]`. Panics on other lengths.
pub fn row_exp_sum(
    logits: Slice,
    shard: Shard,
    max: &[f32],
    labels: &[u32],
    sum: &mut [f32],
    target: &mut [f32],
) {
    let rows = max.len();
    let c = width(logits, rows);
    assert!(
        [labels.len(), sum.len(), target.len()] == [rows; 3],
        "labels, sum and target have one element a row"
    );
    let kernel = ExpSums {
        logits: Logits { c, logits, shard },
        max,
        labels,
    };
    over_rows(&kernel, rows, c, 0, (sum, target));
}

struct ExpSums<'a> {
    logits: Logits<'a>,
    max: &'a [f32],
    labels: &'a [u32],
}

impl<'a> Run<(&'a mut [f32], &'a mut [f32])> for ExpSums<'_> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        s: S,
        range: Range<usize>,
        (sum, target): (&'a mut [f32], &'a mut [f32]),
        _: &mut [f32],
    ) {
        for (i, row) in range.enumerate() {
            sum[i] = self.logits.exp_sum(s, row, self.max[row]);
            target[i] = self.logits.target(s, row, self.labels[row]);
        }
    }
}

/// [`row_max`] and [`row_exp_sum`] of a whole vocabulary, in one pass over memory.
struct Statistics<'a> {
    logits: Logits<'a>,
    labels: &'a [u32],
}

impl<'a> Run<[&'a mut [f32]; 3]> for Statistics<'_> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        s: S,
        range: Range<usize>,
        [max, sum, target]: [&'a mut [f32]; 3],
        _: &mut [f32],
    ) {
        for (i, row) in range.enumerate() {
            (max[i], sum[i]) = self.logits.max_and_exp_sum(s, row);
            target[i] = self.logits.target(s, row, self.labels[row]);
        }
    }
}

/// `losses[i] = ln sum[i] + max[i] - target[i]`, and 0 where `labels[i]` is `ignored`. All `[r]`; panics on other lengths.
pub fn cross_entropy_losses(
    max: &[f32],
    sum: &[f32],
    target: &[f32],
    labels: &[u32],
    ignored: u32,
    losses: &mut [f32],
) {
    let rows = losses.len();
    assert!(
        [max.len(), sum.len(), target.len(), labels.len()] == [rows; 4],
        "one max, sum, target and label a row"
    );
    dispatch(
        isa(),
        Losses {
            max,
            sum,
            target,
            losses,
        },
    );
    for (loss, &label) in losses.iter_mut().zip(labels) {
        if label == ignored {
            *loss = 0.0;
        }
    }
}

struct Losses<'a> {
    max: &'a [f32],
    sum: &'a [f32],
    target: &'a [f32],
    losses: &'a mut [f32],
}

impl Kernel for Losses<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        map(
            s,
            [self.max, self.sum, self.target],
            self.losses,
            #[inline(always)]
            |[max, sum, target]| s.add(ln(s, sum), s.sub(max, target)),
        );
    }
}

/// `dlogits[i, j] = (e^(logits[i, j] - max[i]) / sum[i] - [j is the label]) scale[i]`; 0 in rows whose label is `ignored`
/// and in columns that do not exist.
///
/// logits, dlogits: `[r, v]`; max, sum (over the whole vocabulary), labels, scale (dloss of the row): `[r]`. Panics on other
/// lengths, and on a label that is neither below `valid` nor `ignored`.
#[allow(clippy::too_many_arguments)]
pub fn cross_entropy_gradient(
    logits: Slice,
    shard: Shard,
    max: &[f32],
    sum: &[f32],
    labels: &[u32],
    ignored: u32,
    scale: &[f32],
    dlogits: SliceMut,
) {
    assert_eq!(logits.len(), dlogits.len(), "logits and dlogits differ");
    gradient(
        Some(logits),
        shard,
        max,
        sum,
        labels,
        ignored,
        scale,
        dlogits,
    );
}

/// [`cross_entropy_gradient`] that overwrites the logits with their gradient.
pub fn cross_entropy_gradient_in_place(
    logits: SliceMut,
    shard: Shard,
    max: &[f32],
    sum: &[f32],
    labels: &[u32],
    ignored: u32,
    scale: &[f32],
) {
    gradient(None, shard, max, sum, labels, ignored, scale, logits);
}

#[allow(clippy::too_many_arguments)]
fn gradient(
    logits: Option<Slice>,
    shard: Shard,
    max: &[f32],
    sum: &[f32],
    labels: &[u32],
    ignored: u32,
    scale: &[f32],
    dlogits: SliceMut,
) {
    let rows = max.len();
    let c = width(shared(&dlogits), rows);
    assert!(
        [sum.len(), labels.len()] == [rows; 2],
        "one sum and label a row"
    );
    assert_eq!(scale.len(), rows, "one scale a row");
    check_labels(labels, ignored, shard.valid);
    let out = Out {
        data: dlogits,
        width: c,
    };
    let kernel = Gradient {
        c,
        logits,
        shard,
        max,
        sum,
        labels,
        ignored,
        scale,
    };
    over_rows(&kernel, rows, c, 0, out);
}

fn check_labels(labels: &[u32], ignored: u32, valid: usize) {
    if let Some(label) = labels
        .iter()
        .find(|&&l| l != ignored && l as usize >= valid)
    {
        panic!(
            "label {label} is outside the vocabulary of {valid} and is not the ignored {ignored}"
        );
    }
}

struct Gradient<'a> {
    c: usize,
    logits: Option<Slice<'a>>,
    shard: Shard,
    max: &'a [f32],
    sum: &'a [f32],
    labels: &'a [u32],
    ignored: u32,
    scale: &'a [f32],
}

impl<'a> Run<Out<'a>> for Gradient<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut dlogits: Out<'a>, _: &mut [f32]) {
        let c = self.c;
        let visible = self.shard.visible(c);
        let mut wide = [0f32; BLOCK];
        let mut narrow = [0f32; BLOCK];
        for (i, row) in range.enumerate() {
            let ignored = self.labels[row] == self.ignored;
            let label = (self.labels[row] as usize).wrapping_sub(self.shard.first);
            let (max, scale) = (s.splat(self.max[row]), self.scale[row]);
            let factor = s.splat(scale / self.sum[row]);
            for at in (0..c).step_by(BLOCK) {
                let end = (at + BLOCK).min(c);
                // Columns of this block that get a gradient.
                let n = if ignored {
                    0
                } else {
                    visible.clamp(at, end) - at
                };
                let target = i * c + at..i * c + end;
                let x = match (self.logits, &dlogits.data) {
                    (Some(x), _) => Some(widen(s, x, row * c + at..row * c + end, &mut wide)),
                    // f32 in place of themselves need no copy.
                    (None, SliceMut::F32(_)) => None,
                    (None, y) => {
                        let wide = &mut wide[..end - at];
                        widen_into(s, part(shared(y), target.clone()), wide);
                        Some(&*wide)
                    }
                };
                written(
                    s,
                    &mut dlogits.data,
                    target,
                    &mut narrow,
                    #[inline(always)]
                    |y| {
                        let (live, dead) = y.split_at_mut(n);
                        match x {
                            Some(x) => map(
                                s,
                                [&x[..n]],
                                live,
                                #[inline(always)]
                                |[x]| slope(s, x, max, factor),
                            ),
                            None => update(
                                s,
                                [],
                                live,
                                #[inline(always)]
                                |[], x| slope(s, x, max, factor),
                            ),
                        }
                        dead.fill(0.0);
                        if let Some(y) = label.checked_sub(at).and_then(|j| live.get_mut(j)) {
                            *y -= scale;
                        }
                    },
                );
            }
        }
    }
}

/// e^(x - max) factor.
#[inline(always)]
fn slope<S: Simd>(s: S, x: S::V, max: S::V, factor: S::V) -> S::V {
    s.mul(exp_normal(s, s.sub(x, max)), factor)
}

/// The three passes on one chip: losses, and max and sum for [`cross_entropy_gradient`].
///
/// logits: `[r, v]`; labels, losses, max, sum: `[r]`. Panics on other lengths, and on a label that is neither below `valid`
/// nor `ignored`.
pub fn cross_entropy(
    logits: Slice,
    labels: &[u32],
    ignored: u32,
    valid: usize,
    losses: &mut [f32],
    max: &mut [f32],
    sum: &mut [f32],
) {
    check_labels(labels, ignored, valid);
    let rows = losses.len();
    let c = width(logits, rows);
    assert!(
        [labels.len(), max.len(), sum.len()] == [rows; 3],
        "one label, max and sum a row"
    );
    let shard = Shard { first: 0, valid };
    let logits = Logits { c, logits, shard };
    with_scratch_f32(rows, |target| {
        let out = [&mut *max, &mut *sum, &mut *target];
        over_rows(&Statistics { logits, labels }, rows, c, 0, out);
        cross_entropy_losses(max, sum, target, labels, ignored, losses);
    });
}

/// The greatest of all, or NaN.
#[inline(always)]
fn lanes_max(mut max: f32, lanes: [f32; GROUP]) -> f32 {
    for x in lanes {
        if x > max || x.is_nan() {
            max = x;
        }
    }
    max
}
