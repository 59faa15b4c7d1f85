//! Attention in bf16 on a unit that multiplies tiles (`cpu::simd::TileUnit`): the same blocks, with products on the unit.
//!
//! Scores stay transposed, [keys, query rows], so that the softmax is the same. Exponentials and the gradients of logits are
//! rounded to bf16 on their way into the next product, as everybody does who has such a unit; sums are f32. Operands
//! of the unit are copied, once for a task, into tiles that lie one after the other (1 KiB each): loads from rows of tokens, a
//! page apart, took longer than the products.
//!
//! | product | left operand (rows) | right operand (pairs) |
//! |---|---|---|
//! | scores = k q^T, dp = v dout^T | keys, values | queries and output gradients, transposed |
//! | o^T = v^T p, dq^T = k^T ds | values and keys, transposed | p, ds |
//! | dv = p dout, dk = ds q | p, ds | output gradients and queries |
//!
//! What the unit adds, and in which order, is in `cpu::simd`; everything else keeps the order of the f32 kernels. Where there is
//! no such unit but vectors multiply pairs of bf16 fast (AMD's Zen 4), they take the same tiles.

// Tiles are read and written by address, checked once for a whole product.
#![allow(unsafe_code)]

pub(super) mod backward;
pub(super) mod forward;

use super::mask::SIDE;
use super::tile::first_row;
use super::{Geometry, Heads, Inputs};
use crate::dtype::Slice;
use crate::simd::{Avx512, Simd, TileUnit, Tiles, tile_unit};
use core::arch::x86_64::__m256i;
use half::bf16;
use std::ops::Range;

/// f32 of a tile: 16 rows of 64 bytes.
const TILE: usize = 256;
/// Rows of a tile, and its columns of f32.
const SIDE16: usize = 16;
/// bf16 in a row of a tile.
const DEEP: usize = 32;
/// Bytes from a row of a tile to the next, where tiles lie one after the other.
const ROW: usize = 64;

/// Up to so many keys the vectors of f32 are faster: tiles would be mostly padding (a Zen 5, 96 heads of 128: 1 key 0.3 of the
/// time, 16 keys 0.75, 32 keys 0.93, 64 keys 1.03).
const FEW_KEYS: usize = 16;

/// The unit, if it serves this case: all operands in bf16, more than a few keys, and no soft cap, whose slopes it would take as
/// much time to find. A scale that is not positive would turn maxima of scores into minima.
pub(super) fn unit(inputs: &Inputs) -> Option<TileUnit> {
    let Inputs { g, q, k, v } = inputs;
    let narrow = [q, k, v].iter().all(|x| matches!(x.data, Slice::Bf16(_)));
    (narrow && g.keys > FEW_KEYS && g.scale > 0.0 && g.soft_cap.is_none())
        .then(tile_unit)
        .flatten()
}

/// Tiles that hold `n` elements of 16 or 32 each.
const fn tiles(n: usize, each: usize) -> usize {
    n.div_ceil(each)
}

/// Which part of a product the masks leave; `ends` as in [`super::tile::Part`].
#[derive(Clone, Copy)]
enum Part<'a> {
    /// Rows are keys, columns are query rows.
    Scores(&'a [usize]),
    /// Columns are query rows, k counts keys.
    Keys(&'a [usize]),
    /// Rows are keys, k counts query rows.
    Queries(&'a [usize]),
}

/// C (+)= A B, in tiles: `m` x `k` by `k` x `n`. Tile (i, k) of A is number i `a_pitch` + k, tile (k, j) of B number
/// k `b_pitch` + j; rows of C lie `c_pitch` f32 apart.
struct Product<'a> {
    m: usize,
    n: usize,
    k: usize,
    a: &'a [f32],
    a_pitch: usize,
    b: &'a [f32],
    b_pitch: usize,
    c: &'a mut [f32],
    c_pitch: usize,
    fresh: bool,
    part: Part<'a>,
}

impl Product<'_> {
    #[inline(always)]
    fn run(mut self, t: Tiles) {
        let Product { m, n, k, .. } = self;
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        assert!(
            self.a.len() >= ((m - 1) * self.a_pitch + k) * TILE,
            "A is too small"
        );
        assert!(
            self.b.len() >= ((k - 1) * self.b_pitch + n) * TILE,
            "B is too small"
        );
        let reach = (m * SIDE16 - 1) * self.c_pitch + n * SIDE16;
        assert!(self.c.len() >= reach, "C is too small");
        for i in (0..m).step_by(2) {
            let first = match self.part {
                Part::Scores(ends) => first_row(ends, i * SIDE16) / SIDE16,
                _ => 0,
            };
            for j in (first..n).step_by(2) {
                let (rows, columns) = (2.min(m - i), 2.min(n - j));
                let deep = match self.part {
                    Part::Scores(_) => 0..k,
                    Part::Keys(ends) => 0..tiles(ends[j + columns - 1], DEEP).min(k),
                    Part::Queries(ends) => (first_row(ends, i * SIDE16) / DEEP).min(k)..k,
                };
                // SAFETY: rows, columns and k lie inside the operands, as checked above.
                unsafe {
                    match (rows, columns) {
                        (2, 2) => self.block::<2, 2>(t, i, j, deep),
                        (2, _) => self.block::<2, 1>(t, i, j, deep),
                        (_, 2) => self.block::<1, 2>(t, i, j, deep),
                        _ => self.block::<1, 1>(t, i, j, deep),
                    }
                }
            }
        }
    }

    /// # Safety
    /// The product has `M` x `N` tiles from (i, j).
    #[inline(always)]
    unsafe fn block<const M: usize, const N: usize>(
        &mut self,
        t: Tiles,
        i: usize,
        j: usize,
        k: Range<usize>,
    ) {
        let pitch = self.c_pitch * 4;
        let c = self
            .c
            .as_mut_ptr()
            .wrapping_add(i * SIDE16 * self.c_pitch + j * SIDE16);
        let c = |row: usize, column: usize| {
            let at = row * SIDE16 * self.c_pitch + column * SIDE16;
            c.wrapping_add(at).cast::<u8>()
        };
        let a = |row: usize, k: usize| {
            let tile = (i + row) * self.a_pitch + k;
            self.a.as_ptr().wrapping_add(tile * TILE).cast::<u8>()
        };
        let b = |k: usize, column: usize| {
            let tile = k * self.b_pitch + j + column;
            self.b.as_ptr().wrapping_add(tile * TILE).cast::<u8>()
        };
        let t = match t {
            Tiles::Registers(registers) => registers,
            Tiles::Pairs(unit) => {
                for (row, column) in (0..M).flat_map(|i| (0..N).map(move |j| (i, j))) {
                    let (a, b) = (|k| a(row, k), |k| b(k, column));
                    let c = c(row, column).cast();
                    // SAFETY: the caller's promise.
                    unsafe { unit.multiply_tiles(k.clone(), a, b, c, self.c_pitch, self.fresh) }
                }
                return;
            }
        };
        // SAFETY: the caller's promise.
        unsafe {
            if self.fresh {
                t.zero::<0>();
                t.zero::<1>();
                t.zero::<2>();
                t.zero::<3>();
            } else {
                t.load::<0>(c(0, 0), pitch);
                if N == 2 {
                    t.load::<1>(c(0, 1), pitch);
                }
                if M == 2 {
                    t.load::<2>(c(1, 0), pitch);
                }
                if M == 2 && N == 2 {
                    t.load::<3>(c(1, 1), pitch);
                }
            }
            for k in k {
                t.load::<4>(a(0, k), ROW);
                t.load::<6>(b(k, 0), ROW);
                t.multiply_add::<0, 4, 6>();
                if N == 2 {
                    t.load::<7>(b(k, 1), ROW);
                    t.multiply_add::<1, 4, 7>();
                }
                if M == 2 {
                    t.load::<5>(a(1, k), ROW);
                    t.multiply_add::<2, 5, 6>();
                }
                if M == 2 && N == 2 {
                    t.multiply_add::<3, 5, 7>();
                }
            }
            t.store::<0>(c(0, 0), pitch);
            if N == 2 {
                t.store::<1>(c(0, 1), pitch);
            }
            if M == 2 {
                t.store::<2>(c(1, 0), pitch);
            }
            if M == 2 && N == 2 {
                t.store::<3>(c(1, 1), pitch);
            }
        }
    }
}

/// Row (b, h, t) of d bf16.
#[inline(always)]
fn row(x: Heads<'_>, b: usize, h: usize, t: usize, d: usize) -> &[bf16] {
    match x.row(b, h, t, d) {
        Slice::Bf16(x) => x,
        other => panic!("the unit multiplies bf16, not {}", other.dtype()),
    }
}

/// Elements from..from + 32 of a row as the 64 bytes of a vector; what is missing is 0.
#[inline(always)]
fn words(s: Avx512, x: &[bf16], from: usize) -> <Avx512 as Simd>::V {
    if let Some(x) = x.get(from..from + DEEP) {
        // SAFETY: 64 bytes, and every pattern of bits is an f32.
        return unsafe { s.load_ptr(x.as_ptr().cast::<f32>()) };
    }
    let mut all = [bf16::ZERO; DEEP];
    let rest = x.get(from..).unwrap_or_default();
    all[..rest.len()].copy_from_slice(rest);
    // SAFETY: as above.
    unsafe { s.load_ptr(all.as_ptr().cast::<f32>()) }
}

/// Rows of a head as a left operand: `rows` rows by `deep` tiles of 32; rows that do not exist are 0.
#[inline(always)]
fn left<'a>(
    s: Avx512,
    rows: usize,
    deep: usize,
    to: &mut [f32],
    x: impl Fn(usize) -> Option<&'a [bf16]>,
) {
    for r in 0..rows {
        let x = x(r).unwrap_or_default();
        for k in 0..deep {
            let at = ((r / SIDE16) * deep + k) * TILE + r % SIDE16 * SIDE16;
            s.store(&mut to[at..], words(s, x, k * DEEP));
        }
    }
}

/// Rows of a head, transposed, as a right operand: `deep` tiles of 32 by `rows` columns; tile (k, j) is number k `pitch` + j.
#[inline(always)]
fn right_transposed<'a>(
    s: Avx512,
    rows: usize,
    deep: usize,
    pitch: usize,
    to: &mut [f32],
    x: impl Fn(usize) -> Option<&'a [bf16]>,
) {
    for j in 0..tiles(rows, SIDE16) {
        for k in 0..deep {
            let mut square = [s.zero(); SIDE16];
            for (i, v) in square.iter_mut().enumerate() {
                *v = words(s, x(j * SIDE16 + i).unwrap_or_default(), k * DEEP);
            }
            s.transpose(&mut square);
            store_tile(s, &mut to[(k * pitch + j) * TILE..], &square);
        }
    }
}

#[inline(always)]
fn store_tile(s: Avx512, to: &mut [f32], rows: &[<Avx512 as Simd>::V; SIDE16]) {
    let to = &mut to[..TILE];
    for (i, v) in rows.iter().enumerate() {
        s.store(&mut to[i * SIDE16..], *v);
    }
}

/// Elements from..from + 16 of rows 2 p and 2 p + 1, as pairs.
#[inline(always)]
fn pair(t: Tiles, low: &[bf16], high: &[bf16], from: usize) -> <Avx512 as Simd>::V {
    t.interleave(half(low, from), half(high, from))
}

/// Elements from..from + 16 of a row; what is missing is 0.
#[inline(always)]
fn half(x: &[bf16], from: usize) -> __m256i {
    if let Some(x) = x.get(from..from + SIDE16) {
        // SAFETY: 32 bytes of any bits, at any address.
        return unsafe { x.as_ptr().cast::<__m256i>().read_unaligned() };
    }
    let mut all = [bf16::ZERO; SIDE16];
    let rest = x.get(from..).unwrap_or_default();
    all[..rest.len()].copy_from_slice(rest);
    // SAFETY: both are 32 bytes of any bits.
    unsafe { std::mem::transmute::<[bf16; SIDE16], __m256i>(all) }
}

/// Rows of a head, transposed, as a left operand: `across` tiles of 16 elements by `rows` / 32; tile (i, k) is number
/// i `pitch` + k.
#[inline(always)]
fn left_transposed<'a>(
    s: Avx512,
    t: Tiles,
    rows: usize,
    across: usize,
    pitch: usize,
    to: &mut [f32],
    x: impl Fn(usize) -> Option<&'a [bf16]>,
) {
    for k in 0..tiles(rows, DEEP) {
        for i in 0..across {
            let mut square = [s.zero(); SIDE16];
            for (p, v) in square.iter_mut().enumerate() {
                let r = k * DEEP + 2 * p;
                let (low, high) = (x(r).unwrap_or_default(), x(r + 1).unwrap_or_default());
                *v = pair(t, low, high, i * SIDE16);
            }
            s.transpose(&mut square);
            store_tile(s, &mut to[(i * pitch + k) * TILE..], &square);
        }
    }
}

/// Rows of a head as a right operand: `rows` / 32 by `across` tiles of 16 elements; tile (k, j) is number k `across` + j.
#[inline(always)]
fn right<'a>(
    s: Avx512,
    t: Tiles,
    rows: usize,
    across: usize,
    to: &mut [f32],
    x: impl Fn(usize) -> Option<&'a [bf16]>,
) {
    for k in 0..tiles(rows, DEEP) {
        for p in 0..SIDE16 {
            let r = k * DEEP + 2 * p;
            let (low, high) = (x(r).unwrap_or_default(), x(r + 1).unwrap_or_default());
            for j in 0..across {
                let at = (k * across + j) * TILE + p * SIDE16;
                s.store(&mut to[at..], pair(t, low, high, j * SIDE16));
            }
        }
    }
}

/// Columns [d, rows] times a factor each, as rows: calls `f` with each row and its number.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn rows_of_columns(
    s: Avx512,
    d: usize,
    rows: usize,
    pitch: usize,
    from: &[f32],
    factor: &[f32],
    buffer: &mut [f32],
    mut f: impl FnMut(usize, &[f32]),
) {
    let width = tiles(d, SIDE16) * SIDE16;
    for at in (0..rows).step_by(SIDE16) {
        let factor = s.load(&factor[at..]);
        for c in (0..width).step_by(SIDE16) {
            let mut square = [s.zero(); SIDE16];
            for (i, v) in square.iter_mut().enumerate() {
                *v = s.mul(s.load(&from[(c + i) * pitch + at..]), factor);
            }
            s.transpose(&mut square);
            for (i, v) in square.iter().enumerate() {
                s.store(&mut buffer[i * width + c..], *v);
            }
        }
        for (i, row) in buffer
            .chunks_exact(width)
            .enumerate()
            .take(SIDE16.min(rows - at))
        {
            f(at + i, &row[..d]);
        }
    }
}

/// Bands of 16 query rows of a tile of queries, or of keys of a block.
const BANDS: usize = SIDE / SIDE16;
/// Tiles of 32 query rows or keys.
const DEPTH: usize = SIDE / DEEP;

/// log2(e) scale: what turns a product of query and key into a power of two.
fn log2_scale(g: &Geometry) -> f32 {
    g.scale * std::f32::consts::LOG2_E
}
