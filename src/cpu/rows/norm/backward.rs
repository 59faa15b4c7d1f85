//! The gradients of both norms.

use super::super::driver::{Run, over_rows};
use super::super::lanes::{map, sums, transform, update, widen, written};
use super::super::parallel::{Out, part, part_mut};
use super::{parameter, width};
use crate::cpu::Accum;
use crate::cpu::memory::with_scratch_f32;
use crate::cpu::simd::{Kernel, Simd, dispatch, isa};
use crate::dtype::{Slice, SliceMut};
use std::ops::Range;

/// Elements of x in a block of rows at most: x, dy and dx stay in the second cache between the gradients of inputs and those of
/// parameters.
const NEAR: usize = 64 * 1024;
/// Rows of a block, where they are not too long: the tokens of a micro-batch are mostly a multiple, and its sums few beside it.
const ROWS: usize = 32;
/// Elements of blocks whose sums wait for one another.
const WAITING: usize = 1 << 21;

/// Rows of a block: from the width alone, since they decide the order of sums. A power of two from 4 to 32.
fn block_rows(c: usize) -> usize {
    let fits = (NEAR / c).clamp(STRIP, ROWS);
    1 << fits.ilog2()
}

/// Blocks whose sums wait for one another at a time.
fn waiting(c: usize) -> usize {
    (WAITING / (block_rows(c) * c)).max(1)
}

/// All gradients, in one pass over memory: blocks of rows, for each block first dx by rows, then the sums by columns. A parameter's
/// sum adds those of the blocks in ascending order, each of them one chain over its rows; so [`Accum::Add`] gives the bits of one
/// call where it resumes at a multiple of [`block_rows`]. (One chain over all rows had the threads meet twice a block: on
/// two of them it took 1.6 times a stream.)
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
                over_rows(&kernel, rows, c, 4 * c, Out { data, width: c });
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
            over_rows(&kernel, count, block * c, 2 * STRIP * c, (dx, out));
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
            if let Some(dx) = &mut dx {
                let at = i * self.rows * c;
                let data = part_mut(&mut dx.data, at..at + rows.len() * c);
                self.all
                    .run(s, rows.clone(), Out { data, width: c }, scratch);
            }
            sums.fill(0.0);
            let mut columns = sums.chunks_exact_mut(c);
            let sums: [&mut [f32]; M] = std::array::from_fn(
                #[inline(always)]
                |_| columns.next().expect("M times c"),
            );
            self.all.part(rows).run(s, 0..c, sums, scratch);
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

    /// Where the columns of a row lie.
    #[inline(always)]
    fn elements(&self, row: usize, columns: &Range<usize>) -> Range<usize> {
        row * self.c + columns.start..row * self.c + columns.end
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer_norm_backward;
    use super::*;
    use crate::cpu::rows::tests::{Data, bits};
    use crate::dtype::DType;

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
