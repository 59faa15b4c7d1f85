//! Results of one softmax over two sets of keys, made of the results over each: `lse = ln(e^lse1 + e^lse2)`,
//! `o = e^(lse1 - lse) o1 + e^(lse2 - lse) o2`.
//!
//! The order in which parts are merged is the caller's, and with it the bits.

use crate::dtype::SliceMut;
use crate::memory::with_scratch_f32;
use crate::polynomial::{exp2_normal, ln};
use crate::rows::lanes::{transform, update};
use crate::rows::parallel::{Out, for_rows};
use crate::simd::{Isa, Kernel, Simd, dispatch, isa};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// What is merged: queries `first .. first + part` of a result over `queries`.
#[derive(Clone, Copy, Debug)]
pub struct Merge {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Elements of a result's row.
    pub width: usize,
    /// Queries of the whole.
    pub queries: usize,
    /// The part's first query.
    pub first: usize,
    /// The part's queries.
    pub part: usize,
}

/// Merges a part into o [b, t, h, d] and lse [b, h, t]: its results over other keys, from [b, part, h, d] and [b, h, part].
///
/// A row that saw nothing so far, of either, counts for nothing. Panics on lengths that do not fit.
pub fn attention_merge(m: &Merge, o: &mut [f32], lse: &mut [f32], part: &[f32], part_lse: &[f32]) {
    let (rows, line) = (m.batch * m.heads, m.heads * m.width);
    assert!(m.first + m.part <= m.queries, "{m:?}");
    assert_eq!(
        [o.len(), lse.len(), part.len(), part_lse.len()],
        [
            m.batch * m.queries * line,
            rows * m.queries,
            m.batch * m.part * line,
            rows * m.part
        ],
        "lengths of o, lse and of a part: {m:?}"
    );
    if part_lse.is_empty() || m.width == 0 {
        return;
    }
    let isa = isa();
    with_scratch_f32(2 * part_lse.len(), |weights| {
        let (old, new) = weights.split_at_mut(part_lse.len());
        dispatch(
            isa,
            Weigh {
                m,
                lse,
                part_lse,
                old: &mut *old,
                new: &mut *new,
            },
        );
        let (old, new) = (&*old, &*new);
        for b in 0..m.batch {
            let o = &mut o[(b * m.queries + m.first) * line..][..m.part * line];
            let part = &part[b * m.part * line..][..m.part * line];
            mix(isa, m, b, o, part, [old, new]);
        }
    });
}

fn mix(isa: Isa, m: &Merge, b: usize, o: &mut [f32], part: &[f32], weights: [&[f32]; 2]) {
    let out = Out {
        data: SliceMut::F32(o),
        width: m.width,
    };
    for_rows(m.part * m.heads, m.width, out, |rows, out| {
        dispatch(
            isa,
            Mix {
                m,
                b,
                rows,
                o: out.data.typed(),
                part,
                weights,
            },
        );
    });
}

/// New log-sum-exps, and what each side counts for.
struct Weigh<'a> {
    m: &'a Merge,
    lse: &'a mut [f32],
    part_lse: &'a [f32],
    old: &'a mut [f32],
    new: &'a mut [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let m = self.m;
        for row in 0..m.batch * m.heads {
            let at = row * m.part..(row + 1) * m.part;
            let lse = &mut self.lse[row * m.queries + m.first..][..m.part];
            let sides = [lse, &mut self.old[at.clone()], &mut self.new[at.clone()]];
            transform::<S, f32, true, 1, 3>(
                s,
                [&self.part_lse[at]],
                sides,
                #[inline(always)]
                |[new], [old, ..]| {
                    let none = s.splat(f32::NEG_INFINITY);
                    let max = s.max_nan(old, new);
                    // Where neither saw anything 0 stands in for the maximum, so that infinities are not subtracted.
                    let base = s.select(s.eq(max, none), s.zero(), max);
                    let power = s.splat(LOG2_E);
                    let [a, b] = [old, new].map(
                        #[inline(always)]
                        |x| exp2_normal(s, s.mul(s.sub(x, base), power)),
                    );
                    let sum = s.add(a, b);
                    let nothing = s.eq(sum, s.zero());
                    let [a, b] = [a, b].map(
                        #[inline(always)]
                        |x| s.select(nothing, s.zero(), s.div(x, sum)),
                    );
                    [s.add(base, ln(s, sum)), a, b]
                },
            );
        }
    }
}

/// Rows of o, weighted and added.
struct Mix<'a> {
    m: &'a Merge,
    b: usize,
    rows: Range<usize>,
    o: &'a mut [f32],
    part: &'a [f32],
    weights: [&'a [f32]; 2],
}

impl Kernel for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (m, d) = (self.m, self.m.width);
        for (row, o) in self.rows.clone().zip(self.o.chunks_exact_mut(d)) {
            let (t, h) = (row / m.heads, row % m.heads);
            let at = (self.b * m.heads + h) * m.part + t;
            let [old, new] = self.weights.map(|w| s.splat(w[at]));
            update(
                s,
                [&self.part[row * d..][..d]],
                o,
                #[inline(always)]
                |[part], o| s.fma(o, old, s.mul(part, new)),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Geometry, Heads, HeadsMut, attention_forward};
    use crate::dtype::Slice;
    use crate::random::Stream;

    const M: Merge = Merge {
        batch: 2,
        heads: 3,
        width: 20,
        queries: 70,
        first: 0,
        part: 70,
    };

    fn normals(name: &str, len: usize) -> Vec<f32> {
        let mut x = vec![0.0; len];
        Stream::new(5, name).fill_normal(0, &mut x);
        x
    }

    fn attend(q: &[f32], k: &[f32], v: &[f32], keys: Range<usize>, all: usize) -> [Vec<f32>; 2] {
        let line = M.heads * M.width;
        let g = Geometry {
            batch: M.batch,
            heads: M.heads,
            kv_heads: M.heads,
            queries: M.queries,
            keys: keys.len(),
            head_dim: M.width,
            scale: 0.3,
            soft_cap: None,
            causal: false,
            window: None,
            offset: 0,
            documents: None,
        };
        let heads = |data, tokens: usize| Heads {
            data: Slice::F32(data),
            strides: [tokens * line, M.width, line],
        };
        let mut o = vec![f32::NAN; M.batch * M.queries * line];
        let mut lse = vec![f32::NAN; M.batch * M.heads * M.queries];
        let out = HeadsMut {
            data: SliceMut::F32(&mut o),
            strides: [M.queries * line, M.width, line],
        };
        let skip = keys.start * line;
        let (k, v) = (heads(&k[skip..], all), heads(&v[skip..], all));
        attention_forward(&g, heads(q, M.queries), k, v, out, &mut lse);
        [o, lse]
    }

    #[test]
    fn two_parts_make_the_whole() {
        let line = M.heads * M.width;
        let (all, cut) = (100, 37);
        let q = normals("q", M.batch * M.queries * line);
        let [k, v] = ["k", "v"].map(|n| normals(n, M.batch * all * line));
        let [want, want_lse] = attend(&q, &k, &v, 0..all, all);
        let [mut o, mut lse] = attend(&q, &k, &v, 0..cut, all);
        let [part, part_lse] = attend(&q, &k, &v, cut..all, all);
        attention_merge(&M, &mut o, &mut lse, &part, &part_lse);
        // Both sides are weighted means of values below 5, from sums of at most 100 keys.
        let bound = 5.0 * 160.0 * f32::EPSILON;
        for (a, b) in o.iter().chain(&lse).zip(want.iter().chain(&want_lse)) {
            assert!((a - b).abs() <= bound, "{a} {b}");
        }
    }

    #[test]
    fn a_side_that_saw_nothing_changes_no_bit() {
        let m = Merge {
            batch: 1,
            heads: 1,
            width: 2,
            queries: 4,
            first: 1,
            part: 2,
        };
        let none = f32::NEG_INFINITY;
        let (mut o, mut lse) = (
            vec![1.5, 2.5, 3.5, 4.5, 0.0, 0.0, 7.5, 8.5],
            vec![0.25, 0.5, none, 0.75],
        );
        attention_merge(&m, &mut o, &mut lse, &[0.0, 0.0, 9.5, 1.5], &[none, 2.0]);
        assert_eq!(o, [1.5, 2.5, 3.5, 4.5, 9.5, 1.5, 7.5, 8.5]);
        assert_eq!(lse, [0.25, 0.5, 2.0, 0.75]);
        attention_merge(
            &m,
            &mut o[..],
            &mut lse,
            &[f32::NAN, 1.0, 0.0, 0.0],
            &[f32::NAN, none],
        );
        assert!(o[2].is_nan() && lse[1].is_nan());
        let mut nothing = (vec![0.0; 8], vec![none; 4]);
        attention_merge(&m, &mut nothing.0, &mut nothing.1, &[0.0; 4], &[none; 2]);
        assert_eq!(nothing, (vec![0.0; 8], vec![none; 4]));
    }
}
