//! Attention against the textbook in f64: all masks, caps, groups, types and ragged sizes, on every instruction set of this
//! machine, with one thread and two.

mod accuracy;
mod hidden;

use super::*;
use crate::dtype::DType;
use crate::rows::tests::{Data, U, bits, check, everywhere_on};
use crate::simd::Isa;

/// A case: [batch, heads, kv_heads, queries, keys, head_dim], and a change to the plain geometry.
type Case = ([usize; 6], fn(&mut Geometry<'static>));

const PLAIN: fn(&mut Geometry<'static>) = |_| {};
const CAUSAL: fn(&mut Geometry<'static>) = |g| g.causal = true;

fn cases() -> Vec<Case> {
    vec![
        ([0, 2, 1, 3, 3, 4], PLAIN),
        ([1, 1, 1, 0, 5, 4], PLAIN),
        ([2, 2, 2, 3, 0, 4], PLAIN),
        ([1, 1, 1, 1, 1, 1], PLAIN),
        ([1, 2, 2, 5, 7, 3], PLAIN),
        // Barely more keys than the unit leaves to vectors.
        ([0, 2, 1, 3, 18, 4], PLAIN),
        ([1, 1, 1, 0, 17, 4], PLAIN),
        ([1, 1, 1, 1, 19, 1], PLAIN),
        ([1, 2, 2, 5, 17, 3], PLAIN),
        ([1, 1, 1, 64, 64, 16], CAUSAL),
        ([2, 3, 1, 33, 65, 17], CAUSAL),
        ([1, 4, 2, 67, 67, 40], |g| {
            (g.causal, g.soft_cap) = (true, Some(1.5));
        }),
        ([1, 2, 1, 31, 131, 32], |g| {
            (g.causal, g.offset, g.window) = (true, 100, Some(17));
        }),
        ([1, 1, 1, 70, 150, 8], |g| {
            (g.window, g.offset) = (Some(20), 30);
        }),
        // Queries far behind the last key see nothing through a window.
        ([1, 1, 1, 9, 20, 8], |g| {
            (g.causal, g.window, g.offset) = (true, Some(5), 15);
        }),
        ([1, 2, 2, 150, 150, 12], |g| {
            g.causal = true;
            g.documents = Some(documents(150));
        }),
        ([1, 1, 1, 130, 130, 5], |g| {
            g.documents = Some(documents(130))
        }),
        ([1, 1, 1, 3, 66, 256], |g| (g.causal, g.offset) = (true, 63)),
        ([1, 1, 1, 129, 193, 31], |g| {
            (g.causal, g.offset) = (true, 64)
        }),
        // Keys in chunks: one query, a few, and chunks of which nothing is seen.
        ([1, 4, 2, 1, 2100, 24], PLAIN),
        ([2, 2, 1, 3, 1100, 33], |g| {
            (g.causal, g.offset) = (true, 1090)
        }),
        ([1, 2, 2, 5, 3200, 8], |g| {
            (g.causal, g.offset, g.window) = (true, 2000, Some(300));
        }),
        // Logits so large that in most blocks of keys a maximum moves, in others none does.
        ([1, 2, 1, 70, 300, 64], |g| g.scale = 2.0),
        ([1, 1, 1, 40, 500, 8], |g| g.scale = 1.0),
        // Two tiles of queries in a task, whole and ragged.
        ([1, 1, 1, 128, 128, 64], CAUSAL),
        ([1, 2, 1, 75, 90, 48], CAUSAL),
    ]
}

/// Three documents of which the middle one begins inside a block, and one query whose document has no key.
fn documents(n: usize) -> (&'static [u32], &'static [u32]) {
    let ids: Vec<u32> = (0..n as u32)
        .map(|i| 7 + (i > 40) as u32 + 3 * (i > 127) as u32)
        .collect();
    let mut queries = ids.clone();
    queries[50] = 1_000_000_007;
    (queries.leak(), ids.leak())
}

/// Rows of [b, h, t, d] laid out as [b, t, h, d], as a model has them.
fn strides(heads: usize, tokens: usize, d: usize) -> [usize; 3] {
    [tokens * heads * d, d, heads * d]
}

struct Textbook {
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    /// The same sums over absolute values: what an error is relative to.
    size: [Vec<f64>; 4],
}

fn textbook(g: &Geometry, q: &[f64], k: &[f64], v: &[f64], dout: &[f64]) -> Textbook {
    let d = g.head_dim;
    let (qs, ks) = (
        strides(g.heads, g.queries, d),
        strides(g.kv_heads, g.keys, d),
    );
    let zero = |x: &[f64]| vec![0.0; x.len()];
    let mut out = Textbook {
        o: zero(q),
        lse: vec![f64::NEG_INFINITY; g.batch * g.heads * g.queries],
        dq: zero(q),
        dk: zero(k),
        dv: zero(v),
        size: [zero(q), zero(q), zero(k), zero(v)],
    };
    for (b, h, t) in (0..g.batch)
        .flat_map(|b| (0..g.heads).flat_map(move |h| (0..g.queries).map(move |t| (b, h, t))))
    {
        let q_at = b * qs[0] + h * qs[1] + t * qs[2];
        let k_at = |s: usize| b * ks[0] + h / (g.heads / g.kv_heads) * ks[1] + s * ks[2];
        let sees = |s: usize| {
            let position = g.offset + t;
            let near = |w: usize| {
                if g.causal {
                    s + w > position
                } else {
                    s.abs_diff(position) < w
                }
            };
            (!g.causal || s <= position)
                && g.window.is_none_or(near)
                && g.documents
                    .is_none_or(|(q, k)| q[b * g.queries + t] == k[b * g.keys + s])
        };
        let keys: Vec<usize> = (0..g.keys).filter(|&s| sees(s)).collect();
        let dot = |x: &[f64], i: usize, y: &[f64], j: usize| {
            (0..d).map(|c| x[i + c] * y[j + c]).sum::<f64>()
        };
        let logit = |s: usize| {
            let l = g.scale as f64 * dot(q, q_at, k, k_at(s));
            g.soft_cap.map_or((l, 1.0), |c| {
                let t = (l / c as f64).tanh();
                (c as f64 * t, 1.0 - t * t)
            })
        };
        let logits: Vec<(f64, f64)> = keys.iter().map(|&s| logit(s)).collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, l| m.max(l.0));
        let sum: f64 = logits.iter().map(|l| (l.0 - max).exp()).sum();
        if keys.is_empty() {
            continue;
        }
        out.lse[(b * g.heads + h) * g.queries + t] = max + sum.ln();
        let p: Vec<f64> = logits.iter().map(|l| (l.0 - max).exp() / sum).collect();
        let dp: Vec<f64> = keys.iter().map(|&s| dot(dout, q_at, v, k_at(s))).collect();
        let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        let width: f64 = (0..d).map(|c| dout[q_at + c].abs()).sum::<f64>();
        for (i, &s) in keys.iter().enumerate() {
            let ds = p[i] * (dp[i] - mean) * logits[i].1 * g.scale as f64;
            // |dP| and |D| are at most the sum of |dout|, as |v| <= 1.
            let ds_size = p[i] * 2.0 * width * g.scale as f64;
            let at = k_at(s);
            for c in 0..d {
                out.o[q_at + c] += p[i] * v[at + c];
                out.size[0][q_at + c] += p[i] * v[at + c].abs();
                out.dq[q_at + c] += ds * k[at + c];
                out.size[1][q_at + c] += ds_size * k[at + c].abs();
                out.dk[at + c] += ds * q[q_at + c];
                out.size[2][at + c] += ds_size * q[q_at + c].abs();
                out.dv[at + c] += p[i] * dout[q_at + c];
                out.size[3][at + c] += p[i] * dout[q_at + c].abs();
            }
        }
    }
    out
}

/// Every query sees every key, and logits are scaled as usual.
fn plain([batch, heads, kv_heads, queries, keys, head_dim]: [usize; 6]) -> Geometry<'static> {
    Geometry {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        soft_cap: None,
        causal: false,
        window: None,
        offset: 0,
        documents: None,
    }
}

/// On vectors, every instruction set and one thread and two; on the unit that multiplies tiles, several numbers of threads.
fn one_case(
    dtype: DType,
    shape: [usize; 6],
    change: fn(&mut Geometry<'static>),
    products: Products,
) {
    let [batch, heads, kv_heads, queries, keys, head_dim] = shape;
    let mut g = plain(shape);
    change(&mut g);
    let (nq, nk) = (
        batch * heads * queries * head_dim,
        batch * kv_heads * keys * head_dim,
    );
    let (qs, ks) = (
        strides(heads, queries, head_dim),
        strides(kv_heads, keys, head_dim),
    );
    let data = ["q", "k", "v", "dout"].map(|name| {
        let n = if name == "q" || name == "dout" {
            nq
        } else {
            nk
        };
        Data::random(dtype, name, n, if name == "v" { 1.0 } else { 2.0 })
    });
    let [q, k, v, dout] = &data;
    fn view(data: Slice<'_>, strides: [usize; 3]) -> Heads<'_> {
        Heads { data, strides }
    }
    let forward = |o: &mut Data, lse: &mut [f32]| {
        let o = HeadsMut {
            data: o.get_mut(),
            strides: qs,
        };
        attention_forward(
            &g,
            view(q.get(), qs),
            view(k.get(), ks),
            view(v.get(), ks),
            o,
            lse,
        );
    };
    type Out = (Data, Vec<f32>, [Data; 3]);
    #[allow(clippy::type_complexity)]
    let runs: fn(&(dyn Fn() -> Out + Sync), &dyn Fn(&Out) -> Vec<u32>) -> Out = match products {
        Products::InF32 => |f, key| {
            let sets = Isa::available().into_iter().filter(|isa| !in_pairs(isa));
            everywhere_on(sets, f, key)
        },
        Products::InPairs => |f, key| {
            let sets = Isa::available().into_iter().filter(in_pairs);
            everywhere_on(sets, f, key)
        },
        Products::OnUnit => |f, key| on_threads(f, key),
    };
    let out = runs(
        &|| {
            let (mut o, mut lse) = (
                Data::unwritten(dtype, nq),
                vec![f32::NAN; batch * heads * queries],
            );
            forward(&mut o, &mut lse);
            let [mut dq, mut dk, mut dv] = [nq, nk, nk].map(|n| Data::unwritten(dtype, n));
            // The gradient's textbook knows no rounded o: give the backward an unrounded one.
            let (mut exact, mut lse_again) = (Data::unwritten(DType::F32, nq), lse.clone());
            forward(&mut exact, &mut lse_again);
            attention_backward(
                &g,
                view(q.get(), qs),
                view(k.get(), ks),
                view(v.get(), ks),
                view(exact.get(), qs),
                view(dout.get(), qs),
                &lse,
                HeadsMut {
                    data: dq.get_mut(),
                    strides: qs,
                },
                HeadsMut {
                    data: dk.get_mut(),
                    strides: ks,
                },
                HeadsMut {
                    data: dv.get_mut(),
                    strides: ks,
                },
            );
            (o, lse, [dq, dk, dv])
        },
        &|(o, lse, grads)| {
            let f32s = |x: &Data| x.f64().iter().map(|&x| x as f32).collect::<Vec<_>>();
            let grads = grads.iter().flat_map(f32s).collect::<Vec<_>>();
            [bits(&f32s(o)), bits(lse), bits(&grads)].concat()
        },
    );
    let (o, lse, [dq, dk, dv]) = out;
    let want = textbook(&g, &q.f64(), &k.f64(), &v.f64(), &dout.f64());
    // A logit is a chain of d products of values up to 2 x 2, scaled: its error makes a relative error of P.
    let logit = 4.0 * head_dim as f64 * g.scale as f64 * (head_dim as f64 + 8.0) * U;
    // The unit takes P and dS rounded to bf16, and its powers of two are within 2^-18.
    let coarse = match products {
        Products::InF32 => 0.0,
        _ => 1.02 / 256.0 + 2f64.powi(-16),
    };
    let over_keys = 2.0 * logit + coarse + (64.0 + keys as f64 / 32.0 + 40.0) * U + keys as f64 * U;
    let over_rows = over_keys + (queries * heads / kv_heads) as f64 * U + head_dim as f64 * U;
    for (got, want) in lse.iter().zip(&want.lse) {
        let same = *got == f32::NEG_INFINITY && *want == f64::NEG_INFINITY;
        let error = (*got as f64 - want).abs();
        assert!(
            same || error <= over_keys + 4.0 * U * (1.0 + want.abs()),
            "{got} {want} {shape:?}"
        );
    }
    check(&o, |i| want.o[i], |i| over_keys * want.size[0][i]);
    check(&dq, |i| want.dq[i], |i| 2.0 * over_rows * want.size[1][i]);
    check(&dk, |i| want.dk[i], |i| 2.0 * over_rows * want.size[2][i]);
    check(&dv, |i| want.dv[i], |i| 2.0 * over_rows * want.size[3][i]);
}

#[test]
fn attention_and_its_gradients_match_the_textbook() {
    for (shape, change) in cases() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            one_case(dtype, shape, change, Products::InF32);
        }
    }
}

/// How attention multiplies.
#[derive(Clone, Copy)]
enum Products {
    /// In f32, on every instruction set.
    InF32,
    /// Pairs of bf16.
    InPairs,
    /// On the unit of this machine.
    OnUnit,
}

/// Whether an instruction set multiplies pairs of bf16.
fn in_pairs(isa: &Isa) -> bool {
    isa.pair_unit().is_some()
}

/// Runs f on 1, 2, 3 and 8 threads, with whatever unit this machine has; panics if bits differ.
fn on_threads<R: Send>(f: impl Fn() -> R + Sync, key: impl Fn(&R) -> Vec<u32>) -> R {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(&f)
    };
    let first = on(1);
    for threads in [2, 3, 8] {
        assert!(
            key(&first) == key(&on(threads)),
            "{threads} threads give other bits"
        );
    }
    first
}

#[test]
fn attention_on_the_unit_matches_the_textbook() {
    #[cfg(target_arch = "x86_64")]
    let here = crate::simd::tile_unit().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    let here = false;
    if !here {
        eprintln!("ignored: this machine has no unit that multiplies tiles, or it is off");
        return;
    }
    for (shape, change) in cases() {
        one_case(DType::Bf16, shape, change, Products::OnUnit);
    }
}

#[test]
fn attention_in_pairs_matches_the_textbook() {
    if !Isa::available().iter().any(in_pairs) {
        eprintln!("ignored: this machine does not multiply pairs of bf16");
        return;
    }
    for (shape, change) in cases() {
        one_case(DType::Bf16, shape, change, Products::InPairs);
    }
}

#[test]
#[should_panic(expected = "overlap")]
fn output_rows_that_overlap_panic() {
    let x = [0.0; 8];
    let g = plain([1, 1, 1, 4, 4, 2]);
    let view = Heads {
        data: Slice::F32(&x),
        strides: [8, 8, 2],
    };
    let (mut o, mut lse) = ([0.0; 8], [0.0; 4]);
    let o = HeadsMut {
        data: SliceMut::F32(&mut o),
        strides: [8, 8, 1],
    };
    attention_forward(&g, view, view, view, o, &mut lse);
}
