//! Backward: five products for each tile of query rows and block of keys.
//!
//! A pass takes tiles in ascending order and, for each, blocks of keys in ascending order. So dk and dv are chains over
//! query rows and dq is a chain over keys, whichever part of the tiles and keys a pass covers. With enough key heads
//! a task is one whole head, and every score is computed once. With fewer heads than threads can share, one set of tasks
//! computes dq (a tile each) and another dk and dv (a run of blocks each): seven products instead of five, the same bits.

// Each task writes the gradient rows of its own tiles or keys.
#![allow(unsafe_code)]

use super::forward::{load, load_transposed};
use super::heads::OutRows;
use super::mask::{SCORES, SIDE, Sight, Tile};
use super::seen::{Seen, finite};
use super::tile::{BAND, LINE, Left, Part, Product, Start, padded, pitch};
use super::{Fold, Geometry, Heads, Inputs, Unit};
use crate::dtype::DType;
use crate::memory::with_scratch_f32;
use crate::polynomial::{exp2_normal, tanh};
use crate::rows::lanes::{map, narrow_into, sums, widen, widen_into};
use crate::simd::{Isa, Kernel, Simd, dispatch, isa};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// What the backward reads.
#[derive(Clone, Copy)]
pub(super) struct Arguments<'a> {
    pub(super) g: &'a Geometry<'a>,
    pub(super) q: Heads<'a>,
    pub(super) k: Heads<'a>,
    pub(super) v: Heads<'a>,
    pub(super) o: Heads<'a>,
    pub(super) dout: Heads<'a>,
    pub(super) lse: &'a [f32],
}

impl Arguments<'_> {
    /// The unit that multiplies tiles, if it serves this case.
    fn unit(&self) -> Unit {
        let Arguments { g, q, k, v, .. } = *self;
        let narrow = self.dout.data.dtype() == DType::Bf16;
        narrow.then(|| Inputs { g, q, k, v }.unit()).flatten()
    }
}

/// f32 of scratch that a pass over `keys` keys needs.
pub(super) fn scratch(head_dim: usize, keys: usize) -> usize {
    let line = pitch(head_dim);
    #[cfg(target_arch = "x86_64")]
    let unit = super::narrow::backward::scratch(head_dim, keys);
    #[cfg(not(target_arch = "x86_64"))]
    let unit = 0;
    let blocks = keys.next_multiple_of(SIDE);
    // K, V, dK, dV; Q, dO, dQ; Q and dO transposed; P and dS; rows to transpose, and one.
    let vectors = 4 * blocks * line
        + 3 * SIDE * line
        + 2 * head_dim * SCORES
        + 2 * SIDE * SCORES
        + (LINE + 1) * head_dim;
    vectors.max(unit)
}

/// Computes all three gradients.
pub(super) fn run(arguments: &Arguments, dq: &OutRows, dk: &OutRows, dv: &OutRows) {
    let (g, isa) = (arguments.g, isa());
    let matrix_unit = arguments.unit();
    let (units, threads) = (g.batch * g.kv_heads, rayon::current_num_threads());
    let blocks = g.keys.div_ceil(SIDE);
    let tiles = g.rows().div_ceil(SIDE);
    let task = |unit, tiles, blocks, dq, dkv| {
        one_pass(
            (isa, matrix_unit),
            Pass {
                arguments,
                unit,
                tiles,
                blocks,
                dq,
                dkv,
            },
        );
    };
    let (dq, dkv) = (Some(dq), Some((dk, dv)));
    if !g.is_big() {
        (0..units).for_each(|u| task(u, 0..tiles, 0..blocks, dq, dkv));
    } else if units % threads == 0 || units >= 2 * threads {
        let each = |u| task(u, 0..tiles, 0..blocks, dq, dkv);
        (0..units).into_par_iter().with_max_len(1).for_each(each);
    } else {
        (0..units * tiles)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|i| {
                let tile = i % tiles;
                task(i / tiles, tile..tile + 1, 0..blocks, dq, None);
            });
        // Longer runs transpose the queries less often; four tasks a thread still balance.
        let run = (units * blocks / (4 * threads)).clamp(1, 8);
        let runs = blocks.div_ceil(run);
        (0..units * runs)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|i| {
                let first = i % runs * run;
                task(
                    i / runs,
                    0..tiles,
                    first..(first + run).min(blocks),
                    None,
                    dkv,
                );
            });
    }
}

/// Some tiles of a key head against some of its blocks of keys.
pub(super) struct Pass<'a> {
    pub(super) arguments: &'a Arguments<'a>,
    pub(super) unit: usize,
    pub(super) tiles: Range<usize>,
    pub(super) blocks: Range<usize>,
    pub(super) dq: Option<&'a OutRows<'a>>,
    pub(super) dkv: Option<(&'a OutRows<'a>, &'a OutRows<'a>)>,
}

fn one_pass((isa, matrix_unit): (Isa, Unit), pass: Pass) {
    let g = pass.arguments.g;
    let keys = (pass.blocks.end * SIDE).min(g.keys) - pass.blocks.start * SIDE;
    with_scratch_f32(scratch(g.head_dim, keys), |scratch| {
        let run = Run {
            pass,
            keys,
            scratch,
        };
        match matrix_unit {
            #[cfg(target_arch = "x86_64")]
            Some(unit) => unit.run(super::narrow::backward::OnUnit(run)),
            #[cfg(not(target_arch = "x86_64"))]
            Some(none) => match none {},
            None => dispatch(isa, run),
        }
    });
}

/// A pass over `keys` keys, with its scratch.
pub(super) struct Run<'a> {
    pub(super) pass: Pass<'a>,
    pub(super) keys: usize,
    pub(super) scratch: &'a mut [f32],
}

/// Keys, values and their gradients of a pass, in rows of `pitch(d)`.
struct KeySide<'a> {
    k: &'a mut [f32],
    v: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// A tile's queries and output gradients, as rows and as columns, and what is computed for it.
struct QuerySide<'a> {
    q: &'a mut [f32],
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    qt: &'a mut [f32],
    dout_t: &'a mut [f32],
    p: &'a mut [f32],
    ds: &'a mut [f32],
    /// lse log2(e) of each row; infinity where nothing was visible, which makes P zero.
    lse: [f32; SIDE],
    /// D = sum of dout o.
    d: [f32; SIDE],
    /// Queries and output gradients are.
    finite: bool,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let Run {
            pass,
            keys,
            scratch,
        } = self;
        let g = pass.arguments.g;
        let (d, line) = (g.head_dim, pitch(g.head_dim));
        let mut rest = scratch;
        let mut take = |n: usize| {
            let (a, b) = std::mem::take(&mut rest).split_at_mut(n);
            rest = b;
            a
        };
        let all = keys.next_multiple_of(SIDE) * line;
        let key_side = KeySide {
            k: take(all),
            v: take(all),
            dk: take(all),
            dv: take(all),
        };
        let query_side = QuerySide {
            q: take(SIDE * line),
            dout: take(SIDE * line),
            dq: take(SIDE * line),
            qt: take(d * SCORES),
            dout_t: take(d * SCORES),
            p: take(SIDE * SCORES),
            ds: take(SIDE * SCORES),
            lse: [0.0; SIDE],
            d: [0.0; SIDE],
            finite: true,
        };
        let (row, other) = (take(LINE * d), take(d));
        work(s, &pass, keys, key_side, query_side, row, other);
    }
}

#[inline(always)]
fn work<S: Simd>(
    s: S,
    pass: &Pass,
    keys: usize,
    side: KeySide,
    mut tile_side: QuerySide,
    row: &mut [f32],
    other: &mut [f32],
) {
    let (args, g) = (pass.arguments, pass.arguments.g);
    let (d, line, first_key) = (g.head_dim, pitch(g.head_dim), pass.blocks.start * SIDE);
    let head = Tile {
        batch: pass.unit / g.kv_heads,
        kv_head: pass.unit % g.kv_heads,
        first: 0,
        rows: 0,
    };
    let range = first_key..first_key + keys;
    load(s, args.k, head, range.clone(), d, side.k);
    load(s, args.v, head, range.clone(), d, side.v);
    side.dk[..keys * line].fill(0.0);
    side.dv[..keys * line].fill(0.0);
    for tile in pass.tiles.clone().map(|i| g.tile(pass.unit, i)) {
        let seen = tile.blocks(g);
        let blocks = seen.start.max(pass.blocks.start)..seen.end.min(pass.blocks.end);
        if blocks.is_empty() && pass.dq.is_none() {
            continue;
        }
        tile_side.load(s, args, tile, row, other);
        for block in blocks {
            let keys = block * SIDE..((block + 1) * SIDE).min(g.keys);
            let sight = tile.sight(g, &keys);
            if sight == Sight::Nothing {
                continue;
            }
            let ends = tile.ends(g, &keys);
            let part = (keys.start - first_key) * line..(keys.end - first_key) * line;
            tile_side.scores(
                s,
                g,
                tile,
                sight,
                keys.clone(),
                &ends,
                &side.k[part.clone()],
                &side.v[part.clone()],
            );
            let (m, n) = (keys.len(), padded(d));
            let seen = |weights| Seen {
                g,
                tile,
                keys: &keys,
                weights,
            };
            if pass.dkv.is_some() {
                for (a, b, c) in [
                    (&*tile_side.p, &*tile_side.dout, &mut side.dv[part.clone()]),
                    (&*tile_side.ds, &*tile_side.q, &mut side.dk[part.clone()]),
                ] {
                    if sight == Sight::Some && !tile_side.finite {
                        seen(a).of_keys(d, (b, line), (c, line));
                        continue;
                    }
                    let a = Left {
                        data: a,
                        pitch: SCORES,
                        transposed: false,
                    };
                    s.run(Product {
                        m,
                        n,
                        k: tile.rows,
                        a,
                        b,
                        b_pitch: line,
                        c,
                        c_pitch: line,
                        start: Start::Resume,
                        part: Part::Queries(&ends),
                    });
                }
            }
            if pass.dq.is_some() {
                let a = Left {
                    data: tile_side.ds,
                    pitch: SCORES,
                    transposed: true,
                };
                let (b, c) = (&side.k[part], &mut *tile_side.dq);
                let reach = ends[ends.len() - 1];
                if sight == Sight::Some && !finite(s, reach, padded(d), (b, line)) {
                    seen(tile_side.ds).of_rows(d, (b, line), (c, line), None);
                    continue;
                }
                s.run(Product {
                    m: tile.rows,
                    n,
                    k: m,
                    a,
                    b,
                    b_pitch: line,
                    c,
                    c_pitch: line,
                    start: Start::Resume,
                    part: Part::Keys(&ends),
                });
            }
        }
        if let Some(dq) = pass.dq {
            for r in 0..tile.rows {
                let (t, h) = tile.token(g, r);
                let row = &mut row[..d];
                scaled(s, &tile_side.dq[r * line..][..d], g.scale, row);
                // SAFETY: a tile belongs to one task, and each of its rows is written once.
                narrow_into(s, row, unsafe { dq.row(tile.batch, h, t) });
            }
        }
    }
    if let Some((dk, dv)) = pass.dkv {
        for (i, key) in range.enumerate() {
            let row = &mut row[..d];
            scaled(s, &side.dk[i * line..][..d], g.scale, row);
            // SAFETY: a key's gradients belong to one task, and each is written once.
            unsafe {
                narrow_into(s, row, dk.row(head.batch, head.kv_head, key));
                narrow_into(
                    s,
                    &side.dv[i * line..][..d],
                    dv.row(head.batch, head.kv_head, key),
                );
            }
        }
    }
}

#[inline(always)]
pub(super) fn scaled<S: Simd>(s: S, x: &[f32], factor: f32, y: &mut [f32]) {
    map(
        s,
        [x],
        y,
        #[inline(always)]
        |[x]| s.mul(x, s.splat(factor)),
    );
}

impl QuerySide<'_> {
    #[inline(always)]
    fn load<S: Simd>(
        &mut self,
        s: S,
        args: &Arguments,
        tile: Tile,
        row: &mut [f32],
        other: &mut [f32],
    ) {
        let g = args.g;
        let (d, line) = (g.head_dim, pitch(g.head_dim));
        load_transposed(s, g, args.q, tile, Fold::new(g).query, self.qt, row);
        load_transposed(s, g, args.dout, tile, 1.0, self.dout_t, row);
        (self.lse, self.d) = ([f32::INFINITY; SIDE], [0.0; SIDE]);
        for r in 0..tile.rows {
            let (t, h) = tile.token(g, r);
            for (x, to) in [(args.q, &mut *self.q), (args.dout, &mut *self.dout)] {
                let to = &mut to[r * line..][..padded(d)];
                widen_into(s, x.row(tile.batch, h, t, d), &mut to[..d]);
                to[d..].fill(0.0);
            }
            let o = widen(s, args.o.row(tile.batch, h, t, d), 0..d, other);
            let dout = &self.dout[r * line..][..d];
            [self.d[r]] = sums(
                s,
                [dout, o],
                #[inline(always)]
                |[a, b], [sum]| [s.fma(a, b, sum)],
            );
            let lse = args.lse[(tile.batch * g.heads + h) * g.queries + t];
            self.lse[r] = if lse == f32::NEG_INFINITY {
                f32::INFINITY
            } else {
                lse * LOG2_E
            };
        }
        self.dq[..tile.rows * line].fill(0.0);
        self.finite = [&*self.q, &*self.dout].into_iter().all(
            #[inline(always)]
            |x| finite(s, tile.rows, padded(d), (x, line)),
        );
    }

    /// P and dS of one block, both [keys, rows].
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn scores<S: Simd>(
        &mut self,
        s: S,
        g: &Geometry,
        tile: Tile,
        sight: Sight,
        keys: Range<usize>,
        ends: &[usize],
        k: &[f32],
        v: &[f32],
    ) {
        let (d, line) = (g.head_dim, pitch(g.head_dim));
        for (a, b, c) in [
            (k, &*self.qt, &mut *self.p),
            (v, &*self.dout_t, &mut *self.ds),
        ] {
            s.run(Product {
                m: keys.len(),
                n: padded(tile.rows),
                k: d,
                a: Left {
                    data: a,
                    pitch: line,
                    transposed: false,
                },
                b,
                b_pitch: SCORES,
                c,
                c_pitch: SCORES,
                start: Start::Zero,
                part: Part::Scores(ends),
            });
        }
        let fold = Fold::new(g);
        s.run(Step {
            g,
            tile,
            fold,
            sight,
            keys,
            ends,
            p: self.p,
            ds: self.ds,
            lse: &self.lse,
            d: &self.d,
        });
    }
}

/// From scores and dP to P and dS = P (dP - D), times 1 - tanh^2 with a soft cap.
struct Step<'a> {
    g: &'a Geometry<'a>,
    tile: Tile,
    fold: Fold,
    sight: Sight,
    keys: Range<usize>,
    ends: &'a [usize],
    p: &'a mut [f32],
    ds: &'a mut [f32],
    lse: &'a [f32; SIDE],
    d: &'a [f32; SIDE],
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (n, columns) = (self.keys.len(), padded(self.tile.rows));
        let one = s.splat(1.0);
        if let Some(cap) = self.fold.cap {
            for at in (0..columns).step_by(S::LANES) {
                let n = n.min(self.ends[at / BAND]);
                let d = s.load(&self.d[at..]);
                let rows = self.p.chunks_exact_mut(SCORES);
                for (p, ds) in rows.zip(self.ds.chunks_exact_mut(SCORES)).take(n) {
                    let t = tanh(s, s.load(&p[at..]));
                    s.store(&mut p[at..], s.mul(t, s.splat(cap)));
                    // The slope is known only here, before the scores are hidden; so D is taken away here too.
                    let slope = s.neg_fma(t, t, one);
                    let dp = s.sub(s.load(&ds[at..]), d);
                    s.store(&mut ds[at..], s.mul(dp, slope));
                }
            }
        }
        if self.sight == Sight::Some {
            self.tile.hide(s, self.g, &self.keys, self.p);
            self.weights::<S, true>(s, n, columns);
        } else {
            self.weights::<S, false>(s, n, columns);
        }
    }
}

impl Step<'_> {
    /// The exponentials, and what follows from them; where pairs are `HIDDEN` by minus infinity both are 0, whatever dP and lse are.
    #[inline(always)]
    fn weights<S: Simd, const HIDDEN: bool>(self, s: S, n: usize, columns: usize) {
        let least = s.splat(f32::MIN);
        for at in (0..columns).step_by(S::LANES) {
            let lse = s.load(&self.lse[at..]);
            let d = if self.fold.cap.is_some() {
                s.zero()
            } else {
                s.load(&self.d[at..])
            };
            let n = n.min(self.ends[at / BAND]);
            let rows = self.p.chunks_exact_mut(SCORES);
            for (p, ds) in rows.zip(self.ds.chunks_exact_mut(SCORES)).take(n) {
                let score = s.load(&p[at..]);
                let x = exp2_normal(s, s.sub(score, lse));
                let dx = s.mul(x, s.sub(s.load(&ds[at..]), d));
                let hidden = s.lt(score, least);
                let shown = |x| {
                    if HIDDEN {
                        s.select(hidden, s.zero(), x)
                    } else {
                        x
                    }
                };
                s.store(&mut p[at..], shown(x));
                s.store(&mut ds[at..], shown(dx));
            }
        }
    }
}
