//! Forward: a task is a tile of query rows, which meets the blocks of keys in ascending order.

// Each task writes the output rows of its own tile.
#![allow(unsafe_code)]

use super::heads::OutRows;
use super::mask::{SCORES, SIDE, Sight, Tile};
use super::tile::{BAND, LINE, Left, Part, Product, Start, padded, pitch};
use super::{Fold, Geometry, Heads};
use crate::cpu::polynomial::{exp2, ln, tanh};
use crate::cpu::rows::lanes::{map, narrow_into, widen_into};
use crate::cpu::simd::{Kernel, Simd};
use crate::dtype::{Slice, SliceMut};
use std::f32::consts::LN_2;
use std::ops::Range;

/// f32 of scratch that a task needs.
pub(super) fn scratch(head_dim: usize) -> usize {
    let d = pitch(head_dim);
    // Q transposed, scores; O, K, V; rows to transpose.
    head_dim * SCORES + SIDE * SCORES + 3 * SIDE * d + LINE * head_dim
}

/// One tile of query rows against all keys that it sees.
pub(super) struct Forward<'a> {
    pub(super) g: &'a Geometry<'a>,
    pub(super) q: Heads<'a>,
    pub(super) k: Heads<'a>,
    pub(super) v: Heads<'a>,
    pub(super) o: &'a OutRows<'a>,
    pub(super) lse: &'a OutRows<'a>,
    pub(super) tile: Tile,
    pub(super) scratch: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (g, tile) = (self.g, self.tile);
        let (d, line) = (g.head_dim, pitch(g.head_dim));
        let fold = Fold::new(g);
        let (qt, rest) = self.scratch.split_at_mut(d * SCORES);
        let (scores, rest) = rest.split_at_mut(SIDE * SCORES);
        let (o, rest) = rest.split_at_mut(SIDE * line);
        let (k, rest) = rest.split_at_mut(SIDE * line);
        let (v, row) = rest.split_at_mut(SIDE * line);
        load_transposed(s, g, self.q, tile, fold.query, qt, row);
        let row = &mut row[..d];
        o.fill(0.0);
        let mut online = Online::new();
        for block in tile.blocks(g) {
            let keys = block * SIDE..((block + 1) * SIDE).min(g.keys);
            let sight = tile.sight(g, &keys);
            if sight == Sight::Nothing {
                continue;
            }
            let ends = &tile.ends(g, &keys);
            let k = rows(s, self.k, tile, keys.clone(), d, k);
            let v = rows(s, self.v, tile, keys.clone(), d, v);
            s.run(Product {
                m: keys.len(),
                n: padded(tile.rows),
                k: d,
                a: k,
                b: qt,
                b_pitch: SCORES,
                c: scores,
                c_pitch: SCORES,
                start: Start::Zero,
                part: Part::Scores(ends),
            });
            s.run(Step {
                g,
                tile,
                fold,
                sight,
                keys: keys.clone(),
                ends,
                scores,
                online: &mut online,
            });
            // While no maximum moves, nothing has to be scaled.
            let start = if online.rescale[..tile.rows].iter().all(|&x| x == 1.0) {
                Start::Resume
            } else {
                Start::Scaled(&online.rescale)
            };
            s.run(Product {
                m: tile.rows,
                n: padded(d),
                k: keys.len(),
                a: Left {
                    data: scores,
                    pitch: SCORES,
                    transposed: true,
                },
                b: v.data,
                b_pitch: v.pitch,
                c: o,
                c_pitch: line,
                start,
                part: Part::Keys(ends),
            });
        }
        let lse = online.finish(s);
        for r in 0..tile.rows {
            let (t, h) = tile.token(g, r);
            let factor = s.splat(if online.sum[r] > 0.0 || online.sum[r].is_nan() {
                1.0 / online.sum[r]
            } else {
                0.0
            });
            let acc = &o[r * line..][..d];
            map(
                s,
                [acc],
                row,
                #[inline(always)]
                |[x]| s.mul(x, factor),
            );
            // SAFETY: tiles of distinct tasks have distinct rows, and this one is written once.
            unsafe {
                narrow_into(s, row, self.o.row(tile.batch, h, t));
                if let SliceMut::F32(to) = self.lse.row(tile.batch, h, t) {
                    to[0] = lse[r];
                }
            }
        }
    }
}

/// Widens rows `keys` of a key head to `to`, `pitch(d)` apart, padded with zeros to whole lines.
#[inline(always)]
pub(super) fn load<S: Simd>(
    s: S,
    x: Heads,
    tile: Tile,
    keys: Range<usize>,
    d: usize,
    to: &mut [f32],
) {
    let line = pitch(d);
    for (key, to) in keys.zip(to.chunks_exact_mut(line)) {
        widen_into(s, x.row(tile.batch, tile.kv_head, key, d), &mut to[..d]);
        to[d..padded(d)].fill(0.0);
    }
}

/// Rows `keys` of a key head as a tile: as they lie where they are f32 and do not crowd into a few sets of the first cache, else
/// copied to `to`.
#[inline(always)]
pub(super) fn rows<'a, S: Simd>(
    s: S,
    x: Heads<'a>,
    tile: Tile,
    keys: Range<usize>,
    d: usize,
    to: &'a mut [f32],
) -> Left<'a> {
    let stride = x.strides[2];
    let lies_well = stride == 64 || stride % (2 * LINE) == LINE;
    if let (Slice::F32(data), true) = (x.data, lies_well && d.is_multiple_of(LINE)) {
        let at = tile.batch * x.strides[0] + tile.kv_head * x.strides[1] + keys.start * stride;
        return Left {
            data: &data[at..at + (keys.len() - 1) * stride + d],
            pitch: stride,
            transposed: false,
        };
    }
    load(s, x, tile, keys, d, to);
    Left {
        data: to,
        pitch: pitch(d),
        transposed: false,
    }
}

/// Writes the tile's query rows, times `factor`, as the columns of `to` [d, rows], padded with zeros to whole lines.
#[inline(always)]
pub(super) fn load_transposed<S: Simd>(
    s: S,
    g: &Geometry,
    x: Heads,
    tile: Tile,
    factor: f32,
    to: &mut [f32],
    rows: &mut [f32],
) {
    let (d, lanes) = (g.head_dim, S::LANES);
    let factor = s.splat(factor);
    for first in (0..padded(tile.rows)).step_by(lanes) {
        let here = lanes.min(tile.rows.saturating_sub(first));
        for (r, row) in rows.chunks_exact_mut(d).enumerate().take(here) {
            let (t, h) = tile.token(g, first + r);
            widen_into(s, x.row(tile.batch, h, t, d), row);
        }
        for c in (0..d).step_by(lanes) {
            let deep = lanes.min(d - c);
            let mut square = [s.zero(); 16];
            let square = &mut square[..lanes];
            for (v, row) in square.iter_mut().zip(rows.chunks_exact(d)).take(here) {
                *v = s.mul(s.load_first(&row[c..c + deep]), factor);
            }
            s.transpose(square);
            for (i, v) in square.iter().enumerate().take(deep) {
                s.store(&mut to[(c + i) * SCORES + first..], *v);
            }
        }
    }
}

/// The state of an online softmax, a query row each: maximum (in powers of two), sum of exponentials, and the factor by
/// which the last block scaled what came before it.
pub(super) struct Online {
    max: [f32; SIDE],
    sum: [f32; SIDE],
    rescale: [f32; SIDE],
}

impl Online {
    fn new() -> Self {
        Online {
            max: [f32::NEG_INFINITY; SIDE],
            sum: [0.0; SIDE],
            rescale: [0.0; SIDE],
        }
    }

    /// ln sum e^logit of each row; minus infinity where nothing was visible.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S) -> [f32; SIDE] {
        let mut lse = [0f32; SIDE];
        map(
            s,
            [&self.max, &self.sum],
            &mut lse,
            #[inline(always)]
            |[max, sum]| s.fma(max, s.splat(LN_2), ln(s, sum)),
        );
        lse
    }
}

/// Scores [keys, rows] become e^(logit - maximum), and the state moves on by one block.
struct Step<'a> {
    g: &'a Geometry<'a>,
    tile: Tile,
    fold: Fold,
    sight: Sight,
    keys: Range<usize>,
    ends: &'a [usize],
    scores: &'a mut [f32],
    online: &'a mut Online,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
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
        let none = s.splat(f32::NEG_INFINITY);
        for at in (0..columns).step_by(S::LANES) {
            let n = n.min(self.ends[at / BAND]);
            // Four maxima at once hide the latency of each; a maximum does not depend on the order.
            let mut parts = [none; 4];
            for (j, row) in self.scores.chunks_exact(SCORES).take(n).enumerate() {
                parts[j % 4] = s.max(parts[j % 4], s.load(&row[at..]));
            }
            let block = s.max(s.max(parts[0], parts[1]), s.max(parts[2], parts[3]));
            let old = s.load(&self.online.max[at..]);
            let max = s.max(old, block);
            // While nothing is visible, 0 stands in for the maximum, so that infinities are not subtracted.
            let base = s.select(s.eq(max, none), s.zero(), max);
            let rescale = exp2(s, s.sub(old, base));
            let mut sum = s.zero();
            for row in self.scores.chunks_exact_mut(SCORES).take(n) {
                let p = exp2(s, s.sub(s.load(&row[at..]), base));
                s.store(&mut row[at..], p);
                sum = s.add(sum, p);
            }
            let before = s.load(&self.online.sum[at..]);
            s.store(&mut self.online.sum[at..], s.fma(before, rescale, sum));
            s.store(&mut self.online.max[at..], max);
            s.store(&mut self.online.rescale[at..], rescale);
        }
    }
}
