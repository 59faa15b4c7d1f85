//! Attention, its masks and its count of visible pairs.

use super::harness::{Array, Bounded, Case, FLOATS, U};
use crate::dtype::DType;
use crate::ops::{Attention, Op};
use crate::reference::{self, gamma};
use crate::tensor::TensorType;

struct Sizes {
    b: usize,
    t: usize,
    s: usize,
    h: usize,
    g: usize,
    d: usize,
}

/// The textbook has heads before tokens.
fn by_heads(x: &[f64], [b, t, h, d]: [usize; 4]) -> Vec<f64> {
    reference::permute(&[b, t, h, d], &[0, 2, 1, 3], x)
}

fn by_tokens(x: &[f64], [b, t, h, d]: [usize; 4]) -> Vec<f64> {
    reference::permute(&[b, h, t, d], &[0, 2, 1, 3], x)
}

fn textbook<'a>(
    op: &Attention,
    n: &Sizes,
    documents: Option<(&'a [u32], &'a [u32])>,
) -> reference::Attention<'a> {
    reference::Attention {
        kv_heads: n.g,
        scale: op.scale.map_or(1.0 / (n.d as f64).sqrt(), f64::from),
        soft_cap: op.soft_cap.map(f64::from),
        causal: op.causal,
        window: op.window,
        offset: op.offset,
        documents,
        ..reference::Attention::full(n.b, n.h, n.t, n.s, n.d)
    }
}

/// How far a computed logit may be off: the largest over keys, of any query. Inputs are normal; sums of d products.
fn logit_off(n: &Sizes, scale: f64, q: &[f64], k: &[f64]) -> f64 {
    let norm = |x: &[f64]| {
        x.chunks(n.d)
            .map(|r| r.iter().map(|x| x * x).sum::<f64>().sqrt())
            .fold(0.0, f64::max)
    };
    // |q| |k| bounds the sum of |q_i k_i| (Cauchy, Schwarz); 24 for the cap, the argument of exp and exp itself.
    gamma(n.d + 24, U) * (scale * norm(q) * norm(k) + 1.0)
}

/// Where a processor's unit for bf16 takes weights and their gradients as operands of products, in bf16: its powers of two are
/// within 2^-18. Elsewhere, and on graphics processors, they stay in f32.
fn narrow(dtype: DType) -> f64 {
    let on_unit = !super::harness::is_on_gpu() && crate::cpu::simd::has_tile_unit();
    if dtype == DType::Bf16 && on_unit {
        dtype.roundoff() + 2f64.powi(-16)
    } else {
        0.0
    }
}

fn check(op: &Attention, n: Sizes, dtype: DType) {
    let ids = |tokens: usize| -> Vec<u32> {
        (0..n.b * tokens).map(|i| (i % tokens / 5) as u32).collect()
    };
    let (of_q, of_k) = (ids(n.t), ids(n.s));
    let g = textbook(op, &n, op.documents.then_some((&of_q[..], &of_k[..])));
    let (qs, ks) = ([n.b, n.t, n.h, n.d], [n.b, n.s, n.g, n.d]);
    let mut inputs = vec![
        Array::normal("q", &qs, dtype),
        Array::normal("k", &ks, dtype),
        Array::normal("v", &ks, dtype),
    ];
    if op.documents {
        inputs.push(Array::indices(&[n.b, n.t], &of_q));
        inputs.push(Array::indices(&[n.b, n.s], &of_k));
    }
    let heads =
        |x: &[Array]| [(0, qs), (1, ks), (2, ks)].map(|(i, shape)| by_heads(&x[i].values, shape));
    // Rows of p, padded with zeros where nothing is seen.
    let weights = |q: &[f64], k: &[f64], lse: &[f64]| {
        let mut p = vec![0.0; n.b * n.h * n.t * n.s];
        for row in 0..n.b * n.h * n.t {
            let (b, h, t) = (row / n.t / n.h, row / n.t % n.h, row % n.t);
            let key = (b * n.g + h / (n.h / n.g)) * n.s;
            for s in (0..n.s).filter(|&s| g.sees(b, t, s)) {
                let dot: f64 = (0..n.d)
                    .map(|i| q[row * n.d + i] * k[(key + s) * n.d + i])
                    .sum();
                let logit = dot * g.scale;
                let logit = g.soft_cap.map_or(logit, |c| c * (logit / c).tanh());
                p[row * n.s + s] = (logit - lse[row]).exp();
            }
        }
        p
    };
    Case::new(op, inputs).check(
        |x| {
            let [q, k, v] = heads(x);
            let (o, lse) = reference::attention(&g, &q, &k, &v);
            let off = logit_off(&n, g.scale, &q, &k);
            // A weight is off by twice the logits' error, relatively; then sums over s keys of p |v|.
            let sizes: Vec<f64> = v.iter().map(|v| v.abs()).collect();
            let (o_size, _) = reference::attention(&g, &q, &k, &sizes);
            let o_off = o_size
                .iter()
                .map(|s| (2.1 * off + gamma(n.s + 24, U) + narrow(dtype)) * s)
                .collect::<Vec<_>>();
            let lse_off = lse
                .iter()
                .map(|l| off + gamma(n.s + 24, U) + gamma(4, U) * l.abs() + narrow(dtype) / 64.0)
                .collect();
            vec![(by_tokens(&o, qs), by_tokens(&o_off, qs)), (lse, lse_off)]
        },
        |x, outputs, dy| {
            let [q, k, v] = heads(x);
            let (o, dout) = (by_heads(&outputs[0].values, qs), by_heads(dy, qs));
            let lse = &outputs[1].values;
            let want = reference::attention_backward(&g, [&q, &k, &v], &o, lse, &dout);
            let off = backward_off(
                &n,
                &weights(&q, &k, lse),
                [&q, &k, &v, &o, &dout],
                logit_off(&n, g.scale, &q, &k),
                g.scale,
                narrow(dtype),
            );
            let mut gradients: Vec<Option<Bounded>> = want
                .iter()
                .zip(&off)
                .zip([qs, ks, ks])
                .map(|((want, off), shape)| Some((by_tokens(want, shape), by_tokens(off, shape))))
                .collect();
            gradients.resize(x.len(), None);
            gradients
        },
    );
}

/// The bounds of dq, dk and dv, heads before tokens, from the weights p and the error of a logit.
fn backward_off(
    n: &Sizes,
    p: &[f64],
    [q, k, v, o, dout]: [&[f64]; 5],
    logit: f64,
    scale: f64,
    narrow: f64,
) -> [Vec<f64>; 3] {
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
    // lse carries its own rounding into p; its size here is below 16.
    let weight = 2.1 * logit + gamma(40, U) + narrow;
    // A chain over keys or over the queries of a group, in f32.
    let sum = gamma(n.s + n.t * n.h / n.g + 8, U);
    for row in 0..n.b * n.h * n.t {
        let (b, h) = (row / n.t / n.h, row / n.t % n.h);
        let size = |x: &[f64], at: usize| -> f64 {
            (0..n.d)
                .map(|i| (dout[row * n.d + i] * x[at * n.d + i]).abs())
                .sum()
        };
        let d_size = size(o, row);
        for s in 0..n.s {
            let (p, key) = (p[row * n.s + s], (b * n.g + h / (n.h / n.g)) * n.s + s);
            let both = size(v, key) + d_size;
            // ds = p (dp - D), where dp and D are sums of d products. The cap's slope is at most 1, and off by a few u.
            let ds = scale * p * both;
            let ds_off = ds * (weight + gamma(n.d + 24, U) + sum + narrow);
            for i in 0..n.d {
                dq[row * n.d + i] += ds_off * k[key * n.d + i].abs();
                dk[key * n.d + i] += ds_off * q[row * n.d + i].abs();
                dv[key * n.d + i] += p * (weight + sum) * dout[row * n.d + i].abs();
            }
        }
    }
    [dq, dk, dv]
}

fn ops() -> Vec<Attention> {
    let causal = Attention {
        causal: true,
        ..Default::default()
    };
    vec![
        Attention::default(),
        causal.clone(),
        Attention {
            window: Some(4),
            ..causal.clone()
        },
        Attention {
            window: Some(3),
            ..Default::default()
        },
        Attention {
            offset: 6,
            ..causal.clone()
        },
        Attention {
            soft_cap: Some(2.0),
            scale: Some(0.5),
            ..causal.clone()
        },
        Attention {
            documents: true,
            ..causal
        },
        Attention {
            documents: true,
            ..Default::default()
        },
    ]
}

#[test]
pub(super) fn every_mask_in_every_type() {
    for op in ops() {
        for dtype in FLOATS {
            check(
                &op,
                Sizes {
                    b: 2,
                    t: 13,
                    s: 13,
                    h: 4,
                    g: 2,
                    d: 8,
                },
                dtype,
            );
        }
    }
}

/// Every mask in one type.
#[test]
pub(super) fn every_mask_once() {
    for op in ops() {
        let sizes = Sizes {
            b: 2,
            t: 9,
            s: 9,
            h: 2,
            g: 1,
            d: 4,
        };
        check(&op, sizes, DType::F32);
    }
}

#[test]
pub(super) fn sizes_at_the_edges() {
    for op in ops() {
        for (t, s, h, g, d) in [
            (1, 1, 1, 1, 1),
            (1, 67, 2, 1, 16),
            (65, 70, 1, 1, 5),
            (5, 2, 4, 1, 64),
            (37, 41, 4, 2, 36),
        ] {
            check(
                &op,
                Sizes {
                    b: 1,
                    t,
                    s,
                    h,
                    g,
                    d,
                },
                DType::F32,
            );
        }
    }
}

/// Few rows and many keys: a card shares the keys out, parts of which some rows see nothing.
#[test]
pub(super) fn few_rows_over_many_keys() {
    for op in ops() {
        for (b, t, s, h, g, d) in [
            (1, 1, 64, 1, 1, 8),
            (1, 1, 191, 2, 1, 4),
            (2, 3, 300, 4, 2, 5),
            (1, 130, 257, 2, 2, 4),
        ] {
            check(&op, Sizes { b, t, s, h, g, d }, DType::F32);
        }
    }
    check(
        &Attention::default(),
        Sizes {
            b: 1,
            t: 2,
            s: 400,
            h: 2,
            g: 1,
            d: 16,
        },
        DType::Bf16,
    );
}

#[test]
pub(super) fn the_largest_head() {
    let causal = Attention {
        causal: true,
        ..Default::default()
    };
    check(
        &causal,
        Sizes {
            b: 1,
            t: 3,
            s: 3,
            h: 1,
            g: 1,
            d: 256,
        },
        DType::Bf16,
    );
}

#[test]
pub(super) fn one_key_head_stays_whole_while_query_heads_are_split() {
    let ty = |h| TensorType::new([2, 8, h, 16], DType::F32);
    let letters = |h, g| {
        let axes = Attention::default().axes(&[ty(h), ty(g), ty(g)]);
        axes.inputs
            .iter()
            .map(|l| l.iter().collect())
            .collect::<Vec<String>>()
    };
    assert_eq!(letters(4, 2), ["bThD", "bShD", "bShD"]);
    assert_eq!(letters(4, 1), ["bThD", "bSGD", "bSGD"]);
    assert_eq!(letters(1, 1), ["bThD", "bShD", "bShD"]);
}

#[test]
fn visible_pairs_are_counted_exactly() {
    for causal in [false, true] {
        for window in [None, Some(0), Some(1), Some(3), Some(100), Some(usize::MAX)] {
            for offset in [0, 2, 50] {
                for (t, s) in [(0, 4), (4, 0), (1, 1), (7, 7), (3, 9), (9, 3)] {
                    let op = Attention {
                        causal,
                        window,
                        offset,
                        ..Default::default()
                    };
                    let n = Sizes {
                        b: 1,
                        t,
                        s,
                        h: 1,
                        g: 1,
                        d: 1,
                    };
                    let g = textbook(&op, &n, None);
                    let seen = (0..t).flat_map(|t| (0..s).map(move |s| (t, s)));
                    let seen = seen.filter(|&(t, s)| g.sees(0, t, s)).count();
                    assert_eq!(op.pairs(t, s), seen as u64, "{op:?} {t} {s}");
                }
            }
        }
    }
}

#[test]
fn costs_are_exact() {
    let ty = |t, h| TensorType::new([2, t, h, 16], DType::Bf16);
    let op = Attention {
        causal: true,
        ..Default::default()
    };
    let inputs = [ty(8, 4), ty(8, 2), ty(8, 2)];
    let outputs = op.infer(&inputs).unwrap();
    let cost = op.cost(&inputs, &outputs);
    assert_eq!(cost.flops, 4 * 16 * (2 * 4 * 36));
    assert_eq!(cost.bytes, 2 * (1024 + 512 + 512 + 1024) + 4 * 64);
    assert_eq!(
        op.backward_cost(&inputs, &outputs, &[true; 3]).flops * 2,
        cost.flops * 5
    );
}

#[test]
fn what_does_not_fit_is_said_with_both_sides() {
    let ty = |shape: &[usize]| TensorType::new(shape, DType::F32);
    let op = Attention::default();
    let q = ty(&[2, 8, 6, 16]);
    for (k, v) in [
        (ty(&[2, 8, 4, 16]), ty(&[2, 8, 4, 16])),
        (ty(&[2, 8, 3, 16]), ty(&[2, 7, 3, 16])),
        (ty(&[1, 8, 3, 16]), ty(&[1, 8, 3, 16])),
        (ty(&[2, 8, 3, 8]), ty(&[2, 8, 3, 8])),
        (ty(&[8, 3, 16]), ty(&[8, 3, 16])),
    ] {
        let why = op.infer(&[q.clone(), k.clone(), v]).unwrap_err();
        assert!(
            why.contains(&q.to_string()) && why.contains(&k.to_string()),
            "{why}"
        );
    }
    let wide = ty(&[1, 2, 1, 257]);
    assert!(op.infer(&[wide.clone(), wide.clone(), wide]).is_err());
    assert!(op.infer(&[q.clone(), q.clone()]).is_err());
    let with = Attention {
        documents: true,
        ..Default::default()
    };
    let id = |t| TensorType::new([2, t], DType::U32);
    assert!(
        with.infer(&[q.clone(), q.clone(), q.clone(), id(8), id(8)])
            .is_ok()
    );
    assert!(
        with.infer(&[q.clone(), q.clone(), q, id(8), id(7)])
            .is_err()
    );
}
