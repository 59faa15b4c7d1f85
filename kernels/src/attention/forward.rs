//! Forward: a task is some tiles of query rows of one key head, which meet the blocks of keys in ascending order.
//!
//! The tiles of a task share a block of keys and values, which is copied once for them: tile by tile, the copies alone took 16 %
//! of the time.

// Each task writes the output rows of its own tiles.
#![allow(unsafe_code)]

use super::heads::OutRows;
use super::mask::{SCORES, SIDE, Sight, Tile};
use super::online::{Online, Step, Sums, log_sum_exp};
use super::seen::{Seen, finite};
use super::tile::{Columns, LINE, Left, Part, Powers, Product, Start, padded, pitch};
use super::{Fold, Geometry, Heads, Inputs, Unit};
use crate::dtype::{Slice, SliceMut};
use crate::rows::lanes::{map, narrow_into, widen_into};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use std::ops::Range;

/// Tiles of a task at most.
pub(super) const TILES: usize = 8;

/// f32 of scratch that a task needs.
pub(super) fn scratch(head_dim: usize, tiles: usize) -> usize {
    let line = pitch(head_dim);
    #[cfg(target_arch = "x86_64")]
    let unit = super::narrow::forward::scratch(head_dim, tiles);
    #[cfg(not(target_arch = "x86_64"))]
    let unit = 0;
    // Q transposed and O of each tile; K, V; scores; rows to transpose.
    let vectors = tiles * (head_dim * SCORES + SIDE * line)
        + 2 * SIDE * line
        + SIDE * SCORES
        + LINE * head_dim;
    vectors.max(unit)
}

/// Where a task leaves its results.
pub(super) enum Sink<'a> {
    /// Outputs and log-sum-exps.
    Rows(&'a OutRows<'a>, &'a OutRows<'a>),
    /// Sums over the task's keys alone, to be merged with those of others: a tile's [`partial`] each.
    Partial(&'a mut [f32]),
}

/// f32 of a tile's sums over some of the keys: for each row a maximum and a sum of exponentials, then rows of outputs.
pub(super) const fn partial(head_dim: usize) -> usize {
    SIDE * (2 + padded(head_dim))
}

/// Some tiles of query rows of a key head against the blocks of keys that they see, of those in `blocks`.
pub(super) struct Forward<'a> {
    pub(super) inputs: Inputs<'a>,
    pub(super) unit: usize,
    pub(super) tiles: Range<usize>,
    pub(super) blocks: Range<usize>,
    pub(super) sink: Sink<'a>,
    pub(super) scratch: &'a mut [f32],
}

impl Forward<'_> {
    /// Runs on the unit that multiplies tiles if there is one, else on vectors. `scratch` holds [`scratch`] f32.
    pub(super) fn run(self, isa: Isa, unit: Unit) {
        match unit {
            #[cfg(target_arch = "x86_64")]
            Some(unit) => unit.run(super::narrow::forward::OnUnit(self)),
            #[cfg(not(target_arch = "x86_64"))]
            Some(none) => match none {},
            None => dispatch(isa, self),
        }
    }
}

/// A tile of queries on its way through the keys.
struct Query<'a> {
    tile: Tile,
    head_dim: usize,
    /// Queries, scaled, as columns.
    qt: &'a mut [f32],
    /// Sums of the values, not yet divided.
    o: &'a mut [f32],
    online: Online,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Inputs { g, q, k, v } = self.inputs;
        let (d, line) = (g.head_dim, pitch(g.head_dim));
        let fold = Fold::new(g);
        let (k_block, rest) = self.scratch.split_at_mut(SIDE * line);
        let (v_block, rest) = rest.split_at_mut(SIDE * line);
        let (scores, rest) = rest.split_at_mut(SIDE * SCORES);
        let (row, mut rest) = rest.split_at_mut(LINE * d);
        let mut queries: [Option<Query>; TILES] = [const { None }; TILES];
        let mut seen = self.blocks.end..self.blocks.start;
        for (query, index) in queries.iter_mut().zip(self.tiles.clone()) {
            let tile = g.tile(self.unit, index);
            let (qt, after) = rest.split_at_mut(d * SCORES);
            let (o, after) = after.split_at_mut(SIDE * line);
            rest = after;
            load_transposed(s, g, q, tile, fold.query, qt, row);
            o[..tile.rows * line].fill(0.0);
            let blocks = tile.blocks(g);
            if !blocks.is_empty() {
                seen = seen.start.min(blocks.start)..seen.end.max(blocks.end);
            }
            let online = Online::new();
            *query = Some(Query {
                tile,
                head_dim: d,
                qt,
                o,
                online,
            });
        }
        for block in seen.start.max(self.blocks.start)..seen.end.min(self.blocks.end) {
            let keys = block * SIDE..((block + 1) * SIDE).min(g.keys);
            let sees = |q: &Query| {
                let inside = q.tile.blocks(g).contains(&block);
                if inside {
                    q.tile.sight(g, &keys)
                } else {
                    Sight::Nothing
                }
            };
            if queries.iter().flatten().all(|q| sees(q) == Sight::Nothing) {
                continue;
            }
            let any = g.tile(self.unit, self.tiles.start);
            let k = rows(s, k, any, keys.clone(), d, k_block);
            let v = rows(s, v, any, keys.clone(), d, v_block);
            let next = keys.end..(keys.end + SIDE).min(g.keys);
            for (i, query) in queries.iter_mut().flatten().enumerate() {
                ask(
                    s,
                    [self.inputs.k, self.inputs.v],
                    any,
                    part(&next, i, self.tiles.len()),
                    d,
                );
                let sight = sees(query);
                if sight != Sight::Nothing {
                    query.meet(s, g, fold, sight, &keys, k, v, scores);
                }
            }
        }
        let mut sink = self.sink;
        for (i, query) in queries.iter().flatten().enumerate() {
            match &mut sink {
                Sink::Rows(o, lse) => query.finish(s, g, o, lse, &mut row[..d]),
                Sink::Partial(to) => {
                    let each = partial(d);
                    query.leave(s, d, &mut to[i * each..][..each]);
                }
            }
        }
    }
}

/// Bytes of a cache line.
const CACHE_LINE: usize = 64;

fn address(x: Slice) -> *const u8 {
    match x {
        Slice::F32(x) => x.as_ptr().cast(),
        Slice::Bf16(x) => x.as_ptr().cast(),
        Slice::F16(x) => x.as_ptr().cast(),
        Slice::U32(x) => x.as_ptr().cast(),
    }
}

/// Part i of n of a range.
pub(super) fn part(range: &Range<usize>, i: usize, n: usize) -> Range<usize> {
    let edge = |i: usize| range.start + range.len() * i / n;
    edge(i)..edge(i + 1)
}

/// Asks for some rows of keys and values: rows of tokens lie a page apart, where the processor itself does not look ahead.
#[inline(always)]
pub(super) fn ask<S: Simd>(s: S, x: [Heads; 2], tile: Tile, keys: Range<usize>, d: usize) {
    for key in keys {
        for x in x {
            let bytes = d * x.data.dtype().size();
            let first = address(x.row(tile.batch, tile.kv_head, key, d));
            for at in (0..bytes).step_by(CACHE_LINE) {
                s.prefetch(first.wrapping_add(at));
            }
        }
    }
}

impl Query<'_> {
    /// Adds what the tile sees of a block of keys.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn meet<S: Simd>(
        &mut self,
        s: S,
        g: &Geometry,
        fold: Fold,
        sight: Sight,
        keys: &Range<usize>,
        k: Left,
        v: Left,
        scores: &mut [f32],
    ) {
        let (tile, d) = (self.tile, g.head_dim);
        let ends = &tile.ends(g, keys);
        let moved = !self.powers(s, fold, sight, keys, k, scores) && {
            s.run(self.scores(keys, k, scores, Part::Scores(ends)));
            s.run(Step {
                g,
                tile,
                fold,
                sight,
                keys: keys.clone(),
                ends,
                scores,
                online: &mut self.online,
            })
        };
        let start = if moved {
            Start::Scaled(&self.online.rescale)
        } else {
            Start::Resume
        };
        let sees_all = sight == Sight::All;
        if !sees_all && !finite(s, ends[ends.len() - 1], padded(d), (v.data, v.pitch)) {
            let seen = Seen {
                g,
                tile,
                keys,
                weights: scores,
            };
            let factors = moved.then_some(&self.online.rescale[..]);
            return seen.of_rows(d, (v.data, v.pitch), (self.o, pitch(d)), factors);
        }
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
            c: self.o,
            c_pitch: pitch(d),
            start,
            part: Part::Keys(ends),
        });
    }

    /// Scores [keys, rows] of a block of keys.
    #[inline(always)]
    fn scores<'a>(
        &'a self,
        keys: &Range<usize>,
        k: Left<'a>,
        scores: &'a mut [f32],
        part: Part<'a>,
    ) -> Product<'a> {
        Product {
            m: keys.len(),
            n: padded(self.tile.rows),
            k: self.head_dim,
            a: k,
            b: self.qt,
            b_pitch: SCORES,
            c: scores,
            c_pitch: SCORES,
            start: Start::Zero,
            part,
        }
    }

    /// Powers of a block's scores by the maxima before it, and the state moved on. False if they are not to be had so.
    #[inline(always)]
    fn powers<S: Simd>(
        &mut self,
        s: S,
        fold: Fold,
        sight: Sight,
        keys: &Range<usize>,
        k: Left,
        scores: &mut [f32],
    ) -> bool {
        let columns = padded(self.tile.rows);
        if sight != Sight::All || fold.cap.is_some() || !self.online.is_near(columns) {
            return false;
        }
        let mut of = Sums::new();
        s.run(Powers {
            product: self.scores(keys, k, scores, Part::Scores(&[])),
            columns: Columns {
                base: &self.online.max,
                sum: &mut of.sum,
                most: &mut of.most,
            },
        });
        self.online.accept(s, columns, &of)
    }

    /// Divides by the sums and writes outputs and log-sum-exps.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, g: &Geometry, o: &OutRows, lse: &OutRows, row: &mut [f32]) {
        let (d, line, sum) = (g.head_dim, pitch(g.head_dim), &self.online.sum);
        let ln_sum = log_sum_exp(s, self.tile.rows, &self.online.max, sum);
        for r in 0..self.tile.rows {
            let (t, h) = self.tile.token(g, r);
            divide(s, &self.o[r * line..][..d], sum[r], row);
            // SAFETY: tiles of distinct tasks have distinct rows, and this one is written once.
            unsafe {
                narrow_into(s, row, o.row(self.tile.batch, h, t));
                if let SliceMut::F32(to) = lse.row(self.tile.batch, h, t) {
                    to[0] = ln_sum[r];
                }
            }
        }
    }

    /// Leaves maxima, sums and outputs as they are.
    #[inline(always)]
    fn leave<S: Simd>(&self, s: S, d: usize, to: &mut [f32]) {
        let (max, rest) = to.split_at_mut(SIDE);
        let (sum, rows) = rest.split_at_mut(SIDE);
        max.copy_from_slice(&self.online.max);
        sum.copy_from_slice(&self.online.sum);
        let from = self.o.chunks_exact(pitch(d)).take(self.tile.rows);
        for (from, to) in from.zip(rows.chunks_exact_mut(padded(d))) {
            for at in (0..padded(d)).step_by(S::LANES) {
                s.store(&mut to[at..], s.load(&from[at..]));
            }
        }
    }
}

/// row = o / sum; 0 where nothing was visible, NaN with a NaN.
#[inline(always)]
pub(super) fn divide<S: Simd>(s: S, o: &[f32], sum: f32, row: &mut [f32]) {
    let seen = sum > 0.0 || sum.is_nan();
    let factor = s.splat(if seen { 1.0 / sum } else { 0.0 });
    map(
        s,
        [o],
        row,
        #[inline(always)]
        |[x]| s.mul(x, factor),
    );
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
        if here == 1 {
            // One lane of each vector: a square would be 64 moves for 16 numbers.
            for (x, to) in rows[..d].iter().zip(to.chunks_exact_mut(SCORES)) {
                let x = s.load_first(std::slice::from_ref(x));
                s.store(&mut to[first..], s.mul(x, factor));
            }
            continue;
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
