//! Kernels on one chip: matmul and attention at the shapes of small transformers.
//!
//! `cargo bench` prints time and throughput in elements (flop) a second. Results depend on the machine and on what else
//! runs; compare two versions in one sitting.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::{Array, Dimension, ShapeBuilder};
use std::hint::black_box;
use supernode::kernels::{Mask, attention, matmul};
use supernode::random::Stream;

/// Normal numbers: zeros would flatter some processors.
fn random<D: Dimension>(name: &str, shape: impl ShapeBuilder<Dim = D>) -> Array<f32, D> {
    let stream = Stream::new(0, name);
    let mut i = 0;
    Array::from_shape_simple_fn(shape, || {
        i += 1;
        stream.normal(i)
    })
}

fn bench_matmul(c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul_f32");
    for (m, k, n) in [
        (64, 64, 64),
        (256, 256, 256),
        (1024, 1024, 1024),
        (512, 768, 3072),
        (1, 4096, 4096),
    ] {
        let (a, b) = (random("a", (m, k)), random("b", (k, n)));
        group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
        group.bench_function(
            BenchmarkId::from_parameter(format!("{m}x{k}x{n}")),
            |bench| {
                bench.iter(|| matmul(black_box(&a), black_box(&b)));
            },
        );
    }
    group.finish();
}

fn bench_attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention_f32_causal");
    for (b, h, t, d) in [(12, 4, 64, 32), (1, 12, 1024, 64)] {
        let [q, k, v] = ["q", "k", "v"].map(|name| random(name, (b, h, t, d)));
        group.throughput(Throughput::Elements((2 * b * h * t * t * d) as u64));
        group.bench_function(
            BenchmarkId::from_parameter(format!("b{b} h{h} t{t} d{d}")),
            |bench| {
                bench.iter(|| attention(black_box(&q), black_box(&k), black_box(&v), Mask::Causal));
            },
        );
    }
    group.finish();
}

criterion_group!(kernels, bench_matmul, bench_attention);
criterion_main!(kernels);
