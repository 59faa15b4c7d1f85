//! Backward on the unit: as `backward` in f32, five products for each tile of query rows and block of keys.
//!
//! P and dS are written as left operands for dv and dk (rows of query rows), dS once more as a right operand for dq (pairs
//! of keys): so nothing is transposed between products. On a Xeon with AMX, one thread, heads of 64: 573 GFLOP/s at 1024 tokens with
//! nothing hidden and 452 causal, where the widened kernel gave about 160.

// Each task writes the gradient rows of its own tiles or keys.
#![allow(unsafe_code)]

use super::super::backward::{Arguments, Pass, Run, scaled};
use super::super::mask::{SCORES, SIDE, Sight, Tile};
use super::super::seen::finite_row;
use super::super::tile::padded;
use super::super::{Geometry, Heads};
use super::{
    BANDS, DEEP, DEPTH, Part, Product, SIDE16, TILE, left, left_transposed, log2_scale, right,
    right_transposed, row, rows_of_columns, tiles,
};
use crate::polynomial::exp2_coarse;
use crate::rows::lanes::{narrow_into, sums, widen};
use crate::simd::{Avx512, OnTiles, Simd, Tiles};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// f32 of scratch that a pass over `keys` keys needs.
pub(in super::super) fn scratch(d: usize, keys: usize) -> usize {
    let (deep, across) = (tiles(d, DEEP), tiles(d, SIDE16));
    let width = across * SIDE16;
    // K, V, K transposed; dK, dV.
    let block = (2 * BANDS * deep + across * DEPTH) * TILE + 2 * SIDE * width;
    // Q and dO, transposed and as they are; dQ; scores and dP; P, and dS twice; rows.
    let query = (2 * deep * BANDS + 2 * DEPTH * across) * TILE + width * SIDE;
    let between = 2 * SIDE * SCORES + 3 * BANDS * DEPTH * TILE;
    tiles(keys, SIDE) * block + query + between + SIDE16 * padded(d) + 2 * padded(d)
}

/// [`Run`] on the unit.
pub(in super::super) struct OnUnit<'a>(pub(in super::super) Run<'a>);

/// A pass's keys: left operands of a block after another, and gradients in rows.
struct KeySide<'a> {
    k: &'a mut [f32],
    v: &'a mut [f32],
    kt: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// A tile's queries and output gradients as right operands, and what is computed for it.
struct QuerySide<'a> {
    /// Transposed.
    qt: &'a mut [f32],
    dout_t: &'a mut [f32],
    q: &'a mut [f32],
    dout: &'a mut [f32],
    /// [d, rows].
    dq: &'a mut [f32],
    /// lse log2(e) of each row; infinity where nothing was visible, which makes P zero.
    lse: [f32; SIDE],
    /// D = sum of dout o.
    d: [f32; SIDE],
    /// Queries and output gradients are.
    finite: bool,
}

/// What stands between the products of a tile and a block.
struct Between<'a> {
    scores: &'a mut [f32],
    dp: &'a mut [f32],
    /// Left operands [keys, rows].
    p: &'a mut [f32],
    ds: &'a mut [f32],
    /// Right operand [keys, rows].
    ds_pairs: &'a mut [f32],
}

impl OnTiles for OnUnit<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self, s: Avx512, t: Tiles) {
        let Run {
            pass,
            keys,
            scratch,
        } = self.0;
        let d = pass.arguments.g.head_dim;
        let (deep, across) = (tiles(d, DEEP), tiles(d, SIDE16));
        let (width, blocks) = (across * SIDE16, tiles(keys, SIDE));
        let mut rest = scratch;
        let mut take = |n: usize| {
            let (a, b) = std::mem::take(&mut rest).split_at_mut(n);
            rest = b;
            a
        };
        let mut key_side = KeySide {
            k: take(blocks * BANDS * deep * TILE),
            v: take(blocks * BANDS * deep * TILE),
            kt: take(blocks * across * DEPTH * TILE),
            dk: take(blocks * SIDE * width),
            dv: take(blocks * SIDE * width),
        };
        let mut query_side = QuerySide {
            qt: take(deep * BANDS * TILE),
            dout_t: take(deep * BANDS * TILE),
            q: take(DEPTH * across * TILE),
            dout: take(DEPTH * across * TILE),
            dq: take(width * SIDE),
            lse: [0.0; SIDE],
            d: [0.0; SIDE],
            finite: true,
        };
        let mut between = Between {
            scores: take(SIDE * SCORES),
            dp: take(SIDE * SCORES),
            p: take(BANDS * DEPTH * TILE),
            ds: take(BANDS * DEPTH * TILE),
            ds_pairs: take(BANDS * DEPTH * TILE),
        };
        let (buffer, wide) = (take(SIDE16 * padded(d)), take(2 * padded(d)));
        let first_key = pass.blocks.start * SIDE;
        key_side.load(s, t, &pass, first_key..first_key + keys);
        for tile in pass
            .tiles
            .clone()
            .map(|i| pass.arguments.g.tile(pass.unit, i))
        {
            tile_against_keys(
                s,
                t,
                &pass,
                tile,
                &mut key_side,
                &mut query_side,
                &mut between,
                buffer,
                wide,
            );
        }
        if let Some((dk, dv)) = pass.dkv {
            let head = pass.arguments.g.tile(pass.unit, 0);
            for i in 0..keys {
                let row = &mut buffer[..d];
                scaled(
                    s,
                    &key_side.dk[i * width..][..d],
                    pass.arguments.g.scale,
                    row,
                );
                // SAFETY: a key's gradients belong to one task, and each is written once.
                unsafe {
                    narrow_into(s, row, dk.row(head.batch, head.kv_head, first_key + i));
                    narrow_into(
                        s,
                        &key_side.dv[i * width..][..d],
                        dv.row(head.batch, head.kv_head, first_key + i),
                    );
                }
            }
        }
    }
}

impl KeySide<'_> {
    #[inline(always)]
    fn load(&mut self, s: Avx512, t: Tiles, pass: &Pass, keys: Range<usize>) {
        let (args, d) = (pass.arguments, pass.arguments.g.head_dim);
        let (deep, across) = (tiles(d, DEEP), tiles(d, SIDE16));
        let (batch, head) = (pass.unit / args.g.kv_heads, pass.unit % args.g.kv_heads);
        for (b, first) in keys.clone().step_by(SIDE).enumerate() {
            let n = SIDE.min(keys.end - first);
            let rows = n.next_multiple_of(SIDE16);
            for (x, to) in [(args.k, &mut *self.k), (args.v, &mut *self.v)] {
                left(
                    s,
                    rows,
                    deep,
                    &mut to[b * BANDS * deep * TILE..],
                    #[inline(always)]
                    |r| (r < n).then(|| row(x, batch, head, first + r, d)),
                );
            }
            left_transposed(
                s,
                t,
                n,
                across,
                DEPTH,
                &mut self.kt[b * across * DEPTH * TILE..],
                #[inline(always)]
                |r| (r < n).then(|| row(args.k, batch, head, first + r, d)),
            );
        }
        self.dk.fill(0.0);
        self.dv.fill(0.0);
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile_against_keys(
    s: Avx512,
    t: Tiles,
    pass: &Pass,
    tile: Tile,
    side: &mut KeySide,
    query: &mut QuerySide,
    between: &mut Between,
    buffer: &mut [f32],
    wide: &mut [f32],
) {
    let g = pass.arguments.g;
    let (d, seen) = (g.head_dim, tile.blocks(g));
    let blocks = seen.start.max(pass.blocks.start)..seen.end.min(pass.blocks.end);
    if blocks.is_empty() && pass.dq.is_none() {
        return;
    }
    query.load(s, t, pass.arguments, tile, wide);
    for block in blocks {
        let keys = block * SIDE..((block + 1) * SIDE).min(g.keys);
        let sight = tile.sight(g, &keys);
        if sight == Sight::Nothing {
            continue;
        }
        query.against_block(s, t, pass, tile, sight, keys, side, between);
    }
    if let Some(dq) = pass.dq {
        let scale = [g.scale; SIDE];
        rows_of_columns(
            s,
            d,
            tile.rows,
            SIDE,
            query.dq,
            &scale,
            buffer,
            // Called and not inlined, it would be compiled without the unit's features.
            #[inline(always)]
            |r, row| {
                let (token, h) = tile.token(g, r);
                // SAFETY: a tile belongs to one task, and each of its rows is written once.
                narrow_into(s, row, unsafe { dq.row(tile.batch, h, token) });
            },
        );
    }
}

impl QuerySide<'_> {
    #[inline(always)]
    fn load(&mut self, s: Avx512, t: Tiles, args: &Arguments, tile: Tile, wide: &mut [f32]) {
        let (g, d) = (args.g, args.g.head_dim);
        let (deep, across) = (tiles(d, DEEP), tiles(d, SIDE16));
        let (dout_wide, o_wide) = wide.split_at_mut(padded(d));
        for (x, columns, rows) in [
            (args.q, &mut *self.qt, &mut *self.q),
            (args.dout, &mut *self.dout_t, &mut *self.dout),
        ] {
            right_transposed(
                s,
                tile.rows,
                deep,
                BANDS,
                columns,
                #[inline(always)]
                |r| row_of(g, x, tile, r),
            );
            right(
                s,
                t,
                tile.rows,
                across,
                rows,
                #[inline(always)]
                |r| row_of(g, x, tile, r),
            );
        }
        self.finite = (0..tile.rows).all(
            #[inline(always)]
            |r| {
                [args.q, args.dout].into_iter().all(
                    #[inline(always)]
                    |x| row_of(g, x, tile, r).is_none_or(finite_row),
                )
            },
        );
        (self.lse, self.d) = ([f32::INFINITY; SIDE], [0.0; SIDE]);
        for r in 0..tile.rows {
            let (token, h) = tile.token(g, r);
            let dout = widen(s, args.dout.row(tile.batch, h, token, d), 0..d, dout_wide);
            let o = widen(s, args.o.row(tile.batch, h, token, d), 0..d, o_wide);
            [self.d[r]] = sums(
                s,
                [dout, o],
                #[inline(always)]
                |[a, b], [sum]| [s.fma(a, b, sum)],
            );
            let lse = args.lse[(tile.batch * g.heads + h) * g.queries + token];
            if lse != f32::NEG_INFINITY {
                self.lse[r] = lse * LOG2_E;
            }
        }
        self.dq.fill(0.0);
    }

    /// The five products of one block.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn against_block(
        &mut self,
        s: Avx512,
        t: Tiles,
        pass: &Pass,
        tile: Tile,
        sight: Sight,
        keys: Range<usize>,
        side: &mut KeySide,
        between: &mut Between,
    ) {
        let (g, n) = (pass.arguments.g, keys.len());
        let (deep, across) = (tiles(g.head_dim, DEEP), tiles(g.head_dim, SIDE16));
        let (width, bands) = (across * SIDE16, tiles(tile.rows, SIDE16));
        let b = keys.start / SIDE - pass.blocks.start;
        let ends = &tile.ends(g, &keys);
        for (a, right, c) in [
            (&*side.k, &*self.qt, &mut *between.scores),
            (&*side.v, &*self.dout_t, &mut *between.dp),
        ] {
            Product {
                m: tiles(n, SIDE16),
                n: bands,
                k: deep,
                a: &a[b * BANDS * deep * TILE..],
                a_pitch: deep,
                b: right,
                b_pitch: BANDS,
                c,
                c_pitch: SCORES,
                fresh: true,
                part: Part::Scores(ends),
            }
            .run(t);
        }
        if sight == Sight::Some {
            tile.hide(s, g, &keys, between.scores);
            self.probabilities::<true>(s, t, g, bands, n, ends, between);
        } else {
            self.probabilities::<false>(s, t, g, bands, n, ends, between);
        }
        let args = pass.arguments;
        let of_keys = |a: &[f32], right: &[f32], c: &mut [f32]| {
            Product {
                m: tiles(n, SIDE16),
                n: across,
                k: tiles(tile.rows, DEEP),
                a,
                a_pitch: DEPTH,
                b: right,
                b_pitch: across,
                c,
                c_pitch: width,
                fresh: false,
                part: Part::Queries(ends),
            }
            .run(t);
        };
        if pass.dkv.is_some() {
            for (a, right, x, c) in [
                (&*between.p, &*self.dout, args.dout, &mut *side.dv),
                (&*between.ds, &*self.q, args.q, &mut *side.dk),
            ] {
                let c = &mut c[b * SIDE * width..];
                if sight == Sight::Some && !self.finite {
                    let c = &mut c[..SIDE * width];
                    seen_by_keys(s, t, g, tile, &keys, x, c, |right, c| of_keys(a, right, c));
                } else {
                    of_keys(a, right, c);
                }
            }
        }
        if pass.dq.is_some() {
            let of_rows = |kt: &[f32], c: &mut [f32]| {
                Product {
                    m: across,
                    n: bands,
                    k: tiles(n, DEEP),
                    a: kt,
                    a_pitch: DEPTH,
                    b: between.ds_pairs,
                    b_pitch: BANDS,
                    c,
                    c_pitch: SIDE,
                    fresh: false,
                    part: Part::Keys(ends),
                }
                .run(t);
            };
            let key = |key| row(args.k, tile.batch, tile.kv_head, key, g.head_dim);
            if sight == Sight::Some && !keys.clone().all(|k| finite_row(key(k))) {
                seen_by_rows(s, t, g, tile, &keys, args.k, self.dq, of_rows);
            } else {
                of_rows(&side.kt[b * across * DEPTH * TILE..], self.dq);
            }
        }
    }

    /// From scores and dP to P and dS = P (dP - D). What no query of a band sees is 0, and so is what is `HIDDEN` by minus infinity.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn probabilities<const HIDDEN: bool>(
        &self,
        s: Avx512,
        t: Tiles,
        g: &Geometry,
        bands: usize,
        n: usize,
        ends: &[usize],
        between: &mut Between,
    ) {
        let scale = s.splat(log2_scale(g));
        let (scores, _) = between.scores.as_chunks::<SCORES>();
        let (dp, _) = between.dp.as_chunks::<SCORES>();
        for k in 0..bands.div_ceil(2) {
            // Two bands of query rows fill the 32 columns of a left operand; a missing one is 0.
            let column = [0, 1].map(|i| Column {
                at: (2 * k + i) * SIDE16,
                end: if 2 * k + i < bands {
                    ends[2 * k + i].min(n)
                } else {
                    0
                },
                less: s.sub(s.zero(), s.load(&self.lse[(2 * k + i) * SIDE16..])),
                d: s.load(&self.d[(2 * k + i) * SIDE16..]),
                scale,
            });
            for pair in 0..tiles(n, DEEP) * SIDE16 {
                let j = 2 * pair;
                let (p00, ds00) = column[0].cell::<HIDDEN>(s, scores, dp, j);
                let (p01, ds01) = column[1].cell::<HIDDEN>(s, scores, dp, j);
                let (p10, ds10) = column[0].cell::<HIDDEN>(s, scores, dp, j + 1);
                let (p11, ds11) = column[1].cell::<HIDDEN>(s, scores, dp, j + 1);
                let at = ((j / SIDE16) * DEPTH + k) * TILE + j % SIDE16 * SIDE16;
                s.store(&mut between.p[at..], t.row(p00, p01));
                s.store(&mut between.p[at + SIDE16..], t.row(p10, p11));
                s.store(&mut between.ds[at..], t.row(ds00, ds01));
                s.store(&mut between.ds[at + SIDE16..], t.row(ds10, ds11));
                let at = ((pair / SIDE16) * BANDS + 2 * k) * TILE + pair % SIDE16 * SIDE16;
                s.store(&mut between.ds_pairs[at..], t.pairs(ds00, ds10));
                s.store(&mut between.ds_pairs[at + TILE..], t.pairs(ds01, ds11));
            }
        }
    }
}

/// A product into rows of keys, `c`, where rows of x are not finite that some keys do not see: for each key by itself, with those left out.
#[inline(never)]
#[allow(clippy::too_many_arguments)]
fn seen_by_keys(
    s: Avx512,
    t: Tiles,
    g: &Geometry,
    tile: Tile,
    keys: &Range<usize>,
    x: Heads,
    c: &mut [f32],
    product: impl Fn(&[f32], &mut [f32]),
) {
    let across = tiles(g.head_dim, SIDE16);
    let width = across * SIDE16;
    let (mut operand, mut one) = (vec![0.0; DEPTH * across * TILE], c.to_vec());
    let before = c.to_vec();
    for (j, key) in keys.clone().enumerate() {
        right(s, t, tile.rows, across, &mut operand, |r| {
            let seen = r < tile.rows && tile.sees(g, r, key);
            seen.then(|| row_of(g, x, tile, r)).flatten()
        });
        one.copy_from_slice(&before);
        product(&operand, &mut one);
        c[j * width..][..width].copy_from_slice(&one[j * width..][..width]);
    }
}

/// A product into columns of query rows, `c`, where keys are not finite that some rows do not see: for each row by itself.
#[inline(never)]
#[allow(clippy::too_many_arguments)]
fn seen_by_rows(
    s: Avx512,
    t: Tiles,
    g: &Geometry,
    tile: Tile,
    keys: &Range<usize>,
    k: Heads,
    c: &mut [f32],
    product: impl Fn(&[f32], &mut [f32]),
) {
    let across = tiles(g.head_dim, SIDE16);
    let (mut operand, mut one) = (vec![0.0; across * DEPTH * TILE], c.to_vec());
    let before = c.to_vec();
    for r in 0..tile.rows {
        left_transposed(s, t, keys.len(), across, DEPTH, &mut operand, |j| {
            let key = keys.start + j;
            let seen = j < keys.len() && tile.sees(g, r, key);
            seen.then(|| row(k, tile.batch, tile.kv_head, key, g.head_dim))
        });
        one.copy_from_slice(&before);
        product(&operand, &mut one);
        for (c, one) in c.chunks_exact_mut(SIDE).zip(one.chunks_exact(SIDE)) {
            c[r] = one[r];
        }
    }
}

/// A band of query rows: where it stands in a row of scores, and its rows' constants.
#[derive(Clone, Copy)]
struct Column {
    at: usize,
    /// End of the keys that it sees.
    end: usize,
    less: <Avx512 as Simd>::V,
    d: <Avx512 as Simd>::V,
    scale: <Avx512 as Simd>::V,
}

impl Column {
    /// P and dS of key j; 0 from `end` on.
    #[inline(always)]
    fn cell<const HIDDEN: bool>(
        self,
        s: Avx512,
        scores: &[[f32; SCORES]],
        dp: &[[f32; SCORES]],
        j: usize,
    ) -> (<Avx512 as Simd>::V, <Avx512 as Simd>::V) {
        if j >= self.end {
            return (s.zero(), s.zero());
        }
        let score = s.load(&scores[j][self.at..]);
        let p = exp2_coarse(s, s.fma(score, self.scale, self.less));
        let dp = s.load(&dp[j][self.at..]);
        let ds = s.mul(p, s.sub(dp, self.d));
        if HIDDEN {
            let hidden = s.lt(score, s.splat(f32::MIN));
            let zero = s.zero();
            return (s.select(hidden, zero, p), s.select(hidden, zero, ds));
        }
        (p, ds)
    }
}

/// Row r of a tile of queries, if there is one.
#[inline(always)]
fn row_of<'a>(g: &Geometry, x: Heads<'a>, tile: Tile, r: usize) -> Option<&'a [half::bf16]> {
    let (token, head) = tile.token(g, r);
    (r < tile.rows).then(|| row(x, tile.batch, head, token, g.head_dim))
}
