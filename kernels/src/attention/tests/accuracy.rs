//! How far outputs in bf16 are from f64, beside the usual way to compute them.

use super::*;
use crate::random::Stream;
use half::bf16;

/// [keys, head_dim], and the standard deviation of queries and keys: weights alike, and few that outweigh the others.
const CASES: [([usize; 2], f32); 5] = [
    ([512, 64], 1.0),
    ([512, 64], 1.7),
    ([1024, 128], 1.0),
    ([1024, 128], 1.7),
    ([300, 32], 2.5),
];
const HEADS: usize = 2;
const QUERIES: usize = 70;

fn rms(errors: impl Iterator<Item = f64>) -> f64 {
    let (n, sum) = errors.fold((0, 0.0), |(n, sum), e| (n + 1, sum + e * e));
    (sum / n as f64).sqrt()
}

/// What everybody does whose products take bf16: exponentials of the distance to the greatest logit, exact ones, are rounded for
/// the product with the values, and divided by the sum of those that were not.
fn usual(g: &Geometry, [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
    let d = g.head_dim;
    let (qs, ks) = (strides(HEADS, QUERIES, d), strides(HEADS, g.keys, d));
    let mut o = vec![0.0; q.len()];
    for (h, t) in (0..HEADS).flat_map(|h| (0..QUERIES).map(move |t| (h, t))) {
        let at = h * qs[1] + t * qs[2];
        let key = |s: usize| h * ks[1] + s * ks[2];
        let dot = |s: usize| (0..d).map(|c| q[at + c] * k[key(s) + c]).sum::<f64>();
        let logits: Vec<f64> = (0..g.keys).map(|s| g.scale as f64 * dot(s)).collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, &l| m.max(l));
        let powers: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
        let sum: f64 = powers.iter().sum();
        for c in 0..d {
            let products = powers.iter().enumerate();
            let all: f64 = products
                .map(|(s, &p)| bf16::from_f64(p).to_f64() * v[key(s) + c])
                .sum();
            o[at + c] = bf16::from_f64(all / sum).to_f64();
        }
    }
    o
}

#[test]
fn outputs_in_bf16_are_no_farther_from_f64_than_the_usual_ones() {
    for ([keys, head_dim], deviation) in CASES {
        let g = plain([1, HEADS, HEADS, QUERIES, keys, head_dim]);
        let numbers = |name, tokens: usize, deviation: f32| -> Vec<bf16> {
            let stream = Stream::new(keys as u64, name);
            let number = |i| bf16::from_f32(deviation * stream.normal(i as u64));
            (0..tokens * HEADS * head_dim).map(number).collect()
        };
        let q = numbers("q", QUERIES, deviation);
        let k = numbers("k", keys, deviation);
        let v = numbers("v", keys, 1.0);
        let f64s = |x: &[bf16]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        let (wide_q, wide_k, wide_v) = (f64s(&q), f64s(&k), f64s(&v));
        let want = textbook(&g, &wide_q, &wide_k, &wide_v, &vec![0.0; q.len()]).o;
        let (qs, ks) = (
            strides(HEADS, QUERIES, head_dim),
            strides(HEADS, keys, head_dim),
        );
        let heads = |x, strides| Heads {
            data: Slice::Bf16(x),
            strides,
        };
        let (mut o, mut lse) = (vec![bf16::NAN; q.len()], vec![0.0; HEADS * QUERIES]);
        let to = HeadsMut {
            data: SliceMut::Bf16(&mut o),
            strides: qs,
        };
        attention_forward(
            &g,
            heads(&q, qs),
            heads(&k, ks),
            heads(&v, ks),
            to,
            &mut lse,
        );
        let off = |o: &[f64]| rms(o.iter().zip(&want).map(|(o, want)| o - want));
        let (ours, theirs) = (off(&f64s(&o)), off(&usual(&g, [&wide_q, &wide_k, &wide_v])));
        assert!(
            ours <= theirs,
            "{keys} keys, heads of {head_dim}, deviation {deviation}: {ours:e} against {theirs:e}"
        );
    }
}
