//! Softmax, and softmax cross-entropy in passes that a vocabulary split over chips can put collectives between: row
//! maxima (then a maximum over chips), sums of exponentials and the label's logit (then a sum over chips), the gradient.
//!
//! A shard holds the columns first..first + v of a vocabulary of which `valid` entries exist; columns past `valid` pad
//! the vocabulary to a multiple of the chips: they count as logits of minus infinity, whatever they contain.
//!
//! A row's sum adds blocks of 1024 columns in ascending order, each summed by 32 lanes and a tree.

use super::lanes::{GROUP, fold, map, sums, widen, written};
use super::parallel::{Out, for_rows, shared};
use crate::cpu::memory::with_scratch_f32;
use crate::cpu::polynomial::{exp, ln};
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch, isa};
use crate::dtype::{Slice, SliceMut};
use std::ops::Range;

/// Columns that are widened at a time: a multiple of 32, small enough for the first cache.
const BLOCK: usize = 1024;

/// Where a shard's columns lie in the vocabulary.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shard {
    /// The vocabulary's index of the shard's first column.
    pub(crate) first: usize,
    /// Entries of the whole vocabulary that exist.
    pub(crate) valid: usize,
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

/// max[i] = maximum over the shard's existing columns of logits[i, j]; minus infinity without any, NaN with a NaN.
///
/// logits: [r, v] with r = max.len(). Panics on other lengths.
pub(crate) fn row_max(logits: Slice, shard: Shard, max: &mut [f32]) {
    let (c, isa) = (width(logits, max.len()), isa());
    for_rows(max.len(), c, max, |range, max| {
        dispatch(
            isa,
            Maxima {
                c,
                logits,
                shard,
                range,
                max,
            },
        );
    });
}

struct Maxima<'a> {
    c: usize,
    logits: Slice<'a>,
    shard: Shard,
    range: Range<usize>,
    max: &'a mut [f32],
}

impl Kernel for Maxima<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let visible = self.shard.visible(self.c);
        let mut wide = [0f32; BLOCK];
        for (row, max) in self.range.zip(self.max) {
            *max = f32::NEG_INFINITY;
            for at in (0..visible).step_by(BLOCK) {
                let end = (at + BLOCK).min(visible);
                let start = row * self.c;
                let x = widen(s, self.logits, start + at..start + end, &mut wide);
                let none = f32::NEG_INFINITY;
                let [lanes] = fold(
                    s,
                    [x],
                    [none],
                    [none],
                    #[inline(always)]
                    |[x], [m]| [s.max_nan(m, x)],
                );
                for x in lanes {
                    if x > *max || x.is_nan() {
                        *max = x;
                    }
                }
            }
        }
    }
}

/// sum[i] = sum over the shard's existing columns of e^(logits[i, j] - max[i]); target[i] = the logit of labels[i] where
/// it lies in the shard, else 0: shards add up to the whole.
///
/// logits: [r, v]; max, labels, sum, target: [r]. Panics on other lengths.
pub(crate) fn row_exp_sum(
    logits: Slice,
    shard: Shard,
    max: &[f32],
    labels: &[u32],
    sum: &mut [f32],
    target: &mut [f32],
) {
    let rows = max.len();
    let (c, isa) = (width(logits, rows), isa());
    assert!(
        [labels.len(), sum.len(), target.len()] == [rows; 3],
        "labels, sum and target have one element a row"
    );
    for_rows(rows, c, (sum, target), |range, (sum, target)| {
        dispatch(
            isa,
            ExpSums {
                c,
                logits,
                shard,
                max,
                labels,
                range,
                sum,
                target,
            },
        );
    });
}

struct ExpSums<'a> {
    c: usize,
    logits: Slice<'a>,
    shard: Shard,
    max: &'a [f32],
    labels: &'a [u32],
    range: Range<usize>,
    sum: &'a mut [f32],
    target: &'a mut [f32],
}

impl Kernel for ExpSums<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let visible = self.shard.visible(self.c);
        let mut wide = [0f32; BLOCK];
        for (i, row) in self.range.enumerate() {
            let (max, start) = (s.splat(self.max[row]), row * self.c);
            let mut total = 0.0;
            for at in (0..visible).step_by(BLOCK) {
                let end = (at + BLOCK).min(visible);
                let x = widen(s, self.logits, start + at..start + end, &mut wide);
                let [lanes] = fold(
                    s,
                    [x],
                    [f32::NEG_INFINITY],
                    [0.0],
                    #[inline(always)]
                    |[x], [sum]| [s.add(sum, exp(s, s.sub(x, max)))],
                );
                total += super::lanes::tree_sum(lanes);
            }
            self.sum[i] = total;
            let label = (self.labels[row] as usize).wrapping_sub(self.shard.first);
            self.target[i] = if label < visible {
                widen(s, self.logits, start + label..start + label + 1, &mut wide)[0]
            } else {
                0.0
            };
        }
    }
}

/// losses[i] = ln sum[i] + max[i] - target[i], and 0 where labels[i] is `ignored`. All [r]; panics on other lengths.
pub(crate) fn cross_entropy_losses(
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

/// dlogits[i, j] = (e^(logits[i, j] - max[i]) / sum[i] - [j is the label]) scale[i]; 0 in rows whose label is `ignored`
/// and in columns that do not exist.
///
/// logits, dlogits: [r, v]; max, sum (over the whole vocabulary), labels, scale (dloss of the row): [r]. Panics on other
/// lengths, and on a label that is neither below `valid` nor `ignored`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn cross_entropy_gradient(
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
pub(crate) fn cross_entropy_gradient_in_place(
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
    let (rows, isa) = (max.len(), isa());
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
    for_rows(rows, c, out, |range, dlogits| {
        dispatch(
            isa,
            Gradient {
                c,
                logits,
                shard,
                max,
                sum,
                labels,
                ignored,
                scale,
                range,
                dlogits: dlogits.data,
            },
        );
    });
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
    range: Range<usize>,
    dlogits: SliceMut<'a>,
}

impl Kernel for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let c = self.c;
        let visible = self.shard.visible(c);
        let mut wide = [0f32; BLOCK];
        let mut narrow = [0f32; BLOCK];
        for (i, row) in self.range.clone().enumerate() {
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
                let wide = &mut wide[..end - at];
                match self.logits {
                    Some(x) => {
                        let x = widen(s, x, row * c + at..row * c + end, &mut narrow);
                        wide.copy_from_slice(x);
                    }
                    None => {
                        let x = shared(&self.dlogits);
                        let x = widen(s, x, i * c + at..i * c + end, &mut narrow);
                        wide.copy_from_slice(x);
                    }
                }
                let target = i * c + at..i * c + end;
                written(
                    s,
                    &mut self.dlogits,
                    target,
                    &mut narrow,
                    #[inline(always)]
                    |y| {
                        let (live, dead) = y.split_at_mut(n);
                        map(
                            s,
                            [&wide[..n]],
                            live,
                            #[inline(always)]
                            |[x]| s.mul(exp(s, s.sub(x, max)), factor),
                        );
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

/// The three passes on one chip: losses, and max and sum for [`cross_entropy_gradient`].
///
/// logits: [r, v]; labels, losses, max, sum: [r]. Panics on other lengths, and on a label that is neither below `valid`
/// nor `ignored`.
pub(crate) fn cross_entropy(
    logits: Slice,
    labels: &[u32],
    ignored: u32,
    valid: usize,
    losses: &mut [f32],
    max: &mut [f32],
    sum: &mut [f32],
) {
    check_labels(labels, ignored, valid);
    let shard = Shard { first: 0, valid };
    row_max(logits, shard, max);
    with_scratch_f32(losses.len(), |target| {
        row_exp_sum(logits, shard, max, labels, sum, target);
        cross_entropy_losses(max, sum, target, labels, ignored, losses);
    });
}

/// y[i, j] = e^(x[i, j] - max over j of x[i, j]) / its sum over j. x, y: [r, c]. Panics unless c divides the length.
pub(crate) fn softmax(x: Slice, c: usize, y: SliceMut) {
    assert_eq!(x.len(), y.len(), "x and y differ in length");
    if x.is_empty() {
        return;
    }
    assert_eq!(x.len() % c, 0, "x is not [r, {c}]");
    let isa: Isa = isa();
    for_rows(x.len() / c, c, Out { data: y, width: c }, |range, y| {
        with_scratch_f32(2 * c, |scratch| {
            dispatch(
                isa,
                Softmax {
                    c,
                    x,
                    range,
                    y: y.data,
                    scratch,
                },
            );
        });
    });
}

struct Softmax<'a> {
    c: usize,
    x: Slice<'a>,
    range: Range<usize>,
    y: SliceMut<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let c = self.c;
        let (wide, powers) = self.scratch.split_at_mut(c);
        for (i, row) in self.range.enumerate() {
            let x = widen(s, self.x, row * c..(row + 1) * c, wide);
            let none = f32::NEG_INFINITY;
            let [lanes] = fold(
                s,
                [x],
                [none],
                [none],
                #[inline(always)]
                |[x], [m]| [s.max_nan(m, x)],
            );
            let max = lanes_max(lanes);
            let m = s.splat(max);
            map(
                s,
                [x],
                powers,
                #[inline(always)]
                |[x]| exp(s, s.sub(x, m)),
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
                &mut self.y,
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

#[inline(always)]
fn lanes_max(lanes: [f32; GROUP]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    for x in lanes {
        if x > max || x.is_nan() {
            max = x;
        }
    }
    max
}
