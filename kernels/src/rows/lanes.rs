//! Loops over a row in groups of 32 virtual lanes.
//!
//! A sum over a row is always: lane j adds the elements j, j + 32, j + 64, ... in this order, then a binary tree adds the
//! lanes. Four vectors of AVX2 or two of AVX-512 make one group, so that every instruction set gives the same bits. A
//! ragged last group is filled up with a value that does not change the sum.
//!
//! Closures handed to these loops carry `#[inline(always)]`: left to itself the compiler kept some apart, compiled for the
//! baseline CPU, where an exponential took five times as long.

use super::parallel::{part, part_mut};
use crate::dtype::{Float, Slice, SliceMut};
use crate::simd::{Simd, ahead_of_reads};
use std::ops::Range;

/// Virtual lanes of every row sum.
pub(crate) const GROUP: usize = 32;

/// Vectors of a group where a vector has four lanes, the fewest of all.
pub(crate) const MOST: usize = GROUP / 4;

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
    fn go<S: Simd, T: Float>(s: S, x: &[T], to: &mut [f32]) {
        assert_eq!(x.len(), to.len());
        let (whole, rest) = x.as_chunks::<GROUP>();
        let (whole_to, rest_to) = to.as_chunks_mut::<GROUP>();
        for (x, to) in whole.iter().zip(whole_to) {
            ahead::<S, GROUP, _>(s, x.as_ptr());
            let mut from = 0;
            while from < GROUP {
                s.store(&mut to[from..], s.load(&x[from..]));
                from += S::LANES;
            }
        }
        for (x, to) in rest.chunks(S::LANES).zip(rest_to.chunks_mut(S::LANES)) {
            s.store_first(to, s.load_first(x));
        }
    }
    match x {
        // Not `copy_from_slice`: for rows of a few lines its call costs more than the copy.
        Slice::F32(x) => go(s, x, to),
        Slice::Bf16(x) => go(s, x, to),
        Slice::F16(x) => go(s, x, to),
        Slice::U32(_) => panic!("kernels compute on floats, not on u32"),
    }
}

/// Writes all of `x`, rounded to nearest even, to `to`. Panics unless the lengths are equal.
#[inline(always)]
pub(crate) fn narrow_into<S: Simd>(s: S, x: &[f32], to: SliceMut) {
    #[inline(always)]
    fn go<S: Simd, T: Float>(s: S, x: &[f32], to: &mut [T]) {
        assert_eq!(x.len(), to.len());
        let (whole, rest) = x.as_chunks::<GROUP>();
        let (whole_to, rest_to) = to.as_chunks_mut::<GROUP>();
        for (x, to) in whole.iter().zip(whole_to) {
            ahead::<S, GROUP, _>(s, to.as_ptr());
            let mut from = 0;
            while from < GROUP {
                s.store(&mut to[from..], s.load(&x[from..]));
                from += S::LANES;
            }
        }
        for (x, to) in rest.chunks(S::LANES).zip(rest_to.chunks_mut(S::LANES)) {
            s.store_first(to, s.load_first(x));
        }
    }
    match to {
        SliceMut::F32(to) => go(s, x, to),
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
    let mut first = [s.zero(); M];
    let mut i = 0;
    while i < M {
        first[i] = s.splat(start[i]);
        i += 1;
    }
    let mut sums = [first; MOST];
    let (whole, rest) = groups(x[0].len(), x);
    let bytes = ahead_of_reads();
    let mut at = 0;
    while at < whole[0].len() {
        let mut group = [&[0.0; GROUP]; N];
        i = 0;
        while i < N {
            group[i] = &whole[i][at];
            ahead_by::<S, GROUP, _>(s, group[i].as_ptr(), bytes);
            i += 1;
        }
        fold_group(s, group, &mut sums, &f);
        at += 1;
    }
    if !rest[0].is_empty() {
        let mut padded = [[0f32; GROUP]; N];
        let mut group = [&[0.0; GROUP]; N];
        i = 0;
        while i < N {
            padded[i] = [fill[i]; GROUP];
            padded[i][..rest[i].len()].copy_from_slice(rest[i]);
            i += 1;
        }
        i = 0;
        while i < N {
            group[i] = &padded[i];
            i += 1;
        }
        fold_group(s, group, &mut sums, &f);
    }
    let mut lanes = [[0f32; GROUP]; M];
    let mut v = 0;
    while v < GROUP / S::LANES {
        i = 0;
        while i < M {
            s.store(&mut lanes[i][v * S::LANES..], sums[v][i]);
            i += 1;
        }
        v += 1;
    }
    lanes
}

#[inline(always)]
fn fold_group<S: Simd, const N: usize, const M: usize>(
    s: S,
    group: [&[f32; GROUP]; N],
    sums: &mut [[S::V; M]; MOST],
    f: &impl Fn([S::V; N], [S::V; M]) -> [S::V; M],
) {
    // The count is a constant: the loop is unrolled, and the sums stay in registers.
    let mut v = 0;
    while v < GROUP / S::LANES {
        let mut loaded = [s.zero(); N];
        let mut i = 0;
        while i < N {
            loaded[i] = s.load(&group[i][v * S::LANES..]);
            i += 1;
        }
        sums[v] = f(loaded, sums[v]);
        v += 1;
    }
}

/// Rows of n elements as groups of 32 and what is left: within a group no index is checked.
#[inline(always)]
#[allow(clippy::type_complexity)]
fn groups<T, const N: usize>(n: usize, x: [&[T]; N]) -> ([&[[T; GROUP]]; N], [&[T]; N]) {
    let (mut whole, mut rest) = ([&[][..]; N], [&[][..]; N]);
    let mut i = 0;
    while i < N {
        assert_eq!(x[i].len(), n, "rows differ in length");
        (whole[i], rest[i]) = x[i].as_chunks::<GROUP>();
        i += 1;
    }
    (whole, rest)
}

/// Rows without elements.
pub(crate) fn empty<'a, T, const N: usize>() -> [&'a mut [T]; N] {
    std::array::from_fn(|_| &mut [][..])
}

/// [`groups`] for writing.
#[inline(always)]
#[allow(clippy::type_complexity)]
fn groups_mut<T, const N: usize>(
    n: usize,
    mut y: [&mut [T]; N],
) -> ([&mut [[T; GROUP]]; N], [&mut [T]; N]) {
    let (mut whole, mut rest) = (empty(), empty());
    let mut i = 0;
    while i < N {
        assert_eq!(y[i].len(), n, "rows differ in length");
        (whole[i], rest[i]) = std::mem::take(&mut y[i]).as_chunks_mut::<GROUP>();
        i += 1;
    }
    (whole, rest)
}

/// How far ahead of its use memory is asked for, in bytes. What a kernel computes on a line takes longer than the
/// processor looks ahead, and its own guesses stop at a page: on a Xeon with AVX-512 asking made f32 to bf16 1.5 times as
/// fast, bf16 GELU 1.8 times. What is widened to, or narrowed from, mostly lies in the first cache, and is not asked for.
const AHEAD: usize = 4096;

/// Asks for the cache lines of `N` elements, `AHEAD` bytes behind `p`; they need not exist.
#[inline(always)]
pub(crate) fn ahead<S: Simd, const N: usize, T>(s: S, p: *const T) {
    ahead_by::<S, N, T>(s, p, AHEAD);
}

/// [`ahead`] by a distance of its own.
#[inline(always)]
pub(crate) fn ahead_by<S: Simd, const N: usize, T>(s: S, p: *const T, bytes: usize) {
    let p = p.cast::<u8>().wrapping_add(bytes);
    let mut line = 0;
    while line < N * size_of::<T>() {
        s.prefetch(p.wrapping_add(line));
        line += 64;
    }
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
    transform::<S, f32, false, N, 1>(
        s,
        x,
        [y],
        #[inline(always)]
        |x, _| [f(x)],
    );
}

/// y[i] = f(x[0][i], x[1][i], ..., y[i]) over rows of one length.
#[inline(always)]
pub(crate) fn update<S: Simd, const N: usize>(
    s: S,
    x: [&[f32]; N],
    y: &mut [f32],
    f: impl Fn([S::V; N], S::V) -> S::V,
) {
    transform::<S, f32, true, N, 1>(
        s,
        x,
        [y],
        #[inline(always)]
        |x, [y]| [f(x, y)],
    );
}

/// (y[0][i], y[1][i], ...) = f((x[0][i], ...), (y[0][i], ...)) over rows of one length and type, computed in f32; without
/// `READ`, f gets zeros for y.
#[inline(always)]
pub(crate) fn transform<S: Simd, T: Float, const READ: bool, const N: usize, const M: usize>(
    s: S,
    x: [&[T]; N],
    y: [&mut [T]; M],
    f: impl Fn([S::V; N], [S::V; M]) -> [S::V; M],
) {
    // Loops over constants with `while`, here and in `groups`: this body is compiled some hundred times, and iterators were
    // most of its code.
    let n = y[0].len();
    let (whole, rest) = groups(n, x);
    let (whole_y, rest_y) = groups_mut(n, y);
    let mut at = 0;
    while at < n / GROUP {
        let mut i = 0;
        while i < N {
            ahead::<S, GROUP, _>(s, whole[i][at].as_ptr());
            i += 1;
        }
        i = 0;
        while i < M {
            ahead::<S, GROUP, _>(s, whole_y[i][at].as_ptr());
            i += 1;
        }
        let mut from = 0;
        while from < GROUP {
            let (mut inputs, mut old) = ([s.zero(); N], [s.zero(); M]);
            i = 0;
            while i < N {
                inputs[i] = s.load(&whole[i][at][from..]);
                i += 1;
            }
            i = 0;
            while READ && i < M {
                old[i] = s.load(&whole_y[i][at][from..]);
                i += 1;
            }
            let new = f(inputs, old);
            i = 0;
            while i < M {
                s.store(&mut whole_y[i][at][from..], new[i]);
                i += 1;
            }
            from += S::LANES;
        }
        at += 1;
    }
    let left = n % GROUP;
    at = 0;
    while at < left {
        let (mut inputs, mut old) = ([s.zero(); N], [s.zero(); M]);
        let mut i = 0;
        while i < N {
            inputs[i] = s.load_first(&rest[i][at..]);
            i += 1;
        }
        i = 0;
        while READ && i < M {
            old[i] = s.load_first(&rest_y[i][at..]);
            i += 1;
        }
        let new = f(inputs, old);
        i = 0;
        while i < M {
            s.store_first(&mut rest_y[i][at..], new[i]);
            i += 1;
        }
        at += S::LANES;
    }
}

/// The greatest of 32 lanes, blind for NaN: halves held against halves.
#[inline(always)]
pub(crate) fn tree_max(mut lanes: [f32; GROUP]) -> f32 {
    let mut half = GROUP / 2;
    while half > 0 {
        for i in 0..half {
            // Not `f32::max`, which is three instructions for the sake of NaN.
            lanes[i] = if lanes[i] > lanes[i + half] {
                lanes[i]
            } else {
                lanes[i + half]
            };
        }
        half /= 2;
    }
    lanes[0]
}
