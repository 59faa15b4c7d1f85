//! Forward on the unit: as `forward` in f32.
//!
//! On a Xeon with AMX (2 MiB second cache), one thread, 1024 tokens, heads of 64, nothing hidden: 413 GFLOP/s at first, 496 with a
//! tile's values multiplied after the next tile's scores, so that the unit does not wait for exponentials nor they for it.
//! Half of the time the unit waits for operands: scores, outputs and exponentials of a tile with the block's keys are more than
//! the first cache. Asking for outputs and queries ahead of time made it 9 % slower. Untried: keys that stream past one
//! tile (16 KiB a block to load instead of 40), and tiles of 32 query rows.
//!
//! Exponentials are rounded to bf16 between the products. Two things keep that from showing: sums for the quotient are those of
//! the rounded ones, and maxima follow at once (the f32 kernels let them lag). The rms error against f64 beside PyTorch's, on
//! twelve shapes of normal numbers, and of numbers 1.7 times as large: with neither 1.00 to 1.08 and 1.02 to 1.24 times, with the
//! sums 0.99 to 1.08 and 1.00 to 1.10, with both 0.98 to 0.99 and 0.93 to 0.99. On a Zen 5 the sums cost 0 to 1 % of a forward,
//! the maxima 3 to 5 % (outputs are scaled in most blocks).

// Each task writes the output rows of its own tiles.
#![allow(unsafe_code)]

use super::super::forward::{Forward, Sink, TILES, ask, part as share, partial};
use super::super::mask::{SCORES, SIDE, Sight, Tile};
use super::super::online::{Online, log_sum_exp, maximum};
use super::super::seen::finite_row;
use super::super::tile::padded;
use super::super::{Geometry, Inputs};
use super::{
    BANDS, DEEP, DEPTH, Part, Product, SIDE16, TILE, left, left_transposed, log2_scale,
    right_transposed, row, rows_of_columns, tiles,
};
use crate::dtype::SliceMut;
use crate::polynomial::exp2_coarse;
use crate::rows::lanes::narrow_into;
use crate::simd::{Avx512, OnTiles, Simd, Tiles};
use std::ops::Range;

/// f32 of scratch that a task of `tiles` tiles needs.
pub(in super::super) fn scratch(d: usize, queries: usize) -> usize {
    let (deep, across) = (tiles(d, DEEP), tiles(d, SIDE16));
    // Q and O of each tile; K, V, two P; scores; rows to write.
    queries * (deep * BANDS * TILE + across * SIDE16 * SIDE)
        + (BANDS * deep + across * DEPTH + 2 * DEPTH * BANDS) * TILE
        + SIDE * SCORES
        + SIDE16 * padded(d)
}

/// [`Forward`] on the unit.
pub(in super::super) struct OnUnit<'a>(pub(in super::super) Forward<'a>);

/// For each band the end of the keys that it sees, from the block's first.
type Ends = [usize; BANDS];

/// A tile of queries on its way through the keys.
struct Query<'a> {
    tile: Tile,
    /// Right operand: queries, transposed.
    qt: &'a mut [f32],
    /// Sums of the values [d, rows], not yet divided.
    o: &'a mut [f32],
    online: Online,
    /// Sums of the exponentials as they were rounded for the product with values. What one of them lost o has lost too, and
    /// the quotient has most of it back: where one key outweighs all others, the whole of it.
    rounded: [f32; SIDE],
}

/// A block's left operands: keys, and values transposed.
struct Block<'a> {
    k: &'a mut [f32],
    v: &'a mut [f32],
}

impl OnTiles for OnUnit<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self, s: Avx512, t: Tiles) {
        let task = self.0;
        let Inputs { g, q, k, v } = task.inputs;
        let d = g.head_dim;
        let (deep, across) = (tiles(d, DEEP), tiles(d, SIDE16));
        let mut rest = task.scratch;
        let mut take = |n: usize| {
            let (a, b) = std::mem::take(&mut rest).split_at_mut(n);
            rest = b;
            a
        };
        let block_side = Block {
            k: take(BANDS * deep * TILE),
            v: take(across * DEPTH * TILE),
        };
        let scores = take(SIDE * SCORES);
        let [mut p, mut before] = [take(DEPTH * BANDS * TILE), take(DEPTH * BANDS * TILE)];
        let buffer = take(SIDE16 * padded(d));
        let mut queries: [Option<Query>; TILES] = [const { None }; TILES];
        let mut seen = task.blocks.end..task.blocks.start;
        for (query, index) in queries.iter_mut().zip(task.tiles.clone()) {
            let tile = g.tile(task.unit, index);
            let (qt, o) = (take(deep * BANDS * TILE), take(across * SIDE16 * SIDE));
            right_transposed(
                s,
                tile.rows,
                deep,
                BANDS,
                qt,
                #[inline(always)]
                |r| {
                    let (token, head) = tile.token(g, r);
                    (r < tile.rows).then(|| row(q, tile.batch, head, token, d))
                },
            );
            o.fill(0.0);
            let blocks = tile.blocks(g);
            if !blocks.is_empty() {
                seen = seen.start.min(blocks.start)..seen.end.max(blocks.end);
            }
            let online = Online::new();
            *query = Some(Query {
                tile,
                qt,
                o,
                online,
                rounded: [0.0; SIDE],
            });
        }
        let any = g.tile(task.unit, task.tiles.start);
        for block in seen.start.max(task.blocks.start)..seen.end.min(task.blocks.end) {
            let keys = block * SIDE..((block + 1) * SIDE).min(g.keys);
            let sees = |q: &Query| match q.tile.blocks(g).contains(&block) {
                true => q.tile.sight(g, &keys),
                false => Sight::Nothing,
            };
            if queries.iter().flatten().all(|q| sees(q) == Sight::Nothing) {
                continue;
            }
            let n = keys.len();
            left(
                s,
                n.next_multiple_of(SIDE16),
                deep,
                block_side.k,
                #[inline(always)]
                |r| (r < n).then(|| row(k, any.batch, any.kv_head, keys.start + r, d)),
            );
            left_transposed(
                s,
                t,
                n,
                across,
                DEPTH,
                block_side.v,
                #[inline(always)]
                |r| (r < n).then(|| row(v, any.batch, any.kv_head, keys.start + r, d)),
            );
            let next = keys.end..(keys.end + SIDE).min(g.keys);
            // A tile's values follow the next tile's scores: the unit multiplies while exponentials are computed, and
            // nothing that was just stored is loaded.
            let mut waiting: Option<(&mut Query, Ends, bool)> = None;
            let mut whole = None;
            for (i, query) in queries.iter_mut().flatten().enumerate() {
                ask(s, [k, v], any, share(&next, i, task.tiles.len()), d);
                let sight = sees(query);
                if sight == Sight::Nothing {
                    continue;
                }
                let ends = query.tile.ends(g, &keys);
                query.scores(t, d, &keys, &ends, block_side.k, scores);
                if let Some((query, ends, apart)) = waiting.take() {
                    match apart {
                        true => query.seen_values(s, t, task.inputs, &keys, &ends, before),
                        false => query.values(t, d, &keys, &ends, block_side.v, before),
                    }
                }
                let mut apart = false;
                if sight == Sight::Some {
                    query.tile.hide(s, g, &keys, scores);
                    // What is hidden and not finite may not meet a weight of 0.
                    apart = !*whole.get_or_insert_with(
                        #[inline(always)]
                        || {
                            keys.clone().all(
                                #[inline(always)]
                                |key| finite_row(row(v, any.batch, any.kv_head, key, d)),
                            )
                        },
                    );
                }
                query.exponentials(s, t, log2_scale(g), &ends, scores, p);
                std::mem::swap(&mut p, &mut before);
                waiting = Some((query, ends, apart));
            }
            if let Some((query, ends, apart)) = waiting {
                match apart {
                    true => query.seen_values(s, t, task.inputs, &keys, &ends, before),
                    false => query.values(t, d, &keys, &ends, block_side.v, before),
                }
            }
        }
        let mut sink = task.sink;
        for (i, query) in queries.iter().flatten().enumerate() {
            query.finish(s, g, i, &mut sink, buffer);
        }
    }
}

impl Query<'_> {
    /// Scores [keys, rows] of a block.
    #[inline(always)]
    fn scores(
        &self,
        t: Tiles,
        d: usize,
        keys: &Range<usize>,
        ends: &Ends,
        k: &[f32],
        scores: &mut [f32],
    ) {
        let deep = tiles(d, DEEP);
        Product {
            m: tiles(keys.len(), SIDE16),
            n: tiles(self.tile.rows, SIDE16),
            k: deep,
            a: k,
            a_pitch: deep,
            b: self.qt,
            b_pitch: BANDS,
            c: scores,
            c_pitch: SCORES,
            fresh: true,
            part: Part::Scores(ends),
        }
        .run(t);
    }

    /// Adds the values of a block.
    #[inline(always)]
    fn values(
        &mut self,
        t: Tiles,
        d: usize,
        keys: &Range<usize>,
        ends: &Ends,
        v: &[f32],
        p: &[f32],
    ) {
        Product {
            m: tiles(d, SIDE16),
            n: tiles(self.tile.rows, SIDE16),
            k: tiles(keys.len(), DEEP),
            a: v,
            a_pitch: DEPTH,
            b: p,
            b_pitch: BANDS,
            c: self.o,
            c_pitch: SIDE,
            fresh: false,
            part: Part::Keys(ends),
        }
        .run(t);
    }

    /// [`Query::values`] where hidden ones are not finite: for each query row by itself, with what it does not see left out.
    #[inline(never)]
    fn seen_values(
        &mut self,
        s: Avx512,
        t: Tiles,
        inputs: Inputs,
        keys: &Range<usize>,
        ends: &Ends,
        p: &[f32],
    ) {
        let (g, tile, d) = (inputs.g, self.tile, inputs.g.head_dim);
        let across = tiles(d, SIDE16);
        let before = self.o.to_vec();
        let mut all = before.clone();
        let mut v = vec![0.0; across * DEPTH * TILE];
        for r in 0..tile.rows {
            left_transposed(s, t, keys.len(), across, DEPTH, &mut v, |j| {
                let key = keys.start + j;
                let seen = j < keys.len() && tile.sees(g, r, key);
                seen.then(|| row(inputs.v, tile.batch, tile.kv_head, key, d))
            });
            self.o.copy_from_slice(&before);
            self.values(t, d, keys, ends, &v, p);
            for c in 0..d {
                all[c * SIDE + r] = self.o[c * SIDE + r];
            }
        }
        self.o.copy_from_slice(&all);
    }

    /// From scores to exponentials, a right operand.
    #[inline(always)]
    fn exponentials(
        &mut self,
        s: Avx512,
        t: Tiles,
        scale: f32,
        ends: &Ends,
        scores: &[f32],
        p: &mut [f32],
    ) {
        let bands = tiles(self.tile.rows, SIDE16);
        for (band, &n) in ends.iter().enumerate().take(bands) {
            self.band(s, t, scale, band, n, scores, p);
        }
    }

    /// Scores of a band become e^(logit - maximum), and the band's state moves on by one block.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn band(
        &mut self,
        s: Avx512,
        t: Tiles,
        scale: f32,
        band: usize,
        n: usize,
        scores: &[f32],
        p: &mut [f32],
    ) {
        let at = band * SIDE16;
        let (none, scale) = (s.splat(f32::NEG_INFINITY), s.splat(scale));
        let most = s.mul(maximum(s, scores, at, n), scale);
        let old = s.load(&self.online.max[at..]);
        // No slack here: the power of the greatest score is then exactly 1, which no rounding to bf16 touches.
        let max = s.max(most, old);
        // While nothing is visible, 0 stands in for the maximum, so that infinities are not subtracted.
        let base = s.select(s.eq(max, none), s.zero(), max);
        let less = s.sub(s.zero(), base);
        let (mut sum, mut rounded) = (s.zero(), s.zero());
        let (pairs, _) = scores.as_chunks::<{ 2 * SCORES }>();
        for k in 0..DEPTH {
            let tile = &mut p[(k * BANDS + band) * TILE..][..TILE];
            let (rows, _) = tile.as_chunks_mut::<SIDE16>();
            let here = n.saturating_sub(k * DEEP).min(DEEP);
            let whole = &pairs[k * SIDE16..][..here / 2];
            for (pair, row) in whole.iter().zip(&mut *rows) {
                let low = exp2_coarse(s, s.fma(s.load(&pair[at..]), scale, less));
                let high = exp2_coarse(s, s.fma(s.load(&pair[SCORES + at..]), scale, less));
                sum = s.add(s.add(sum, low), high);
                let both = t.pairs(low, high);
                rounded = t.add_pairs(rounded, both);
                s.store(row, both);
            }
            let mut rest = rows.iter_mut().skip(here / 2);
            if here % 2 == 1 {
                let pair = &pairs[k * SIDE16 + here / 2];
                let low = exp2_coarse(s, s.fma(s.load(&pair[at..]), scale, less));
                sum = s.add(sum, low);
                let both = t.pairs(low, s.zero());
                rounded = t.add_pairs(rounded, both);
                let row = rest.next().expect("half of an odd number is less than 16");
                s.store(row, both);
            }
            rest.for_each(|row| row.fill(0.0));
        }
        let rescale = exp2_coarse(s, s.sub(old, base));
        for (all, block) in [(&mut self.online.sum, sum), (&mut self.rounded, rounded)] {
            let before = s.load(&all[at..]);
            s.store(&mut all[at..], s.fma(before, rescale, block));
        }
        s.store(&mut self.online.max[at..], max);
        s.store(&mut self.online.rescale[at..], rescale);
        let factors = &self.online.rescale[at..at + SIDE16];
        if factors.iter().any(|&x| x != 1.0) {
            for row in self.o.chunks_exact_mut(SIDE) {
                let x = s.mul(s.load(&row[at..]), rescale);
                s.store(&mut row[at..], x);
            }
        }
    }

    /// Writes outputs and log-sum-exps, or leaves maxima, sums and outputs as they are.
    #[inline(always)]
    fn finish(&self, s: Avx512, g: &Geometry, index: usize, sink: &mut Sink, buffer: &mut [f32]) {
        let (tile, d, sum) = (self.tile, g.head_dim, &self.online.sum);
        let seen = |x: f32| x > 0.0 || x.is_nan();
        match sink {
            Sink::Rows(o, lse) => {
                let factor = self.rounded.map(|x| if seen(x) { 1.0 / x } else { 0.0 });
                let ln_sum = log_sum_exp(s, tile.rows, &self.online.max, sum);
                rows_of_columns(
                    s,
                    d,
                    tile.rows,
                    SIDE,
                    self.o,
                    &factor,
                    buffer,
                    // Called and not inlined, it would be compiled without the unit's features.
                    #[inline(always)]
                    |r, row| {
                        let (t, h) = tile.token(g, r);
                        // SAFETY: tiles of distinct tasks have distinct rows, and this one is written once.
                        unsafe {
                            narrow_into(s, row, o.row(tile.batch, h, t));
                            if let SliceMut::F32(to) = lse.row(tile.batch, h, t) {
                                to[0] = ln_sum[r];
                            }
                        }
                    },
                );
            }
            Sink::Partial(to) => {
                let to = &mut to[index * partial(d)..][..partial(d)];
                let (max, rest) = to.split_at_mut(SIDE);
                let (sum, rows) = rest.split_at_mut(SIDE);
                max.copy_from_slice(&self.online.max);
                sum.copy_from_slice(&self.online.sum);
                // Parts are merged by their sums.
                let factor: [f32; SIDE] = std::array::from_fn(
                    #[inline(always)]
                    |r| match seen(self.rounded[r]) {
                        true => sum[r] / self.rounded[r],
                        false => 1.0,
                    },
                );
                rows_of_columns(
                    s,
                    d,
                    tile.rows,
                    SIDE,
                    self.o,
                    &factor,
                    buffer,
                    #[inline(always)]
                    |r, row| {
                        let to = &mut rows[r * padded(d)..][..padded(d)];
                        to[..d].copy_from_slice(row);
                        to[d..].fill(0.0);
                    },
                );
            }
        }
    }
}
