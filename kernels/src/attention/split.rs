//! Few query rows against many keys: decoding a token, or a short prompt after a long one.
//!
//! There is one tile of query rows a key head, and with few heads most cores would have nothing to do. So the keys are cut into
//! chunks, which are tasks of their own and leave maxima, sums of exponentials and sums of values; these are then put on
//! one scale and added, chunk by chunk in ascending order (as Flash-Decoding does, Dao et al. 2023). Whether keys are cut, and
//! where, follows from one sequence's own shape, so that a sequence gives the same bits in any batch and on any threads.

// Each chunk's results become the rows of its own tile.
#![allow(unsafe_code)]

use super::forward::{Forward, Sink, divide, partial, scratch};
use super::heads::OutRows;
use super::mask::SIDE;
use super::online::log_sum_exp;
use super::tile::padded;
use super::{Geometry, Inputs, Unit};
use crate::dtype::SliceMut;
use crate::memory::with_scratch_f32;
use crate::polynomial::exp2_normal;
use crate::rows::lanes::narrow_into;
use crate::simd::{Kernel, Simd, dispatch, isa};
use rayon::prelude::*;

/// Blocks of keys in a chunk: 1024 keys. Part of the op.
const CHUNK: usize = 16;

/// Whether the keys are cut.
pub(super) fn wanted(g: &Geometry) -> bool {
    g.rows() <= SIDE && g.keys.div_ceil(SIDE) > CHUNK
}

/// f32 that the results of all chunks take, beside the scratch of tasks.
pub(super) fn kept(g: &Geometry) -> usize {
    if !wanted(g) {
        return 0;
    }
    g.batch * g.kv_heads * g.keys.div_ceil(SIDE).div_ceil(CHUNK) * partial(g.head_dim)
}

/// The forward of one tile of query rows a key head.
pub(super) fn run(inputs: Inputs, unit: Unit, o: &OutRows, lse: &OutRows) {
    let (g, isa) = (inputs.g, isa());
    let (d, each) = (g.head_dim, partial(g.head_dim));
    let blocks = g.keys.div_ceil(SIDE);
    let chunks = blocks.div_ceil(CHUNK);
    if kept(g) == 0 || g.rows() == 0 {
        return;
    }
    with_scratch_f32(kept(g), |parts| {
        let task = |(i, part): (usize, &mut [f32])| {
            let first = i % chunks * CHUNK;
            with_scratch_f32(scratch(d, 1), |scratch| {
                let task = Forward {
                    inputs,
                    unit: i / chunks,
                    tiles: 0..1,
                    blocks: first..(first + CHUNK).min(blocks),
                    sink: Sink::Partial(part),
                    scratch,
                };
                task.run(isa, unit);
            });
        };
        if g.is_big() {
            let tasks = parts.par_chunks_exact_mut(each).enumerate();
            tasks.with_max_len(1).for_each(task);
        } else {
            parts.chunks_exact_mut(each).enumerate().for_each(task);
        }
        let parts = &*parts;
        for unit in 0..g.batch * g.kv_heads {
            let parts = &parts[unit * chunks * each..][..chunks * each];
            dispatch(
                isa,
                Merge {
                    g,
                    unit,
                    parts,
                    o,
                    lse,
                },
            );
        }
    });
}

/// Adds the chunks' results of one tile and writes its outputs.
struct Merge<'a> {
    g: &'a Geometry<'a>,
    unit: usize,
    parts: &'a [f32],
    o: &'a OutRows<'a>,
    lse: &'a OutRows<'a>,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (g, d) = (self.g, self.g.head_dim);
        let tile = g.tile(self.unit, 0);
        let parts = || self.parts.chunks_exact(partial(d));
        let (mut max, mut sum) = ([f32::NEG_INFINITY; SIDE], [0f32; SIDE]);
        for at in (0..SIDE).step_by(S::LANES) {
            let mut most = s.splat(f32::NEG_INFINITY);
            for part in parts() {
                most = s.max(most, s.load(&part[at..]));
            }
            s.store(&mut max[at..], most);
            let mut total = s.zero();
            for part in parts() {
                let factor = weight(s, s.load(&part[at..]), most);
                total = s.fma(s.load(&part[SIDE + at..]), factor, total);
            }
            s.store(&mut sum[at..], total);
        }
        let ln_sum = log_sum_exp(s, tile.rows, &max, &sum);
        let (mut total, mut row) = ([0f32; 256], [0f32; 256]);
        for r in 0..tile.rows {
            total[..padded(d)].fill(0.0);
            for part in parts() {
                let factor = weight(s, s.splat(part[r]), s.splat(max[r]));
                let values = &part[2 * SIDE + r * padded(d)..][..padded(d)];
                for at in (0..padded(d)).step_by(S::LANES) {
                    let sum = s.fma(s.load(&values[at..]), factor, s.load(&total[at..]));
                    s.store(&mut total[at..], sum);
                }
            }
            divide(s, &total[..d], sum[r], &mut row[..d]);
            let (t, h) = tile.token(g, r);
            // SAFETY: the caller's thread is the only one that writes now, and each row is written once.
            unsafe {
                narrow_into(s, &row[..d], self.o.row(tile.batch, h, t));
                if let SliceMut::F32(to) = self.lse.row(tile.batch, h, t) {
                    to[0] = ln_sum[r];
                }
            }
        }
    }
}

/// 2^(max - most): what a chunk's sums are multiplied by; 0 where the chunk saw nothing.
#[inline(always)]
fn weight<S: Simd>(s: S, max: S::V, most: S::V) -> S::V {
    let none = s.splat(f32::NEG_INFINITY);
    let weight = exp2_normal(s, s.sub(max, most));
    s.select(s.eq(max, none), s.zero(), weight)
}
