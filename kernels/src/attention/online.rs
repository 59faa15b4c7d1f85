//! The softmax of a tile of scores, block of keys by block of keys.
//!
//! A maximum that grows by less than a factor of 256 is left as it was, since the exponentials still fit: so outputs are
//! almost never scaled again (after Zadouri et al. 2026, "FlashAttention-4"). So where a block is seen whole its powers are taken
//! with the maxima before it, while its scores are still in registers ([`super::tile::Powers`]), and once more only if one was too
//! far above: the same bits as with a look at the maxima first ([`Step`]), and forwards of f32 4 to 12 % faster on a
//! Xeon with AVX-512. One tile of queries at a time against all keys was 5 to 20 % slower than eight.

use super::mask::{SCORES, SIDE, Sight, Tile};
use super::tile::{BAND, padded};
use super::{Fold, Geometry};
use crate::polynomial::{exp2_above, exp2_normal, ln, tanh};
use crate::rows::lanes::map;
use crate::simd::{Kernel, Simd};
use std::f32::consts::LN_2;
use std::ops::Range;

/// How far, in powers of two, a logit may lie above what is taken for the maximum: 2^8 times 64 keys is far from infinity.
pub(super) const SLACK: f32 = 8.0;

/// The state of an online softmax, a query row each: what is taken for the maximum (in powers of two), sum of exponentials, and
/// the factor by which the last block scaled what came before it.
pub(super) struct Online {
    pub(super) max: [f32; SIDE],
    pub(super) sum: [f32; SIDE],
    pub(super) rescale: [f32; SIDE],
}

impl Online {
    pub(super) fn new() -> Self {
        Online {
            max: [f32::NEG_INFINITY; SIDE],
            sum: [0.0; SIDE],
            rescale: [0.0; SIDE],
        }
    }
}

impl Online {
    /// Whether powers may be taken with these maxima as they are, if no score of the next block is far above.
    pub(super) fn is_near(&self, columns: usize) -> bool {
        self.max[..columns].iter().all(|x| x.abs() <= LIMIT)
    }

    /// Moves on by a block whose powers were taken with the maxima as they are, if its greatest scores allow that.
    #[inline(always)]
    pub(super) fn accept<S: Simd>(&mut self, s: S, columns: usize, of: &Sums) -> bool {
        let greatest = self.max[..columns].iter().zip(&of.most);
        // As in [`Step::raise`], where this would move a maximum.
        if greatest
            .into_iter()
            .any(|(old, most)| old + SLACK < most.round_ties_even())
        {
            return false;
        }
        for at in (0..columns).step_by(S::LANES) {
            let sum = s.add(s.load(&self.sum[at..]), s.load(&of.sum[at..]));
            s.store(&mut self.sum[at..], sum);
        }
        true
    }
}

/// Sums of powers and greatest scores of a block's columns.
pub(super) struct Sums {
    pub(super) sum: [f32; SIDE],
    pub(super) most: [f32; SIDE],
}

impl Sums {
    pub(super) fn new() -> Self {
        Sums {
            sum: [0.0; SIDE],
            most: [f32::NEG_INFINITY; SIDE],
        }
    }
}

/// Scores [keys, rows] become e^(logit - maximum), and the state moves on by one block. True if a maximum moved.
pub(super) struct Step<'a> {
    pub(super) g: &'a Geometry<'a>,
    pub(super) tile: Tile,
    pub(super) fold: Fold,
    pub(super) sight: Sight,
    pub(super) keys: Range<usize>,
    pub(super) ends: &'a [usize],
    pub(super) scores: &'a mut [f32],
    pub(super) online: &'a mut Online,
}

impl Kernel for Step<'_> {
    type Output = bool;

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) -> bool {
        let n = self.keys.len();
        let columns = padded(self.tile.rows);
        if let Some(cap) = self.fold.cap {
            for at in (0..columns).step_by(S::LANES) {
                let n = n.min(self.ends[at / BAND]);
                for row in self.scores.chunks_exact_mut(SCORES).take(n) {
                    let t = tanh(s, s.load(&row[at..]));
                    s.store(&mut row[at..], s.mul(t, s.splat(cap)));
                }
            }
        }
        if self.sight == Sight::Some {
            self.tile.hide(s, self.g, &self.keys, self.scores);
        }
        let (mut base, mut moved) = ([0f32; SIDE], false);
        for at in (0..columns).step_by(S::LANES) {
            moved |= self.raise(s, at, &mut base);
        }
        let near = base[..columns].iter().all(|x| x.abs() <= LIMIT);
        let mut at = 0;
        while at < columns {
            at += if !near {
                self.powers::<S, 1, false>(s, at, &base)
            } else if at + 4 * S::LANES <= columns
                && self.seen(at) == self.seen(at + 4 * S::LANES - 1)
            {
                self.powers::<S, 4, true>(s, at, &base)
            } else {
                self.powers::<S, 1, true>(s, at, &base)
            };
        }
        moved
    }
}

/// The greatest |maximum| with which [`exp2_above`] deals.
const LIMIT: f32 = 1e6;

impl Step<'_> {
    /// How many of the keys the query row in column `at` sees.
    #[inline(always)]
    fn seen(&self, at: usize) -> usize {
        self.keys.len().min(self.ends[at / BAND])
    }

    /// Moves the maxima of the columns from `at` on, a vector of them, and leaves what is taken away from their scores in `base`.
    /// True if one moved.
    ///
    /// A maximum is an integer: it need not be exact, and an exponential then takes two operations less.
    #[inline(always)]
    fn raise<S: Simd>(&mut self, s: S, at: usize, base: &mut [f32; SIDE]) -> bool {
        let none = s.splat(f32::NEG_INFINITY);
        let block = s.round(maximum(s, self.scores, at, self.seen(at)));
        let old = s.load(&self.online.max[at..]);
        let max = s.select(s.lt(s.add(old, s.splat(SLACK)), block), block, old);
        // While nothing is visible, 0 stands in for the maximum, so that infinities are not subtracted.
        let new = s.select(s.eq(max, none), s.zero(), max);
        s.store(&mut base[at..], new);
        s.store(&mut self.online.max[at..], max);
        let rescale = &mut self.online.rescale[at..at + S::LANES];
        s.store(rescale, exp2_normal(s, s.sub(old, new)));
        rescale.iter().any(|&x| x != 1.0)
    }

    /// Powers of the scores in `W` vectors of columns from `at` on, and their sums. Gives the number of columns.
    ///
    /// Four vectors side by side keep the processor busy while it waits for each. With the integral maximum that made forwards
    /// of heads of 64 over 1024 tokens 1 to 7 % faster on a Xeon with AVX-512.
    #[inline(always)]
    fn powers<S: Simd, const W: usize, const NEAR: bool>(
        &mut self,
        s: S,
        at: usize,
        base: &[f32; SIDE],
    ) -> usize {
        let n = self.seen(at);
        let (mut bases, mut sums) = ([s.zero(); W], [s.zero(); W]);
        for (v, x) in bases.iter_mut().enumerate() {
            *x = s.load(&base[at + v * S::LANES..]);
        }
        for row in &mut self.scores.as_chunks_mut::<SCORES>().0[..n] {
            for (v, (&base, sum)) in bases.iter().zip(&mut sums).enumerate() {
                let x = &mut row[at + v * S::LANES..];
                let score = s.load(x);
                let mut p = exp2_above(s, score, base);
                if !NEAR {
                    // Row by row: another row's maximum changes no bit of this one.
                    let near = s.le(s.abs(base), s.splat(LIMIT));
                    p = s.select(near, p, exp2_normal(s, s.sub(score, base)));
                }
                s.store(x, p);
                *sum = s.add(*sum, p);
            }
        }
        for (v, &sum) in sums.iter().enumerate() {
            let at = at + v * S::LANES;
            let before = s.load(&self.online.sum[at..]);
            let rescale = s.load(&self.online.rescale[at..]);
            s.store(&mut self.online.sum[at..], s.fma(before, rescale, sum));
        }
        W * S::LANES
    }
}

/// The greatest of the first n rows of scores, in the columns from `at` on.
#[inline(always)]
pub(super) fn maximum<S: Simd>(s: S, scores: &[f32], at: usize, n: usize) -> S::V {
    // Four maxima at once hide the latency of each; a maximum does not depend on the order.
    let mut parts = [s.splat(f32::NEG_INFINITY); 4];
    let rows = &scores.as_chunks::<SCORES>().0[..n];
    let (fours, rest) = rows.as_chunks::<4>();
    for rows in fours {
        for (part, row) in parts.iter_mut().zip(rows) {
            *part = s.max(*part, s.load(&row[at..]));
        }
    }
    for row in rest {
        parts[0] = s.max(parts[0], s.load(&row[at..]));
    }
    s.max(s.max(parts[0], parts[1]), s.max(parts[2], parts[3]))
}

/// ln sum e^logit of the first `rows` rows, and some more; minus infinity where nothing was visible.
#[inline(always)]
pub(super) fn log_sum_exp<S: Simd>(
    s: S,
    rows: usize,
    max: &[f32; SIDE],
    sum: &[f32; SIDE],
) -> [f32; SIDE] {
    let (mut lse, rows) = ([0f32; SIDE], padded(rows));
    map(
        s,
        [&max[..rows], &sum[..rows]],
        &mut lse[..rows],
        #[inline(always)]
        |[max, sum]| s.fma(max, s.splat(LN_2), ln(s, sum)),
    );
    lse
}
