//! Products of f32, on one thread beside ndarray's `dot`, which is that of the matrixmultiply crate.

use crate::random;
use criterion::{BenchmarkId, Criterion, Throughput};
use ndarray::Array2;
use std::hint::black_box;
use supernode::DType;
use supernode::kernels::matmul;
use supernode::random::Stream;
use supernode::reference::assert_product;

/// m, k, n.
const SHAPES: [[usize; 3]; 7] = [
    [64, 64, 64],
    [256, 256, 256],
    [1024, 1024, 1024],
    [512, 768, 3072],
    [768, 128, 512],
    [16, 1024, 1024],
    [1, 4096, 4096],
];

pub(crate) fn bench(c: &mut Criterion, threads: usize) {
    let mut group = c.benchmark_group(format!("matmul f32, {threads} thread(s)"));
    for [m, k, n] in SHAPES {
        let (a, b) = (random("a", m * k), random("b", k * n));
        let check = |c: &[f32]| {
            let u = DType::F32.roundoff();
            assert_product([m, n, k], &a, &b, c, u, &Stream::new(0, "check"));
        };
        let name = format!("{m}x{k}x{n}");
        let id = |who: &str| BenchmarkId::new(who, &name);
        group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
        let array = |x: &[f32], rows, cols| {
            Array2::from_shape_vec((rows, cols), x.to_vec()).expect("as many elements")
        };
        let (x, y) = (array(&a, m, k), array(&b, k, n));
        check(matmul(&x, &y).as_slice().expect("by rows"));
        group.bench_function(id("supernode"), |bench| {
            bench.iter(|| matmul(black_box(&x), black_box(&y)));
        });
        if threads == 1 {
            check(x.dot(&y).as_slice().expect("by rows"));
            group.bench_function(id("ndarray"), |bench| {
                bench.iter(|| black_box(&x).dot(black_box(&y)));
            });
        }
    }
    group.finish();
}
