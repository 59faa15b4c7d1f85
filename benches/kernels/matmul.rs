//! Products of f32 beside those of other libraries: the `gemm` crate on as many threads; matrixmultiply, and ndarray's
//! `dot`, which calls it, on one.

#![allow(unsafe_code)]

use crate::random;
use criterion::{BenchmarkId, Criterion, Throughput};
use gemm::Parallelism;
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

/// c = a b, all by rows.
type Product = fn([usize; 3], &[f32], &[f32], &mut [f32]);

fn by_gemm(sizes: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32], parallelism: Parallelism) {
    let [m, k, n] = sizes;
    assert_eq!([a.len(), b.len(), c.len()], [m * k, k * n, m * n]);
    let (ks, ns) = (k as isize, n as isize);
    // SAFETY: the three matrices lie whole in their slices, by rows, as asserted.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ns,
            false,
            a.as_ptr(),
            1,
            ks,
            b.as_ptr(),
            1,
            ns,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn gemm_alone(sizes: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    by_gemm(sizes, a, b, c, Parallelism::None);
}

fn gemm_on_all(sizes: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    by_gemm(sizes, a, b, c, Parallelism::Rayon(0));
}

fn by_matrixmultiply([m, k, n]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    assert_eq!([a.len(), b.len(), c.len()], [m * k, k * n, m * n]);
    let (ks, ns) = (k as isize, n as isize);
    // SAFETY: the three matrices lie whole in their slices, by rows, as asserted.
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            1.0,
            a.as_ptr(),
            ks,
            1,
            b.as_ptr(),
            ns,
            1,
            0.0,
            c.as_mut_ptr(),
            ns,
            1,
        );
    }
}

pub(crate) fn bench(c: &mut Criterion, threads: usize) {
    let others: &[(&str, Product)] = if threads == 1 {
        &[("gemm", gemm_alone), ("matrixmultiply", by_matrixmultiply)]
    } else {
        &[("gemm", gemm_on_all)]
    };
    let mut group = c.benchmark_group(format!("matmul f32, {threads} thread(s)"));
    for sizes in SHAPES {
        let [m, k, n] = sizes;
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
        for (who, product) in others {
            let mut out = vec![f32::NAN; m * n];
            product(sizes, &a, &b, &mut out);
            check(&out);
            group.bench_function(id(who), |bench| {
                bench.iter(|| product(sizes, black_box(&a), black_box(&b), black_box(&mut out)));
            });
        }
    }
    group.finish();
}
