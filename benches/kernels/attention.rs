//! Causal attention. Checked on a small shape of each head size: the textbook takes minutes for a large one.

use crate::random;
use criterion::{BenchmarkId, Criterion, Throughput};
use ndarray::Array4;
use std::hint::black_box;
use supernode::DType;
use supernode::kernels::{Mask, attention};
use supernode::reference::{self, assert_within, gamma, widen};

/// Batch, heads, tokens, head size.
const SHAPES: [[usize; 4]; 4] = [
    [12, 4, 64, 32],
    [1, 12, 1024, 64],
    [4, 12, 512, 64],
    [1, 8, 2048, 128],
];

fn arrays([b, h, t, d]: [usize; 4]) -> [Array4<f32>; 3] {
    ["q", "k", "v"].map(|name| {
        Array4::from_shape_vec((b, h, t, d), random(name, b * h * t * d)).expect("as many elements")
    })
}

fn check(d: usize) {
    let [b, h, t] = [1, 2, 65];
    let [q, k, v] = arrays([b, h, t, d]);
    let got = attention(&q, &k, &v, Mask::Causal);
    let textbook = reference::Attention {
        causal: true,
        ..reference::Attention::full(b, h, t, t, d)
    };
    let wide = |x: &Array4<f32>| widen(x.as_slice().expect("by rows"));
    let (want, _) = reference::attention(&textbook, &wide(&q), &wide(&k), &wide(&v));
    // Logits of normal numbers are below 16, weights sum to 1, values are below 5.
    let u = DType::F32.roundoff();
    let bound = vec![5.0 * (2.1 * 16.0 * gamma(d + 24, u) + gamma(t + 24, u)); want.len()];
    assert_within("attention", &wide(&got), &want, &bound);
}

pub(crate) fn bench(c: &mut Criterion, threads: usize) {
    let mut group = c.benchmark_group(format!("attention f32 causal, {threads} thread(s)"));
    for shape in SHAPES {
        let [b, h, t, d] = shape;
        check(d);
        let [q, k, v] = arrays(shape);
        group.throughput(Throughput::Elements((2 * b * h * t * t * d) as u64));
        let name = format!("b{b} h{h} t{t} d{d}");
        group.bench_function(BenchmarkId::from_parameter(name), |bench| {
            bench.iter(|| attention(black_box(&q), black_box(&k), black_box(&v), Mask::Causal));
        });
    }
    group.finish();
}
