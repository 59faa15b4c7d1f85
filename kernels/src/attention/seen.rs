//! Products of a tile and a block of keys over the visible pairs alone.
//!
//! The products elsewhere multiply what a mask hides by a weight of 0, which changes no bit of a sum as long as the hidden number
//! is finite. Where a block is seen in part and holds a number that is not, these loops take their place: the same chains with the
//! hidden terms left out, so that what is hidden is never read, whatever it is.

use super::Geometry;
use super::mask::{SCORES, Tile};
use crate::simd::Simd;
use half::bf16;
use std::ops::Range;

/// Weights [keys, rows] of a tile and a block of keys.
pub(super) struct Seen<'a> {
    pub(super) g: &'a Geometry<'a>,
    pub(super) tile: Tile,
    pub(super) keys: &'a Range<usize>,
    pub(super) weights: &'a [f32],
}

impl Seen<'_> {
    /// c\[r\] = factor\[r\] c\[r\] + sum over the keys j that row r sees of weight\[j, r\] b\[j\], j ascending; rows of d elements.
    #[inline(never)]
    pub(super) fn of_rows(
        &self,
        d: usize,
        (b, b_pitch): (&[f32], usize),
        (c, c_pitch): (&mut [f32], usize),
        factors: Option<&[f32]>,
    ) {
        for r in 0..self.tile.rows {
            let c = &mut c[r * c_pitch..][..d];
            if let Some(factors) = factors {
                c.iter_mut().for_each(|c| *c *= factors[r]);
            }
            for (j, key) in self.keys.clone().enumerate() {
                if self.tile.sees(self.g, r, key) {
                    add(c, self.weights[j * SCORES + r], &b[j * b_pitch..][..d]);
                }
            }
        }
    }

    /// c\[j\] += sum over the rows r that see key j of weight\[j, r\] b\[r\], r ascending; rows of d elements.
    #[inline(never)]
    pub(super) fn of_keys(
        &self,
        d: usize,
        (b, b_pitch): (&[f32], usize),
        (c, c_pitch): (&mut [f32], usize),
    ) {
        for (j, key) in self.keys.clone().enumerate() {
            let c = &mut c[j * c_pitch..][..d];
            for r in 0..self.tile.rows {
                if self.tile.sees(self.g, r, key) {
                    add(c, self.weights[j * SCORES + r], &b[r * b_pitch..][..d]);
                }
            }
        }
    }
}

fn add(c: &mut [f32], weight: f32, b: &[f32]) {
    for (c, b) in c.iter_mut().zip(b) {
        *c = weight.mul_add(*b, *c);
    }
}

/// Whether `rows` rows of `columns` (whole lines) are finite.
#[inline(always)]
pub(super) fn finite<S: Simd>(
    s: S,
    rows: usize,
    columns: usize,
    (x, pitch): (&[f32], usize),
) -> bool {
    // 0 times a number that is not finite is NaN, and stays one.
    let mut sums = [s.zero(); 2];
    for r in 0..rows {
        let row = &x[r * pitch..][..columns];
        for at in (0..columns).step_by(2 * S::LANES) {
            sums[0] = s.fma(s.load(&row[at..]), s.zero(), sums[0]);
            if at + S::LANES < columns {
                sums[1] = s.fma(s.load(&row[at + S::LANES..]), s.zero(), sums[1]);
            }
        }
    }
    let mut lanes = [0f32; 16];
    s.store(&mut lanes, s.add(sums[0], sums[1]));
    lanes.iter().all(|x| *x == 0.0)
}

/// Whether a row of bf16 is finite.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[inline(always)]
pub(super) fn finite_row(x: &[bf16]) -> bool {
    let mut most = 0;
    for x in x {
        most = (x.to_bits() & 0x7fff).max(most);
    }
    most < bf16::INFINITY.to_bits()
}
