//! Sums over rows and over everything, in an order that nothing but the shape decides; and the bias that a column sum is
//! the gradient of.

use super::driver::{Run, over_columns, over_rows};
use super::lanes::{map, sums, transform, update, widen, written};
use super::parallel::{Out, for_rows, part};
use crate::Accum;
use crate::dtype::{Slice, SliceMut};
use crate::memory::with_scratch_f32;
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

/// Elements of a block of [`sum`] and [`sum_of_squares`].
const BLOCK: usize = 4096;

/// `out[j] (+)=` sum over rows i, ascending, of `x[i, j]`: one chain a column, which `Accum::Add` resumes.
///
/// x: [r, c] with c = out.len(). Panics unless c divides x's length.
pub fn column_sum(x: Slice, out: &mut [f32], accum: Accum) {
    let c = out.len();
    let rows = x.len().checked_div(c).unwrap_or(0);
    assert_eq!(x.len(), rows * c, "x is not [r, {c}]");
    if accum == Accum::Replace {
        out.fill(0.0);
    }
    over_columns(&ColumnSum { c, rows, x }, rows, c, STRIP, out);
}

/// Rows that are added at a time, so that sums are loaded and stored once for all of them. (Asking for the next strip's memory as a
/// whole before a strip is added made this 1.6 times slower.)
const STRIP: usize = 8;

/// Columns up to which whole rows are added one by one: their sums stay in the first cache, and memory is read as a single stream
/// (1024 columns on one core of a Zen 5: 1.25 times that stream, 1.5 in strips, also with their memory asked for a strip ahead).
const SHORT: usize = 4096;

struct ColumnSum<'a> {
    c: usize,
    rows: usize,
    x: Slice<'a>,
}

impl<'a> Run<&'a mut [f32]> for ColumnSum<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, columns: Range<usize>, out: &'a mut [f32], scratch: &mut [f32]) {
        let elements = |row: usize| row * self.c + columns.start..row * self.c + columns.end;
        let strips = if columns.len() == self.c && self.c <= SHORT {
            0
        } else {
            self.rows / STRIP * STRIP
        };
        for row in (0..strips).step_by(STRIP) {
            let mut wide = scratch.chunks_exact_mut(columns.len().max(1));
            let mut x = [&[][..]; STRIP];
            for (i, x) in x.iter_mut().enumerate() {
                let wide = wide.next().expect("one a row");
                *x = widen(s, self.x, elements(row + i), wide);
            }
            transform::<S, f32, true, STRIP, 1>(
                s,
                x,
                [&mut *out],
                #[inline(always)]
                |x, [mut sum]| {
                    for x in x {
                        sum = s.add(sum, x);
                    }
                    [sum]
                },
            );
        }
        for row in strips..self.rows {
            let x = widen(s, self.x, elements(row), scratch);
            update(
                s,
                [x],
                out,
                #[inline(always)]
                |[x], sum| s.add(sum, x),
            );
        }
    }
}

/// `y[i, j] = x[i, j] + bias[j]`. x, y: `[r, c]`; bias: `[c]`. Panics on other lengths.
pub fn add_bias(x: Slice, bias: Slice, y: SliceMut) {
    let c = bias.len();
    let rows = x.len().checked_div(c).unwrap_or(0);
    assert_eq!(x.len(), rows * c, "x is not [r, {c}]");
    assert_eq!(y.len(), x.len(), "x and y differ in length");
    if c == 0 {
        return;
    }
    let out = Out { data: y, width: c };
    over_rows(&AddBias { c, x, bias }, rows, c, 3 * c, out);
}

struct AddBias<'a> {
    c: usize,
    x: Slice<'a>,
    bias: Slice<'a>,
}

impl<'a> Run<Out<'a>> for AddBias<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, range: Range<usize>, mut y: Out<'a>, scratch: &mut [f32]) {
        let c = self.c;
        let (bias, rest) = scratch.split_at_mut(c);
        let (wide, narrow) = rest.split_at_mut(c);
        let bias = widen(s, self.bias, 0..c, bias);
        for (i, row) in range.enumerate() {
            let x = widen(s, self.x, row * c..(row + 1) * c, wide);
            written(
                s,
                &mut y.data,
                i * c..(i + 1) * c,
                narrow,
                #[inline(always)]
                |y| {
                    map(
                        s,
                        [x, bias],
                        y,
                        #[inline(always)]
                        |[x, b]| s.add(x, b),
                    );
                },
            );
        }
    }
}

/// The sum of all elements: blocks of 4096 by 32 lanes, then a binary tree over the blocks.
pub fn sum(x: Slice) -> f32 {
    total(x, false)
}

/// The sum of all squares, in the order of [`sum`].
pub fn sum_of_squares(x: Slice) -> f32 {
    total(x, true)
}

fn total(x: Slice, squared: bool) -> f32 {
    let isa = isa();
    let blocks = x.len().div_ceil(BLOCK);
    with_scratch_f32(blocks, |parts| {
        for_rows(blocks, BLOCK, &mut *parts, |range, parts| {
            let range = range.start * BLOCK..(range.end * BLOCK).min(x.len());
            let x = part(x, range);
            dispatch(isa, BlockSums { x, squared, parts });
        });
        tree(parts)
    })
}

/// Neighbours are added to each other until one is left; an odd last one is handed on.
fn tree(parts: &mut [f32]) -> f32 {
    let mut n = parts.len();
    while n > 1 {
        for i in 0..n / 2 {
            parts[i] = parts[2 * i] + parts[2 * i + 1];
        }
        if n % 2 == 1 {
            parts[n / 2] = parts[n - 1];
        }
        n = n.div_ceil(2);
    }
    parts.first().copied().unwrap_or(0.0)
}

struct BlockSums<'a> {
    x: Slice<'a>,
    squared: bool,
    parts: &'a mut [f32],
}

impl Kernel for BlockSums<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let mut wide = [0f32; BLOCK];
        let n = self.x.len();
        for (i, sum) in self.parts.iter_mut().enumerate() {
            let x = widen(s, self.x, i * BLOCK..((i + 1) * BLOCK).min(n), &mut wide);
            let [total] = if self.squared {
                sums(
                    s,
                    [x],
                    #[inline(always)]
                    |[x], [sum]| [s.fma(x, x, sum)],
                )
            } else {
                sums(
                    s,
                    [x],
                    #[inline(always)]
                    |[x], [sum]| [s.add(sum, x)],
                )
            };
            *sum = total;
        }
    }
}
