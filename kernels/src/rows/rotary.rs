//! Rotary positions (Su et al. 2021): pairs of elements of a head turned by an angle that grows with the token's position.

use super::lanes::{narrow_into, widen};
use super::parallel::{Out, for_rows, part_mut};
use crate::dtype::{Slice, SliceMut};
use crate::memory::with_scratch_f32;
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryStyle {
    /// i and i + rotary_dim / 2, as in GPT-NeoX and Llama's published checkpoints.
    Halves,
    /// 2 i and 2 i + 1, as in the paper.
    Pairs,
}

/// The shape of a rotation.
#[derive(Clone, Copy, Debug)]
pub struct Rotary {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub tokens: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that turn; even. The others are copied.
    pub rotary_dim: usize,
    /// Which elements form a pair.
    pub style: RotaryStyle,
    /// Turn back, as the gradient does.
    pub inverse: bool,
}

/// For pair i of every head at token t: (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) with cos[t, i], sin[t, i]; with
/// -sin if `inverse`.
///
/// x, y: [batch, tokens, heads, head_dim]; cos, sin: [tokens, rotary_dim / 2]. Panics on other lengths.
pub fn rotary(x: Slice, y: SliceMut, shape: Rotary, cos: &[f32], sin: &[f32]) {
    let Rotary {
        batch,
        tokens,
        heads,
        head_dim: d,
        rotary_dim,
        ..
    } = shape;
    assert!(
        rotary_dim % 2 == 0 && rotary_dim <= d,
        "rotary_dim {rotary_dim} is not even or exceeds the head's {d}"
    );
    let rows = batch * tokens * heads;
    assert!(
        [x.len(), y.len()] == [rows * d; 2],
        "x or y is not [{batch}, {tokens}, {heads}, {d}]"
    );
    assert!(
        [cos.len(), sin.len()] == [tokens * rotary_dim / 2; 2],
        "cos or sin is not [{tokens}, {}]",
        rotary_dim / 2
    );
    let isa = isa();
    for_rows(rows, d, Out { data: y, width: d }, |range, y| {
        with_scratch_f32(2 * d, |scratch| {
            dispatch(
                isa,
                Rotate {
                    shape,
                    x,
                    cos,
                    sin,
                    range,
                    y: y.data,
                    scratch,
                },
            );
        });
    });
}

struct Rotate<'a> {
    shape: Rotary,
    x: Slice<'a>,
    cos: &'a [f32],
    sin: &'a [f32],
    range: Range<usize>,
    y: SliceMut<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let (d, half) = (self.shape.head_dim, self.shape.rotary_dim / 2);
        let (wide, narrow) = self.scratch.split_at_mut(d);
        let sign = if self.shape.inverse { -1.0 } else { 1.0 };
        for (i, row) in self.range.enumerate() {
            let x = widen(s, self.x, row * d..(row + 1) * d, wide);
            let t = row / self.shape.heads % self.shape.tokens;
            let cos = &self.cos[t * half..(t + 1) * half];
            let sin = &self.sin[t * half..(t + 1) * half];
            let to = part_mut(&mut self.y, i * d..(i + 1) * d);
            match to {
                SliceMut::F32(y) => turn(s, self.shape.style, x, y, cos, sin, sign),
                to => {
                    turn(s, self.shape.style, x, narrow, cos, sin, sign);
                    narrow_into(s, narrow, to);
                }
            }
        }
    }
}

/// One head. Plain products and sums, which the compiler makes vectors of for either style.
#[inline(always)]
fn turn<S: Simd>(
    _: S,
    style: RotaryStyle,
    x: &[f32],
    y: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    sign: f32,
) {
    let half = cos.len();
    let (turning, still) = y.split_at_mut(2 * half);
    match style {
        RotaryStyle::Halves => {
            let (x1, x2) = x[..2 * half].split_at(half);
            let (y1, y2) = turning.split_at_mut(half);
            for i in 0..half {
                let (c, s) = (cos[i], sign * sin[i]);
                y1[i] = x1[i] * c - x2[i] * s;
                y2[i] = x2[i] * c + x1[i] * s;
            }
        }
        RotaryStyle::Pairs => {
            let pairs = x.chunks_exact(2).zip(turning.chunks_exact_mut(2));
            for ((x, y), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                let s = sign * s;
                y[0] = x[0] * c - x[1] * s;
                y[1] = x[1] * c + x[0] * s;
            }
        }
    }
    still.copy_from_slice(&x[2 * half..]);
}
