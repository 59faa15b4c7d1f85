//! The gradients of both norms.

use super::super::driver::{Run, over_rows};
use super::super::lanes::{GROUP, MOST, ahead_by, tree_sum, update, widen, written};
use super::super::parallel::{Out, part, part_mut};
use super::{parameter, width};
use crate::Accum;
use crate::dtype::{Slice, SliceMut};
use crate::memory::with_scratch_f32;
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

/// Elements of x in a block of rows at most, so that each thread has some blocks, and rows at least.
const NEAR: usize = 64 * 1024;
const FEWEST: usize = 4;
/// Rows of a block, where they are not too long: the tokens of a micro-batch are mostly a multiple, and its sums few beside it.
const ROWS: usize = 32;
/// Elements of blocks whose sums wait for one another.
const WAITING: usize = 1 << 21;

/// Rows of a block: from the width alone, since they decide the order of sums. A power of two from 4 to 32.
fn block_rows(c: usize) -> usize {
    let fits = (NEAR / c).clamp(FEWEST, ROWS);
    1 << fits.ilog2()
}

/// Blocks whose sums wait for one another at a time.
fn waiting(c: usize) -> usize {
    (WAITING / (block_rows(c) * c)).max(1)
}

/// All gradients, in one pass over memory (see [`row_and_next`]), by blocks of rows. A parameter's sum adds those of the blocks in
/// ascending order, each of them one chain over its rows; so [`Accum::Add`] gives the bits of one call where it resumes at a
/// multiple of [`block_rows`]. (One chain over all rows had the threads meet twice a block: on two of them it took 1.6 times a
/// stream.)
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    dy: Slice,
    x: Slice,
    weight: Option<Slice>,
    mean: Option<&[f32]>,
    rstd: &[f32],
    dx: Option<SliceMut>,
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
    let kernel = Backward {
        c,
        dy,
        x,
        weight,
        mean,
        rstd,
    };
    match (dweight, dbias) {
        (Some((w, _)), Some((b, _))) => by_blocks(&kernel, dx, [w, b]),
        (Some((w, _)), None) => by_blocks(&kernel, dx, [w]),
        // The bias's sums have one order, whether the weight's are wanted or not.
        (None, Some((b, _))) => by_blocks(&kernel, dx, [&mut vec![0.0; c], b]),
        (None, None) => {
            if let Some(data) = dx {
                over_rows(&kernel, rows, c, SCRATCH * c, Out { data, width: c });
            }
        }
    }
}

/// dx, and the gradients of the weight and, if M is 2, of the bias, added to `sums`.
fn by_blocks<const M: usize>(all: &Backward, mut dx: Option<SliceMut>, mut sums: [&mut [f32]; M]) {
    let (c, rows, block) = (all.c, all.rstd.len(), block_rows(all.c));
    let step = waiting(c) * block;
    for first in (0..rows).step_by(step) {
        let part_of_all = first..rows.min(first + step);
        let count = part_of_all.len().div_ceil(block);
        let kernel = Blocks::<M> {
            rows: block,
            all: all.part(part_of_all.clone()),
        };
        with_scratch_f32(count * M * c, |of_blocks| {
            let data = dx.as_mut();
            let range = part_of_all.start * c..part_of_all.end * c;
            let dx = data.map(|dx| Out {
                data: part_mut(dx, range),
                width: block * c,
            });
            let out = Out {
                data: SliceMut::F32(of_blocks),
                width: M * c,
            };
            over_rows(&kernel, count, block * c, SCRATCH * c, (dx, out));
            let sums = sums.each_mut().map(|sum| &mut **sum);
            dispatch(isa(), AddUp { of_blocks, sums });
        });
    }
}

/// Blocks of rows: dx of each, and its sums by columns, M times c for a block.
struct Blocks<'a, const M: usize> {
    all: Backward<'a>,
    /// Of a block.
    rows: usize,
}

impl<'a, const M: usize> Run<(Option<Out<'a>>, Out<'a>)> for Blocks<'_, M> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        s: S,
        blocks: Range<usize>,
        (mut dx, sums): (Option<Out<'a>>, Out<'a>),
        scratch: &mut [f32],
    ) {
        let c = self.all.c;
        let all = sums.data.typed::<f32>();
        for (i, (block, sums)) in blocks.zip(all.chunks_exact_mut(M * c)).enumerate() {
            let first = block * self.rows;
            let rows = first..self.all.rstd.len().min(first + self.rows);
            sums.fill(0.0);
            let mut columns = sums.chunks_exact_mut(c);
            let sums: [&mut [f32]; M] = std::array::from_fn(
                #[inline(always)]
                |_| columns.next().expect("M times c"),
            );
            let at = i * self.rows * c;
            let dx = dx.as_mut().map(
                #[inline(always)]
                |dx| part_mut(&mut dx.data, at..at + rows.len() * c),
            );
            self.all.rows(s, rows, dx, sums, scratch);
        }
    }
}

/// Adds sums of blocks in ascending order.
struct AddUp<'a, const M: usize> {
    of_blocks: &'a [f32],
    sums: [&'a mut [f32]; M],
}

impl<const M: usize> Kernel for AddUp<'_, M> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let c = self.sums[0].len();
        let sums = self.sums;
        for block in self.of_blocks.chunks_exact(M * c) {
            for i in 0..M {
                update(
                    s,
                    [&block[i * c..][..c]],
                    &mut *sums[i],
                    #[inline(always)]
                    |[x], sum| s.add(sum, x),
                );
            }
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

/// dx alone.
impl<'a> Run<Out<'a>> for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, dx: Out<'a>, scratch: &mut [f32]) {
        self.rows(s, range, Some(dx.data), [], scratch);
    }
}

/// Rows of scratch: the weight, dx, and x and dy of two.
const SCRATCH: usize = 6;

/// Bytes ahead for which a row asks. With rows of 4 KiB all arrays meet in the same sets of the first cache, of 12 lines on a Zen 5:
/// there 4 KiB took 1.1 to 1.25 times as long, 8 or none 1.2 to 1.25.
const SOON: usize = 2048;

/// A row in f32.
struct Row<'a, S: Simd> {
    x: &'a [f32],
    dy: &'a [f32],
    mean: S::V,
    rstd: S::V,
}

impl<S: Simd> Row<'_, S> {
    #[inline(always)]
    fn h(&self, s: S, x: S::V) -> S::V {
        s.mul(s.sub(x, self.mean), self.rstd)
    }
}

/// What is done with a row, or before the first one, and with the row after it, or after the last one.
struct Step<'a, S: Simd, const M: usize> {
    weight: &'a [f32],
    now: Option<Row<'a, S>>,
    next: Option<Row<'a, S>>,
    /// sum g / c, and sum (g h) / c of this row.
    means: [S::V; 2],
    /// Of columns: dy h is added to the first, dy to the second.
    sums: [&'a mut [f32]; M],
}

impl<S: Simd, const M: usize> Step<'_, S, M> {
    /// dx and the sums of this row; sum g and sum (g h) of the next one.
    #[inline(always)]
    fn run(self, s: S, dx: &mut [f32]) -> [f32; 2] {
        let Step {
            weight,
            now,
            next,
            means,
            sums,
        } = self;
        let to = (means, dx, sums);
        match (now, next) {
            (Some(now), Some(next)) => row_and_next::<S, true, true, M>(s, weight, &now, &next, to),
            (Some(now), None) => row_and_next::<S, true, false, M>(s, weight, &now, &now, to),
            (None, Some(next)) => row_and_next::<S, false, true, M>(s, weight, &next, &next, to),
            (None, None) => [0.0; 2],
        }
    }
}

/// If `NOW` the results of `row`; if `NEXT` sum g and sum (g h) of the row after it, in the order of [`super::super::lanes`].
///
/// One loop for both, so that memory is read and written all the time. Each on its own, this took 1.33 times a stream with all dx
/// of a block before its sums of columns, 1.5 row by row, though from the caches that takes less time; also with the next rows
/// asked for meanwhile, or dx written past the caches (1.9).
#[inline(always)]
fn row_and_next<S: Simd, const NOW: bool, const NEXT: bool, const M: usize>(
    s: S,
    weight: &[f32],
    row: &Row<'_, S>,
    next: &Row<'_, S>,
    ([mean_g, mean_gh], dx, sums): ([S::V; 2], &mut [f32], [&mut [f32]; M]),
) -> [f32; 2] {
    let c = weight.len();
    // All of one length: within a group no index is checked.
    let [x, dy] = [row.x, row.dy].map(|x| x[..c].as_chunks::<GROUP>());
    let [next_x, next_dy] = [next.x, next.dy].map(|x| x[..c].as_chunks::<GROUP>());
    let (weight, last_weight) = weight.as_chunks::<GROUP>();
    let (dx, last_dx) = dx[..c].as_chunks_mut::<GROUP>();
    let mut sums = sums.map(|sum| sum[..c].as_chunks_mut::<GROUP>());
    let mut totals = [[s.zero(); 2]; MOST];
    macro_rules! now {
        ($load:ident, $store:ident, $w:ident, $x:expr, $dy:expr, $dx:expr, |$sum:ident| $of_sum:expr) => {
            let (x, dy) = (s.$load($x), s.$load($dy));
            let h = row.h(s, x);
            let g = s.sub(s.mul(dy, $w), mean_g);
            s.$store($dx, s.mul(s.neg_fma(h, mean_gh, g), row.rstd));
            for (i, $sum) in sums.iter_mut().enumerate() {
                let old = s.$load($of_sum);
                let new = if i == 0 {
                    s.fma(dy, h, old)
                } else {
                    s.add(old, dy)
                };
                s.$store($of_sum, new);
            }
        };
    }
    macro_rules! next {
        ($total:expr, $w:ident, $x:expr, $dy:expr) => {
            let [sum_g, sum_gh] = $total;
            let (x, dy) = (s.load($x), s.load($dy));
            let g = s.mul(dy, $w);
            $total = [s.add(sum_g, g), s.fma(g, next.h(s, x), sum_gh)];
        };
    }
    for at in 0..c / GROUP {
        if NOW {
            ahead_by::<S, GROUP, _>(s, dx[at].as_ptr(), SOON);
        }
        if NEXT {
            ahead_by::<S, GROUP, _>(s, next_x.0[at].as_ptr(), SOON);
            ahead_by::<S, GROUP, _>(s, next_dy.0[at].as_ptr(), SOON);
        }
        for (v, total) in totals.iter_mut().enumerate().take(GROUP / S::LANES) {
            let j = v * S::LANES;
            let w = s.load(&weight[at][j..]);
            if NOW {
                now!(
                    load,
                    store,
                    w,
                    &x.0[at][j..],
                    &dy.0[at][j..],
                    &mut dx[at][j..],
                    |sum| &mut sum.0[at][j..]
                );
            }
            if NEXT {
                next!(*total, w, &next_x.0[at][j..], &next_dy.0[at][j..]);
            }
        }
    }
    let left = c % GROUP;
    if NOW {
        for at in (0..left).step_by(S::LANES) {
            let end = (at + S::LANES).min(left);
            let w = s.load_first(&last_weight[at..end]);
            now!(
                load_first,
                store_first,
                w,
                &x.1[at..end],
                &dy.1[at..end],
                &mut last_dx[at..end],
                |sum| &mut sum.1[at..end]
            );
        }
    }
    if NEXT && left > 0 {
        let mut padded = [[0f32; GROUP]; 3];
        for (padded, x) in padded.iter_mut().zip([last_weight, next_x.1, next_dy.1]) {
            padded[..left].copy_from_slice(x);
        }
        for (v, total) in totals.iter_mut().enumerate().take(GROUP / S::LANES) {
            let [w, x, dy] = padded.each_ref().map(|x| &x[v * S::LANES..]);
            let w = s.load(w);
            next!(*total, w, x, dy);
        }
    }
    let mut lanes = [[0f32; GROUP]; 2];
    for v in 0..GROUP / S::LANES {
        for (lanes, total) in lanes.iter_mut().zip(totals[v]) {
            s.store(&mut lanes[v * S::LANES..], total);
        }
    }
    lanes.map(tree_sum)
}

impl Backward<'_> {
    /// dx of some rows, and what they add to the sums of columns.
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(
        &self,
        s: S,
        range: Range<usize>,
        mut dx: Option<SliceMut>,
        mut sums: [&mut [f32]; M],
        scratch: &mut [f32],
    ) {
        let c = self.c;
        let (weight, scratch) = scratch.split_at_mut(c);
        let (wide, narrow) = scratch.split_at_mut(4 * c);
        let weight = parameter(s, self.weight, 1.0, weight);
        let mut totals = [0.0; 2];
        // A turn for the first row's sums, of which there are no results yet.
        for i in 0..=range.len() {
            let row = range.start + i;
            let (even, odd) = wide.split_at_mut(2 * c);
            let (here, there) = if i % 2 == 0 { (odd, even) } else { (even, odd) };
            let next = (row < range.end).then(
                #[inline(always)]
                || self.widened(s, row, there),
            );
            let [sum_g, sum_gh] = totals;
            // RMS norm has no mean, so none is taken out of its gradient.
            let mean_g = self.mean.map_or(0.0, |_| sum_g / c as f32);
            let means = [s.splat(mean_g), s.splat(sum_gh / c as f32)];
            let sums = sums.each_mut().map(
                #[inline(always)]
                |sum| &mut **sum,
            );
            let now = (i > 0).then(
                #[inline(always)]
                || self.row(s, row - 1, here),
            );
            let go = Step {
                weight,
                now,
                next,
                means,
                sums,
            };
            match &mut dx {
                Some(dx) if i > 0 => written(
                    s,
                    dx,
                    (i - 1) * c..i * c,
                    narrow,
                    #[inline(always)]
                    |dx| totals = go.run(s, dx),
                ),
                _ => totals = go.run(s, narrow),
            }
        }
    }

    /// A row, widened into `wide` where it is narrow.
    #[inline(always)]
    fn widened<'a, S: Simd>(&'a self, s: S, row: usize, wide: &'a mut [f32]) -> Row<'a, S> {
        let elements = row * self.c..(row + 1) * self.c;
        let (x, dy) = wide.split_at_mut(self.c);
        widen(s, self.x, elements.clone(), x);
        widen(s, self.dy, elements, dy);
        self.row(s, row, wide)
    }

    /// A row that `wide` holds where it is narrow.
    #[inline(always)]
    fn row<'a, S: Simd>(&'a self, s: S, row: usize, wide: &'a [f32]) -> Row<'a, S> {
        let elements = row * self.c..(row + 1) * self.c;
        let (x, dy) = wide.split_at(self.c);
        let lying = |all: Slice<'a>, wide: &'a [f32]| match all {
            Slice::F32(all) => &all[elements.clone()],
            _ => &wide[..self.c],
        };
        Row {
            x: lying(self.x, x),
            dy: lying(self.dy, dy),
            mean: s.splat(self.mean.map_or(0.0, |mean| mean[row])),
            rstd: s.splat(self.rstd[row]),
        }
    }

    /// Some of the rows.
    #[inline(always)]
    fn part(&self, rows: Range<usize>) -> Backward<'_> {
        let range = rows.start * self.c..rows.end * self.c;
        Backward {
            c: self.c,
            dy: part(self.dy, range.clone()),
            x: part(self.x, range),
            weight: self.weight,
            mean: self.mean.map(|m| &m[rows.clone()]),
            rstd: &self.rstd[rows],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer_norm_backward;
    use super::*;
    use crate::dtype::DType;
    use crate::rows::tests::{Data, bits};

    /// More blocks than wait at a time, the last one ragged; cut between two blocks the second part resumes.
    #[test]
    fn gradients_of_parameters_add_the_sums_of_blocks_in_order() {
        let c = 2050;
        let block = block_rows(c);
        let r = (waiting(c) + 1) * block + 3;
        let [x, dy] = ["x", "dy"].map(|name| Data::random(DType::F32, name, r * c, 1.0));
        let [mean, rstd] =
            ["mean", "rstd"].map(|name| Data::random(DType::F32, name, r, 1.0).f32());
        let run = |threads: usize, cut: usize| {
            let (mut dx, mut dw, mut db) = (vec![0.0; r * c], vec![0.0; c], vec![0.0; c]);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                for (rows, accum) in [(0..cut, Accum::Replace), (cut..r, Accum::Add)] {
                    let range = rows.start * c..rows.end * c;
                    layer_norm_backward(
                        part(dy.get(), range.clone()),
                        part(x.get(), range.clone()),
                        None,
                        &mean[rows.clone()],
                        &rstd[rows],
                        Some(SliceMut::F32(&mut dx[range])),
                        Some((&mut dw, accum)),
                        Some((&mut db, accum)),
                    );
                }
            });
            [bits(&dx), bits(&dw), bits(&db)]
        };
        let got = run(1, r);
        let (x, dy) = (x.f32(), dy.f32());
        for j in [0, 7, c - 1] {
            let (mut w, mut b) = (0.0, 0.0);
            for first in (0..r).step_by(block) {
                let (mut of_w, mut of_b) = (0.0, 0.0);
                for i in first..r.min(first + block) {
                    let (x, dy) = (x[i * c + j], dy[i * c + j]);
                    of_w = f32::mul_add(dy, (x - mean[i]) * rstd[i], of_w);
                    of_b += dy;
                }
                (w, b) = (w + of_w, b + of_b);
            }
            assert_eq!(
                [got[1][j], got[2][j]],
                [w.to_bits(), b.to_bits()],
                "column {j}"
            );
        }
        for (threads, cut) in [(2, r), (3, r), (2, 2 * block), (1, waiting(c) * block)] {
            assert!(
                got == run(threads, cut),
                "{threads} threads, cut before row {cut}"
            );
        }
    }
}
