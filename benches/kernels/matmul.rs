//! Products of f32 beside the `gemm` crate and ndarray's `dot` (which is the matrixmultiply crate, on one thread), and of
//! bf16, for which neither has a kernel.

// The `gemm` crate is called through pointers.
#![allow(unsafe_code)]

use crate::random;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use ndarray::Array2;
use std::hint::black_box;
use supernode::dtype::Float;
use supernode::kernels::matmul;
use supernode::random::Stream;
use supernode::reference::assert_product;
use supernode::{DType, bf16};

/// m, k, n.
const SHAPES: [[usize; 3]; 9] = [
    [64, 64, 64],
    [256, 256, 256],
    [512, 512, 512],
    [1024, 1024, 1024],
    [512, 768, 3072],
    [512, 3072, 768],
    [768, 128, 512],
    [16, 1024, 1024],
    [1, 4096, 4096],
];

pub(crate) fn bench(c: &mut Criterion, threads: usize) {
    let mut group = c.benchmark_group(format!("matmul f32, {threads} thread(s)"));
    for shape in SHAPES {
        let (a, b) = operands::<f32>(shape);
        ours(&mut group, shape, &a, &b);
        check(shape, &a, &b, &gemm(&a, &b, threads));
        group.bench_function(id("gemm", shape), |bench| {
            bench.iter(|| gemm(black_box(&a), black_box(&b), threads));
        });
        if threads == 1 {
            check(shape, &a, &b, &a.dot(&b));
            group.bench_function(id("ndarray", shape), |bench| {
                bench.iter(|| black_box(&a).dot(black_box(&b)));
            });
        }
    }
    group.finish();
    let mut group = c.benchmark_group(format!("matmul bf16, {threads} thread(s)"));
    for shape in SHAPES {
        let (a, b) = operands::<bf16>(shape);
        ours(&mut group, shape, &a, &b);
    }
    group.finish();
}

fn operands<T: Float>([m, k, n]: [usize; 3]) -> (Array2<T>, Array2<T>) {
    let array = |name, rows, cols| {
        let x = random(name, rows * cols).into_iter().map(T::from_f32);
        Array2::from_shape_vec((rows, cols), x.collect()).expect("as many elements")
    };
    (array("a", m, k), array("b", k, n))
}

fn id(who: &str, [m, k, n]: [usize; 3]) -> BenchmarkId {
    BenchmarkId::new(who, format!("{m}x{k}x{n}"))
}

/// Every row of c by Freivalds' check.
fn check<T: Float>([m, k, n]: [usize; 3], a: &Array2<T>, b: &Array2<T>, c: &Array2<T>) {
    let wide = |x: &Array2<T>| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
    let c = c.as_slice().expect("by rows");
    let u = DType::F32.roundoff();
    assert_product(
        [m, n, k],
        &wide(a),
        &wide(b),
        c,
        u,
        &Stream::new(0, "check"),
    );
}

fn ours<T: Float>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    shape: [usize; 3],
    a: &Array2<T>,
    b: &Array2<T>,
) {
    group.throughput(Throughput::Elements(
        2 * shape.iter().product::<usize>() as u64,
    ));
    check(shape, a, b, &matmul(a, b));
    group.bench_function(id("supernode", shape), |bench| {
        bench.iter(|| matmul(black_box(a), black_box(b)));
    });
}

/// The product by the `gemm` crate.
fn gemm(a: &Array2<f32>, b: &Array2<f32>, threads: usize) -> Array2<f32> {
    let ((m, k), n) = (a.dim(), b.ncols());
    let mut c = Array2::zeros((m, n));
    let threads = match threads {
        1 => gemm_common::Parallelism::None,
        more => gemm_common::Parallelism::Rayon(more),
    };
    let multiply = gemm_f32::gemm::f32::get_gemm_fn();
    let (a, b) = (
        a.as_slice().expect("by rows"),
        b.as_slice().expect("by rows"),
    );
    // SAFETY: m x n elements of c, m x k of a and k x n of b lie by rows where the strides (columns, rows) say.
    unsafe {
        let to = c.as_mut_ptr();
        let (n_, k_) = (n as isize, k as isize);
        let (a, b) = (a.as_ptr(), b.as_ptr());
        multiply(
            m, n, k, to, 1, n_, false, a, 1, k_, b, 1, n_, 0.0, 1.0, false, false, false, threads,
        );
    }
    c
}
