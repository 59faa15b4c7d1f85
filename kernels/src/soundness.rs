//! Small calls of everything that has `unsafe` in it, for Miri (`.ci/deep miri`), which finds undefined behaviour that gives right
//! results. Shapes are around the edges of vectors and tiles; Miri runs portable code.

use crate::{Mask, attention_backward, attention_with_lse, bf16, layer_norm, matmul, softmax};
use ndarray::{Array1, Array2, Array4};

fn numbers(n: usize) -> impl Fn(usize) -> f32 {
    move |i| ((i * 7 + n) % 11) as f32 / 4.0 - 1.0
}

/// Runs f on this thread as the pool's only one: what other threads of a pool do is the pool's affair, and not sound under Stacked
/// Borrows there (crossbeam-epoch).
fn alone(f: fn()) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    let pool = pool.use_current_thread().build();
    pool.expect("a pool of one").install(f);
}

#[test]
fn products() {
    alone(every_product);
}

#[test]
fn attention_and_rows() {
    alone(every_row);
}

fn every_product() {
    for (m, n, k) in [(1, 5, 3), (2, 2, 3), (4, 9, 8), (5, 17, 6), (9, 33, 2)] {
        let of = |rows: usize, columns: usize| {
            Array2::from_shape_fn((rows, columns), |(i, j)| numbers(m)(i * columns + j))
        };
        let (a, b) = (of(m, k), of(k, n));
        let (at, bt) = (
            a.t().as_standard_layout().to_owned(),
            b.t().as_standard_layout().to_owned(),
        );
        let want = Array2::from_shape_fn((m, n), |(i, j)| {
            (0..k).fold(0f32, |sum, p| a[[i, p]].mul_add(b[[p, j]], sum))
        });
        assert_eq!(matmul(&a, &b), want);
        assert_eq!(matmul(&at.t(), &bt.t()), want);
        let narrow = |x: &Array2<f32>| x.mapv(bf16::from_f32);
        assert_eq!(matmul(&narrow(&a), &narrow(&bt).t()).dim(), (m, n));
    }
}

fn every_row() {
    let x = Array4::from_shape_fn([1, 2, 3, 5], |(_, h, t, d)| numbers(h)(t * 5 + d));
    for mask in [Mask::Full, Mask::Causal, Mask::Window(2)] {
        let (o, lse) = attention_with_lse(&x, &x, &x, mask);
        let [dq, ..] = attention_backward([&x, &x, &x], mask, (&o, &lse), &o);
        assert!(dq.iter().all(|x| x.is_finite()));
    }
    let x = Array2::from_shape_fn((2, 37), |(i, j)| numbers(i)(j));
    let w = Array1::from_elem(37, 1.0);
    assert!(layer_norm(&x, &w, &w, 1e-5).iter().all(|x| x.is_finite()));
    assert!(softmax(&x).iter().all(|x| *x > 0.0));
}
