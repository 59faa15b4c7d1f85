//! Loops over a row in groups of 32 virtual lanes.
//!
//! A sum over a row is always: lane j adds the elements j, j + 32, j + 64, ... in this order, then a binary tree adds the
//! lanes. Four vectors of AVX2 or two of AVX-512 make one group, so that every instruction set gives the same bits. A
//! ragged last group is filled up with a value that does not change the sum.
//!
//! Closures handed to these loops carry `#[inline(always)]`: left to itself the compiler kept some apart, compiled for the
//! baseline CPU, where an exponential took five times as long.

use super::parallel::{part, part_mut};
use crate::cpu::simd::Simd;
use crate::dtype::{Slice, SliceMut};
use std::array::from_fn;
use std::ops::Range;

/// Virtual lanes of every row sum.
pub(crate) const GROUP: usize = 32;

/// Vectors of a group where a vector has four lanes, the fewest of all.
const MOST: usize = GROUP / 4;

/// Elements `range` of `x` in f32: borrowed where they are f32 already, else widened into `to`.
#[inline(always)]
pub(crate) fn widen<'a, S: Simd>(
    s: S,
    x: Slice<'a>,
    range: Range<usize>,
    to: &'a mut [f32],
) -> &'a [f32] {
    if let Slice::F32(x) = x {
        return &x[range];
    }
    let to = &mut to[..range.len()];
    widen_into(s, part(x, range), to);
    to
}

/// Writes all of `x`, widened, to `to`. Panics unless the lengths are equal.
#[inline(always)]
pub(crate) fn widen_into<S: Simd>(s: S, x: Slice, to: &mut [f32]) {
    #[inline(always)]
    fn go<S: Simd, T: crate::dtype::Float>(s: S, x: &[T], to: &mut [f32]) {
        assert_eq!(x.len(), to.len());
        for (x, to) in x.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
            s.store_first(to, s.load_first(x));
        }
    }
    match x {
        Slice::F32(x) => to.copy_from_slice(x),
        Slice::Bf16(x) => go(s, x, to),
        Slice::F16(x) => go(s, x, to),
        Slice::U32(_) => panic!("kernels compute on floats, not on u32"),
    }
}

/// Writes all of `x`, rounded to nearest even, to `to`. Panics unless the lengths are equal.
#[inline(always)]
pub(crate) fn narrow_into<S: Simd>(s: S, x: &[f32], to: SliceMut) {
    #[inline(always)]
    fn go<S: Simd, T: crate::dtype::Float>(s: S, x: &[f32], to: &mut [T]) {
        assert_eq!(x.len(), to.len());
        for (x, to) in x.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
            s.store_first(to, s.load_first(x));
        }
    }
    match to {
        SliceMut::F32(to) => to.copy_from_slice(x),
        SliceMut::Bf16(to) => go(s, x, to),
        SliceMut::F16(to) => go(s, x, to),
        SliceMut::U32(_) => panic!("kernels compute on floats, not on u32"),
    }
}

/// Elements `range` of `y` as f32 for `f` to write: in place where they are f32, else in `scratch`, narrowed afterwards.
#[inline(always)]
pub(crate) fn written<S: Simd>(
    s: S,
    y: &mut SliceMut,
    range: Range<usize>,
    scratch: &mut [f32],
    f: impl FnOnce(&mut [f32]),
) {
    let direct = matches!(y, SliceMut::F32(_));
    let n = range.len();
    let target = match y {
        SliceMut::F32(y) => &mut y[range.clone()],
        _ => &mut scratch[..n],
    };
    f(target);
    if !direct {
        narrow_into(s, &scratch[..n], part_mut(y, range));
    }
}

/// Folds `x` (N rows of one length) into M sums of 32 lanes each. `fill[i]` stands for the missing elements of row i.
#[inline(always)]
pub(crate) fn fold<S: Simd, const N: usize, const M: usize>(
    s: S,
    x: [&[f32]; N],
    fill: [f32; N],
    start: [f32; M],
    f: impl Fn([S::V; N], [S::V; M]) -> [S::V; M],
) -> [[f32; GROUP]; M] {
    let n = x[0].len();
    assert!(x.iter().all(|x| x.len() == n));
    let vectors = GROUP / S::LANES;
    let mut sums = [[s.zero(); M]; MOST];
    for sum in &mut sums {
        for (sum, start) in sum.iter_mut().zip(start) {
            *sum = s.splat(start);
        }
    }
    let mut padded = [[0f32; GROUP]; N];
    for at in (0..n).step_by(GROUP) {
        let whole = n - at >= GROUP;
        if !whole {
            for i in 0..N {
                padded[i] = [fill[i]; GROUP];
                padded[i][..n - at].copy_from_slice(&x[i][at..]);
            }
        }
        let group: [&[f32]; N] = from_fn(
            #[inline(always)]
            |i| {
                if whole {
                    &x[i][at..at + GROUP]
                } else {
                    &padded[i][..]
                }
            },
        );
        for (v, sum) in sums.iter_mut().enumerate().take(vectors) {
            let mut loaded = [s.zero(); N];
            for i in 0..N {
                loaded[i] = s.load(&group[i][v * S::LANES..]);
            }
            *sum = f(loaded, *sum);
        }
    }
    let mut lanes = [[0f32; GROUP]; M];
    for (v, sum) in sums.iter().enumerate().take(vectors) {
        for (lanes, sum) in lanes.iter_mut().zip(sum) {
            s.store(&mut lanes[v * S::LANES..], *sum);
        }
    }
    lanes
}

/// The sum of 32 lanes: halves added to halves.
#[inline(always)]
pub(crate) fn tree_sum(mut lanes: [f32; GROUP]) -> f32 {
    let mut half = GROUP / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The sums of M folds, for rows in which 0 stands for a missing element.
#[inline(always)]
pub(crate) fn sums<S: Simd, const N: usize, const M: usize>(
    s: S,
    x: [&[f32]; N],
    f: impl Fn([S::V; N], [S::V; M]) -> [S::V; M],
) -> [f32; M] {
    fold(s, x, [0.0; N], [0.0; M], f).map(tree_sum)
}

/// y[i] = f(x[0][i], x[1][i], ...) over rows of one length.
#[inline(always)]
pub(crate) fn map<S: Simd, const N: usize>(
    s: S,
    x: [&[f32]; N],
    y: &mut [f32],
    f: impl Fn([S::V; N]) -> S::V,
) {
    let n = y.len();
    assert!(x.iter().all(|x| x.len() == n));
    for at in (0..n).step_by(S::LANES) {
        let end = (at + S::LANES).min(n);
        let mut loaded = [s.zero(); N];
        for i in 0..N {
            loaded[i] = s.load_first(&x[i][at..end]);
        }
        s.store_first(&mut y[at..end], f(loaded));
    }
}

/// y[i] = f(x[0][i], x[1][i], ..., y[i]) over rows of one length.
#[inline(always)]
pub(crate) fn update<S: Simd, const N: usize>(
    s: S,
    x: [&[f32]; N],
    y: &mut [f32],
    f: impl Fn([S::V; N], S::V) -> S::V,
) {
    let n = y.len();
    assert!(x.iter().all(|x| x.len() == n));
    for at in (0..n).step_by(S::LANES) {
        let end = (at + S::LANES).min(n);
        let mut loaded = [s.zero(); N];
        for i in 0..N {
            loaded[i] = s.load_first(&x[i][at..end]);
        }
        let old = s.load_first(&y[at..end]);
        s.store_first(&mut y[at..end], f(loaded, old));
    }
}
