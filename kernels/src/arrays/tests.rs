//! The functions on ndarray against the textbook, over views of every layout.

use super::*;
use crate::reference::{self, assert_within, gamma, normals, product_bound, rounding};
use half::{bf16, f16};
use ndarray::{Array1, ArrayD, Axis, IxDyn, s};

fn array<T: Float, D: Dimension>(name: &str, shape: D) -> Array<T, D> {
    let values = normals(name, shape.size());
    let values = values.iter().map(|&x| T::from_f32(x as f32)).collect();
    Array::from_shape_vec(shape, values).expect("as many elements as the shape says")
}

fn wide<T: Float, D: Dimension>(x: &ArrayBase<impl Data<Elem = T>, D>) -> Vec<f64> {
    x.iter().map(|x| x.to_f32().into()).collect()
}

fn near<T: Float, D: Dimension>(what: &str, got: &Array<T, D>, want: &[f64], bound: &[f64]) {
    let stored: Vec<f64> = want
        .iter()
        .zip(bound)
        .map(|(w, b)| b + rounding(T::DTYPE, w.abs() + b))
        .collect();
    assert_within(what, &wide(got), want, &stored);
}

const U: f64 = 1.0 / (1u64 << 24) as f64;

fn check_product<T: Float>(
    a: &ArrayBase<impl Data<Elem = T>, Ix2>,
    b: &ArrayBase<impl Data<Elem = T>, Ix2>,
) {
    let sizes = [a.nrows(), b.ncols(), a.ncols()];
    let (wa, wb) = (wide(a), wide(b));
    let bound = product_bound(sizes, &wa, &wb, U);
    near(
        "matmul",
        &matmul(a, b),
        &reference::matmul(sizes, &wa, &wb),
        &bound,
    );
}

fn products<T: Float>() {
    for (m, n, k) in [
        (0, 2, 3),
        (3, 0, 2),
        (2, 3, 0),
        (1, 1, 1),
        (7, 5, 3),
        (33, 35, 34),
    ] {
        let a: Array2<T> = array("a", Ix2(m, k));
        let b: Array2<T> = array("b", Ix2(k, n));
        check_product(&a, &b);
        let (at, bt) = (
            a.t().as_standard_layout().to_owned(),
            b.t().as_standard_layout().to_owned(),
        );
        check_product(&at.t(), &bt.t());
    }
    let big: Array2<T> = array("big", Ix2(20, 30));
    // Views with gaps, backwards, and with every other element.
    check_product(&big.slice(s![2..9, 3..13]), &big.slice(s![4..14, ..7]));
    check_product(&big.slice(s![..;-1, ..10]), &big.slice(s![..10, ..;-1]));
    check_product(&big.slice(s![..;2, ..;3]), &big.slice(s![5..15, 1..;4]));
    let row = big.slice(s![..1, ..]);
    check_product(&row.broadcast((4, 30)).expect("one row repeats"), &big.t());
}

#[test]
fn matmul_of_views_of_every_layout() {
    products::<f32>();
    products::<bf16>();
    products::<f16>();
}

#[test]
fn transposed_views_are_not_copied() {
    let a: Array2<f32> = array("a", Ix2(4, 6));
    assert!(in_memory(&a.t(), |_| true).is_view());
    assert!(!in_memory(&a.slice(s![.., ..3]), |_| true).is_view());
    let q: Array4<f32> = array("q", Ix4(2, 5, 3, 8));
    let heads = q.view().permuted_axes([0, 2, 1, 3]);
    assert!(in_memory(&heads, |s| s[3] == 1).is_view());
}

#[test]
fn batches_of_products() {
    let a: Array3<f32> = array("a", Ix3(3, 5, 7));
    let b: Array3<f32> = array("b", Ix3(3, 4, 7));
    let b = b.permuted_axes([0, 2, 1]);
    let c = matmul_batched(&a, &b);
    for (i, c) in c.axis_iter(Axis(0)).enumerate() {
        assert_eq!(
            c,
            matmul(&a.index_axis(Axis(0), i), &b.index_axis(Axis(0), i))
        );
    }
}

#[test]
fn attention_of_heads_that_lie_by_tokens() {
    for mask in [Mask::Full, Mask::Causal, Mask::Window(3)] {
        let (b, h, g, t, d) = (2, 4, 2, 9, 8);
        let q: Array4<f32> = array("q", Ix4(b, t, h, d));
        let k: Array4<f32> = array("k", Ix4(b, t, g, d));
        let v: Array4<f32> = array("v", Ix4(b, g, d, t));
        let q = q.permuted_axes([0, 2, 1, 3]);
        let k = k.permuted_axes([0, 2, 1, 3]);
        let v = v.permuted_axes([0, 1, 3, 2]);
        let textbook = reference::Attention {
            kv_heads: g,
            causal: mask != Mask::Full,
            window: if let Mask::Window(w) = mask {
                Some(w)
            } else {
                None
            },
            ..reference::Attention::full(b, h, t, t, d)
        };
        let (want, _) = reference::attention(&textbook, &wide(&q), &wide(&k), &wide(&v));
        // Logits below 16 of sums of d; weights of sums of t; |v| below 4.
        let bound = vec![4.0 * (2.1 * 16.0 * gamma(d + 24, U) + gamma(t + 24, U)); want.len()];
        near("attention", &attention(&q, &k, &v, mask), &want, &bound);
    }
}

/// The whole gradient against f64, with a mask, grouped heads and the forward's own o and lse.
#[test]
fn gradients_of_attention() {
    for mask in [Mask::Full, Mask::Causal, Mask::Window(3)] {
        let (b, h, g, t, d) = (2, 4, 2, 9, 8);
        let [q, dout]: [Array4<f32>; 2] = ["q", "dout"].map(|name| array(name, Ix4(b, h, t, d)));
        let [k, v]: [Array4<f32>; 2] = ["k", "v"].map(|name| array(name, Ix4(b, g, t, d)));
        let textbook = reference::Attention {
            kv_heads: g,
            causal: mask != Mask::Full,
            window: if let Mask::Window(w) = mask {
                Some(w)
            } else {
                None
            },
            ..reference::Attention::full(b, h, t, t, d)
        };
        let (o, lse) = attention_with_lse(&q, &k, &v, mask);
        let (q64, k64, v64) = (wide(&q), wide(&k), wide(&v));
        let (want_o, want) = reference::attention(&textbook, &q64, &k64, &v64);
        let bound = vec![2.1 * 16.0 * gamma(d + 24, U); want.len()];
        near("lse", &lse, &want, &bound);
        let got = attention_backward([&q, &k, &v], mask, (&o, &lse), &dout);
        let want = reference::attention_backward(
            &textbook,
            [&q64, &k64, &v64],
            &want_o,
            &want,
            &wide(&dout),
        );
        // Weights of at most 1, |dout v| and D below 2 d 16, one side's elements below 4, over 2 t terms.
        let size = 2.0 * 32.0 * (d * t) as f64 * 4.0;
        for ((name, got), want) in ["dq", "dk", "dv"].iter().zip(&got).zip(want) {
            near(
                name,
                got,
                &want,
                &vec![size * gamma(d + t + 48, U); want.len()],
            );
        }
    }
}

#[test]
#[should_panic(expected = "lse [1, 2, 4]; wanted")]
fn gradients_of_another_lse_are_refused() {
    let x: Array4<f32> = array("x", Ix4(1, 2, 3, 8));
    let lse = Array3::zeros((1, 2, 4));
    attention_backward([&x, &x, &x], Mask::Full, (&x, &lse), &x);
}

#[test]
fn queries_that_continue_a_sequence_give_its_last_rows() {
    // 1301 keys are more than a chunk: the last queries alone take another path than all of them together.
    let (h, s, d, last) = (2, 1301, 8, 3);
    let [q, k, v]: [Array4<f32>; 3] = ["q", "k", "v"].map(|name| array(name, Ix4(1, h, s, d)));
    for mask in [Mask::Causal, Mask::Window(700)] {
        let all = attention(&q, &k, &v, mask);
        let tail = q.slice(s![.., .., s - last.., ..]);
        let few = attention_at(&tail, &k, &v, mask, s - last);
        let want = wide(&all.slice(s![.., .., s - last.., ..]).to_owned());
        let bound =
            vec![2.0 * 4.0 * (2.1 * 16.0 * gamma(d + 24, U) + gamma(s + 24, U)); want.len()];
        near("attention_at", &few, &want, &bound);
    }
}

#[test]
fn rows_of_any_number_of_axes() {
    let x: ArrayD<f32> = array("x", IxDyn(&[2, 3, 11]));
    let (w, b) = (array("w", Ix1(11)), array("b", Ix1(11)));
    let (x64, w64, b64) = (wide(&x), wide(&w), wide(&b));
    // Normal numbers: rows of 11 are of size 4 at most, and their deviation is above 1/4.
    let bound = |k: f64| vec![k * 64.0 * gamma(32, U); 66];
    let (want, ..) = reference::layer_norm([6, 11], &x64, Some(&w64), Some(&b64), 1e-5f32.into());
    near(
        "layer_norm",
        &layer_norm(&x, &w, &b, 1e-5),
        &want,
        &bound(1.0),
    );
    let (want, _) = reference::rms_norm([6, 11], &x64, Some(&w64), 1e-5f32.into());
    near("rms_norm", &rms_norm(&x, &w, 1e-5), &want, &bound(1.0));
    near(
        "softmax",
        &softmax(&x),
        &reference::softmax([6, 11], &x64),
        &bound(1.0),
    );
    for (f, y) in [
        (reference::Activation::GeluErf, gelu(&x)),
        (reference::Activation::GeluTanh, gelu_tanh(&x)),
        (reference::Activation::Silu, silu(&x)),
    ] {
        near(
            "activation",
            &y,
            &reference::activation(f, &x64),
            &bound(1.0),
        );
    }
    let turned = x.view().reversed_axes();
    assert_eq!(gelu(&turned), gelu(&x).reversed_axes());
}

#[test]
#[should_panic(expected = "a is [2, 3] and b is [2, 3]")]
fn products_that_do_not_fit_are_refused() {
    let a: Array2<f32> = array("a", Ix2(2, 3));
    matmul(&a, &a);
}

#[test]
#[should_panic(expected = "x is [2, 3] and weight is [2]")]
fn vectors_that_do_not_fit_are_refused() {
    let x: Array2<f32> = array("x", Ix2(2, 3));
    rms_norm(&x, &array("w", Ix1(2)), 1e-5);
}

/// Views without elements, of any strides: the obvious result, of the obvious shape.
#[test]
fn arrays_without_elements() {
    fn one<T: Float>() {
        let a: Array2<T> = array("a", Ix2(4, 6));
        let none: Array1<T> = array("none", Ix1(0));
        let vector: Array1<T> = array("w", Ix1(6));
        let zero = T::from_f32(0.0);
        for turned in [false, true] {
            let view = |x: &Array2<T>| {
                if turned {
                    x.t().as_standard_layout().reversed_axes().to_owned()
                } else {
                    x.clone()
                }
            };
            let a = view(&a);
            let (narrow, few) = (a.slice(s![.., ..0]), a.slice(s![..0, ..]));
            for (y, shape) in [
                (softmax(&narrow), (4, 0)),
                (gelu(&narrow), (4, 0)),
                (gelu_tanh(&few), (0, 6)),
                (silu(&narrow), (4, 0)),
                (rms_norm(&narrow, &none, 1e-5), (4, 0)),
                (layer_norm(&few, &vector, &vector, 1e-5), (0, 6)),
                (layer_norm(&narrow, &none, &none, 1e-5), (4, 0)),
                (softmax(&few), (0, 6)),
                (matmul(&few, &a.t()), (0, 4)),
                (matmul(&a, &few.t()), (4, 0)),
            ] {
                assert_eq!(y.dim(), shape);
            }
            // A sum of nothing is 0.
            let c = matmul(&narrow, &narrow.t());
            assert!(c.dim() == (4, 4) && c.iter().all(|x| *x == zero));
        }
        for (batch, heads, queries, keys) in
            [(0, 2, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0), (1, 0, 3, 3)]
        {
            let q: Array4<T> = array("q", Ix4(batch, heads, queries, 8));
            let k: Array4<T> = array("k", Ix4(batch, 2, keys, 8));
            for mask in [Mask::Full, Mask::Causal, Mask::Window(2)] {
                let (o, lse) = attention_with_lse(&q, &k, &k, mask);
                assert!(o.dim() == q.dim() && o.iter().all(|x| *x == zero));
                assert!(lse.iter().all(|x| *x == f32::NEG_INFINITY));
                let [dq, dk, dv] = attention_backward([&q, &k, &k], mask, (&o, &lse), &o);
                assert_eq!((dq.dim(), dk.dim(), dv.dim()), (q.dim(), k.dim(), k.dim()));
            }
        }
        let b: Array3<T> = array("b", Ix3(0, 3, 4));
        assert_eq!(
            matmul_batched(&b, &b.view().permuted_axes([0, 2, 1])).dim(),
            (0, 3, 3)
        );
    }
    one::<f32>();
    one::<bf16>();
    one::<f16>();
}
