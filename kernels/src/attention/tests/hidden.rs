//! Masked means unread: what a mask hides changes no bit of what it does not, whatever it is.

use super::*;
use crate::simd::with_isa;

/// q, k, v, dout.
type Inputs = [Vec<f32>; 4];
/// o, lse, dq, dk, dv.
type Outputs = [Vec<f32>; 5];

fn run(g: &Geometry, dtype: DType, inputs: &Inputs) -> Outputs {
    let data = inputs.each_ref().map(|x| Data::new(dtype, x.clone()));
    let (qs, ks) = (
        strides(g.heads, g.queries, g.head_dim),
        strides(g.kv_heads, g.keys, g.head_dim),
    );
    let strides_of = [qs, ks, ks, qs];
    let [q, k, v, dout] = std::array::from_fn(|i| Heads {
        data: data[i].get(),
        strides: strides_of[i],
    });
    let (nq, nk) = (q.data.len(), k.data.len());
    let mut o = Data::unwritten(dtype, nq);
    let mut lse = vec![f32::NAN; g.batch * g.heads * g.queries];
    fn to(data: SliceMut, strides: [usize; 3]) -> HeadsMut {
        HeadsMut { data, strides }
    }
    attention_forward(g, q, k, v, to(o.get_mut(), qs), &mut lse);
    let [mut dq, mut dk, mut dv] = [nq, nk, nk].map(|n| Data::unwritten(dtype, n));
    let result = Heads {
        data: o.get(),
        strides: qs,
    };
    attention_backward(
        g,
        q,
        k,
        v,
        result,
        dout,
        &lse,
        to(dq.get_mut(), qs),
        to(dk.get_mut(), ks),
        to(dv.get_mut(), ks),
    );
    [o.f32(), lse, dq.f32(), dk.f32(), dv.f32()]
}

fn sees(g: &Geometry, b: usize, t: usize, key: usize) -> bool {
    let same = |(q, k): (&[u32], &[u32])| q[b * g.queries + t] == k[b * g.keys + key];
    g.visible(t).contains(&key) && g.documents.is_none_or(same)
}

/// Fills token `t` of all heads of every sequence of [b, t, h, d].
fn fill(x: &mut [f32], [batch, heads, tokens, d]: [usize; 4], t: usize, value: f32) {
    for b in 0..batch {
        x[(b * tokens + t) * heads * d..][..heads * d].fill(value);
    }
}

/// Panics unless token `t` of both has the same bits, in every sequence for which `wanted` holds.
fn same(
    what: &str,
    [batch, heads, tokens, d]: [usize; 4],
    t: usize,
    (a, b): (&[f32], &[f32]),
    wanted: impl Fn(usize) -> bool,
) {
    for s in (0..batch).filter(|&s| wanted(s)) {
        let at = (s * tokens + t) * heads * d;
        let [a, b] = [a, b].map(|x| bits(&x[at..at + heads * d]));
        assert!(a == b, "{what}: token {t} of sequence {s} changed");
    }
}

fn one_case(dtype: DType, shape: [usize; 6], change: fn(&mut Geometry<'static>)) {
    let [batch, heads, kv_heads, queries, keys, d] = shape;
    let mut g = plain(shape);
    change(&mut g);
    let g = &g;
    let (of_q, of_k) = ([batch, heads, queries, d], [batch, kv_heads, keys, d]);
    let size = |x: [usize; 4]| x.iter().product::<usize>();
    let inputs = ["q", "k", "v", "dout"].map(|name| {
        let n = if ["q", "dout"].contains(&name) {
            size(of_q)
        } else {
            size(of_k)
        };
        Data::random(dtype, name, n, 1.0).f32()
    });
    let clean = run(g, dtype, &inputs);
    // Rows of lse lie [b, h, t]: as tokens of [b, t, h, 1].
    let by_token = |lse: &[f32]| {
        let at = |i: usize| {
            let (b, t, h) = (i / (queries * heads), i / heads % queries, i % heads);
            lse[(b * heads + h) * queries + t]
        };
        (0..lse.len()).map(at).collect::<Vec<_>>()
    };
    let lses = [batch, heads, queries, 1];
    let seen_by_any = |key| (0..batch).any(|b| (0..queries).any(|t| sees(g, b, t, key)));
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        let what = format!("{dtype} {shape:?} {value}");
        // Keys that nobody sees.
        let mut dirty = inputs.clone();
        let unseen: Vec<usize> = (0..keys).filter(|&key| !seen_by_any(key)).collect();
        for &key in &unseen {
            fill(&mut dirty[1], of_k, key, value);
            fill(&mut dirty[2], of_k, key, value);
        }
        if !unseen.is_empty() {
            let got = run(g, dtype, &dirty);
            for (name, (got, clean)) in ["o", "lse", "dq", "dk", "dv"]
                .iter()
                .zip(got.iter().zip(&clean))
            {
                assert!(bits(got) == bits(clean), "{what}: {name} read hidden keys");
            }
        }
        // A key, or its value, that some do not see.
        for key in [keys / 3, keys - 1]
            .into_iter()
            .filter(|&key| seen_by_any(key))
        {
            for of in [1, 2] {
                let mut dirty = inputs.clone();
                fill(&mut dirty[of], of_k, key, value);
                let got = run(g, dtype, &dirty);
                for t in 0..queries {
                    let blind = |b: usize| !sees(g, b, t, key);
                    same(&what, of_q, t, (&got[0], &clean[0]), blind);
                    same(&what, of_q, t, (&got[2], &clean[2]), blind);
                    let lse = (&*by_token(&got[1]), &*by_token(&clean[1]));
                    same(&what, lses, t, lse, blind);
                }
                if value.is_nan() {
                    let seeing = (0..queries).find(|&t| sees(g, 0, t, key));
                    let t = seeing.filter(|_| of == 2);
                    let read = t.is_none_or(|t| got[0][t * heads * d].is_nan());
                    assert!(read, "{what}: a visible NaN is lost");
                }
            }
        }
        // A query, or its gradient: keys that it does not see, and other queries.
        for t in [0, queries / 2] {
            for of in [0, 3] {
                let mut dirty = inputs.clone();
                fill(&mut dirty[of], of_q, t, value);
                let got = run(g, dtype, &dirty);
                for other in (0..queries).filter(|&other| other != t) {
                    same(&what, of_q, other, (&got[0], &clean[0]), |_| true);
                    same(&what, of_q, other, (&got[2], &clean[2]), |_| true);
                }
                for key in 0..keys {
                    let blind = |b: usize| !sees(g, b, t, key);
                    same(&what, of_k, key, (&got[3], &clean[3]), blind);
                    same(&what, of_k, key, (&got[4], &clean[4]), blind);
                }
            }
        }
    }
}

#[test]
fn what_is_hidden_is_not_read() {
    let cases: [Case; 8] = [
        ([1, 1, 1, 3, 3, 1], CAUSAL),
        ([2, 2, 1, 70, 70, 16], CAUSAL),
        ([1, 2, 2, 20, 150, 8], |g| {
            (g.causal, g.offset) = (true, 100)
        }),
        ([1, 1, 1, 40, 90, 12], |g| {
            (g.causal, g.offset, g.window) = (true, 40, Some(9));
        }),
        ([1, 1, 1, 30, 70, 8], |g| {
            (g.window, g.offset) = (Some(7), 20)
        }),
        ([1, 2, 1, 150, 150, 8], |g| {
            g.causal = true;
            g.documents = Some(documents(150));
        }),
        ([1, 1, 1, 33, 40, 16], |g| {
            (g.causal, g.soft_cap) = (true, Some(1.5));
        }),
        // Keys in chunks, a cache beyond its length.
        ([1, 4, 2, 1, 2100, 24], |g| {
            (g.causal, g.offset) = (true, 1500)
        }),
    ];
    for (shape, change) in cases {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            one_case(dtype, shape, change);
            for isa in Isa::available() {
                with_isa(isa, || one_case(dtype, shape, change));
            }
        }
    }
}
