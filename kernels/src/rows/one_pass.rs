//! The maximum of a row and the sum of its exponentials, from one pass over memory.
//!
//! After Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), in powers of two: the sum so far is
//! that of 2^(x log2(e) - offset) with an integer as offset, so that a later, greater maximum only multiplies it by a power
//! of two, which rounds nothing. A vocabulary's row is 200 KB and more, so a second pass reads it from the second cache or beyond:
//! on one thread of a Xeon with AVX-512 two passes took 2.6 times a stream of the same 64 MiB and 2.4 times one of 100 MB, one pass
//! takes 1.0 and 1.5 times.

use super::lanes::{fold, tree_max, tree_sum};
use crate::polynomial::{exp2_of, exp2_offset};
use crate::simd::{POWER, Simd};
use std::f32::consts::LOG2_E;

/// The greatest |maximum| for which x log2(e) and an offset are told apart by one.
const LIMIT: f32 = 1e6;

/// By how many powers of two the maximum may exceed the offset.
const SLACK: f32 = 64.0;

/// Columns of which the maximum gives the first offset.
const FEW: usize = 256;

/// A row's blocks so far.
pub(super) struct OnePass {
    max: f32,
    offset: f32,
    sum: f32,
}

impl OnePass {
    pub(super) fn new() -> Self {
        OnePass {
            max: f32::NEG_INFINITY,
            offset: f32::NEG_INFINITY,
            sum: 0.0,
        }
    }

    /// Blocks of a row whose maximum, over all shards, is known; None if that is infinite or beyond 10^6. The sum has the bits
    /// of a single pass, since powers of two are all that its offsets differ by.
    pub(super) fn below(max: f32) -> Option<Self> {
        let pass = OnePass {
            max,
            offset: nearest(max * LOG2_E),
            sum: 0.0,
        };
        (max.abs() <= LIMIT).then_some(pass)
    }

    /// Adds a block. False if its maximum is infinite or beyond 10^6: the row then needs two passes. A NaN makes the sum NaN.
    #[inline(always)]
    pub(super) fn add<S: Simd>(&mut self, s: S, x: &[f32]) -> bool {
        let none = f32::NEG_INFINITY;
        if self.offset == none {
            // Any of the row's columns tell about where the maximum is.
            let [lanes] = fold(
                s,
                [&x[..x.len().min(FEW)]],
                [none],
                [none],
                #[inline(always)]
                |[x], [max]| [s.max(x, max)],
            );
            if !self.raise(tree_max(lanes)) {
                return false;
            }
        }
        let mut twice = false;
        loop {
            let least = s.splat((self.offset - 125.5) / LOG2_E);
            let shift = s.splat(POWER - self.offset);
            let [sums, lanes] = fold(
                s,
                [x],
                [none],
                [0.0, none],
                #[inline(always)]
                |[x], [sum, max]| {
                    let power = exp2_offset(s, s.max(least, x), shift);
                    [s.add(sum, power), s.max(x, max)]
                },
            );
            let max = tree_max(lanes);
            if twice || max * LOG2_E < self.offset + SLACK {
                self.sum += tree_sum(sums);
                self.max = self.max.max(max);
                return true;
            }
            // Powers may have left f32's range.
            if !self.raise(max) {
                return false;
            }
            twice = true;
        }
    }

    /// Sets the offset for terms up to `max`, if that is possible.
    fn raise(&mut self, max: f32) -> bool {
        let power = nearest(max * LOG2_E);
        self.sum = shrunk(self.sum, self.offset - power);
        self.offset = power;
        max.abs() <= LIMIT
    }

    /// The maximum, and the sum of e^(x - maximum).
    #[inline(always)]
    pub(super) fn finish<S: Simd>(self, s: S) -> (f32, f32) {
        let power = nearest(self.max * LOG2_E);
        let sum = shrunk(self.sum, self.offset - power);
        // The same rounded log2(e) as in each term, so that its error meets x - maximum alone.
        let rest = exp2_of(
            s,
            s.neg_fma(s.splat(self.max), s.splat(LOG2_E), s.splat(power)),
        );
        let mut lanes = [0.0; 16];
        s.store(&mut lanes, rest);
        (self.max, sum * lanes[0])
    }
}

/// To the nearest integer, ties to even, for |x| <= 2^22.
fn nearest(x: f32) -> f32 {
    (x + POWER) - POWER
}

/// x 2^n for integral n <= 0, or 0 where that is below the least normal power.
fn shrunk(x: f32, n: f32) -> f32 {
    if n < -126.0 {
        return 0.0;
    }
    x * f32::from_bits(((127.0 + n) as u32) << 23)
}
