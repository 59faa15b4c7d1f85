//! Ops on single elements, and biases.

use super::harness::{Array, Bounded, Case, FLOATS, U, exact, rounded};
use crate::dtype::DType;
use crate::ops::*;
use crate::random::Stream;
use crate::reference;

const SHAPES: [&[usize]; 5] = [&[0], &[1], &[3, 37], &[2, 3, 5], &[4, 1031]];

#[test]
pub(super) fn sums_and_products() {
    for shape in SHAPES {
        for dtype in FLOATS {
            let ab = || {
                vec![
                    Array::normal("a", shape, dtype),
                    Array::normal("b", shape, dtype),
                ]
            };
            let sum = |x: &[Array]| reference::add(&x[0].values, &x[1].values);
            Case::new(&Add, ab()).check(
                |x| vec![rounded(sum(x), 1)],
                |_, _, dy| vec![Some(exact(dy.to_vec())); 2],
            );
            Case::new(&Multiply, ab()).check(
                |x| vec![rounded(reference::multiply(&x[0].values, &x[1].values), 1)],
                |x, _, dy| {
                    reference::multiply_backward(&x[0].values, &x[1].values, dy)
                        .map(|g| Some(rounded(g, 1)))
                        .into()
                },
            );
        }
    }
}

#[test]
pub(super) fn multiples() {
    let factor = 0.3f32;
    for shape in SHAPES {
        for dtype in FLOATS {
            let x = || Array::normal("x", shape, dtype);
            let times = |x: &[f64]| rounded(reference::scale(factor.into(), x), 1);
            Case::new(&Scale { factor }, vec![x()]).check(
                |x| vec![times(&x[0].values)],
                |_, _, dy| vec![Some(times(dy))],
            );
            let s = Array::rounded(&[1], DType::F32, vec![factor.into()]);
            Case::new(&ScaleBy, vec![x(), s]).check(
                |x| vec![times(&x[0].values)],
                |_, _, dy| vec![Some(times(dy)), None],
            );
        }
    }
}

#[test]
pub(super) fn casts_go_and_come_back() {
    for from in FLOATS {
        for to in FLOATS {
            let op = Cast { dtype: to };
            let mut case = Case::new(&op, vec![Array::normal("x", &[3, 37], from)]);
            for gradient in [None, Some(DType::F32)] {
                case.gradient_type = gradient;
                case.check(
                    |x| vec![exact(x[0].values.clone())],
                    |_, _, dy| vec![Some(exact(dy.to_vec()))],
                );
            }
        }
    }
}

#[test]
pub(super) fn biases_of_one_axis_and_of_more() {
    for (x, bias) in [
        (&[3, 5, 7][..], &[7][..]),
        (&[3, 5, 7], &[5, 7]),
        (&[61, 1], &[1]),
        (&[0, 4], &[4]),
    ] {
        for dtype in FLOATS {
            for gradient in [None, Some(DType::F32)] {
                let inputs = vec![
                    Array::normal("x", x, dtype),
                    Array::normal("b", bias, dtype),
                ];
                let n = inputs[1].values.len();
                let mut case = Case::new(&AddBias, inputs);
                case.gradient_type = gradient;
                case.check(
                    |x| {
                        let bias = &x[1].values;
                        let sum = x[0].values.iter().enumerate().map(|(i, x)| x + bias[i % n]);
                        vec![rounded(sum.collect(), 1)]
                    },
                    |_, _, dy| {
                        let rows = dy.len() / n;
                        let sizes: Vec<f64> = dy.iter().map(|x| x.abs()).collect();
                        let bound = reference::column_sum([rows, n], &sizes);
                        let bound = bound
                            .iter()
                            .map(|s| reference::gamma(rows, U) * s)
                            .collect();
                        let dbias = reference::column_sum([rows, n], dy);
                        vec![Some(exact(dy.to_vec())), Some((dbias, bound))]
                    },
                );
            }
        }
    }
}

#[test]
pub(super) fn activations() {
    use reference::Activation as Textbook;
    for (activation, f) in [
        (Activation::GeluTanh, Textbook::GeluTanh),
        (Activation::GeluErf, Textbook::GeluErf),
        (Activation::Relu2, Textbook::Relu2),
        (Activation::Silu, Textbook::Silu),
    ] {
        for shape in SHAPES {
            for dtype in FLOATS {
                let op = Activate { activation };
                // A few roundings of x's size: tanh and erf near -1 leave that much.
                let near = |want: Vec<f64>, sizes: Vec<f64>| -> Bounded {
                    let bound = want
                        .iter()
                        .zip(&sizes)
                        .map(|(y, s)| 16.0 * U * (y.abs() + s))
                        .collect();
                    (want, bound)
                };
                Case::new(&op, vec![Array::normal("x", shape, dtype)]).check(
                    |x| {
                        let sizes = x[0].values.iter().map(|x| x.abs()).collect();
                        vec![near(reference::activation(f, &x[0].values), sizes)]
                    },
                    |x, _, dy| {
                        let x = &x[0].values;
                        let sizes = x
                            .iter()
                            .zip(dy)
                            .map(|(x, d)| 2.0 * d.abs() * (1.0 + x.abs()));
                        let sizes = sizes.collect();
                        vec![Some(near(reference::activation_backward(f, x, dy), sizes))]
                    },
                );
            }
        }
    }
}

#[test]
pub(super) fn swiglu() {
    for shape in SHAPES {
        for dtype in FLOATS {
            let inputs = vec![
                Array::normal("gate", shape, dtype),
                Array::normal("up", shape, dtype),
            ];
            let near = |want: Vec<f64>, sizes: Vec<f64>| -> Bounded {
                let bound = sizes.iter().map(|s| 16.0 * U * s).collect();
                (want, bound)
            };
            let product = |a: &[f64], b: &[f64]| -> Vec<f64> {
                a.iter()
                    .zip(b)
                    .map(|(a, b)| (1.0 + a.abs()) * b.abs())
                    .collect()
            };
            Case::new(&SwiGlu, inputs).check(
                |x| {
                    let want = reference::swiglu(&x[0].values, &x[1].values);
                    vec![near(want, product(&x[0].values, &x[1].values))]
                },
                |x, _, dy| {
                    let (gate, up) = (&x[0].values, &x[1].values);
                    let [dgate, dup] = reference::swiglu_backward(gate, up, dy);
                    let sizes = product(gate, up);
                    let sizes = sizes
                        .iter()
                        .zip(dy)
                        .map(|(s, d)| 2.0 * s * d.abs())
                        .collect();
                    vec![Some(near(dgate, sizes)), Some(near(dup, product(gate, dy)))]
                },
            );
        }
    }
}

#[test]
pub(super) fn dropout_belongs_to_the_whole_tensors_elements() {
    for shape in [&[6, 37][..], &[2, 4, 6], &[1]] {
        for dtype in FLOATS {
            let op = Dropout {
                p: 0.25,
                name: "after attention".into(),
                order: Default::default(),
                // As a micro-batch behind others of three rows.
                rows_before: 3,
            };
            let stream = Stream::new(5, "after attention");
            let before = 3 * shape[1..].iter().product::<usize>() as u64;
            let kept = |n: usize| -> Vec<bool> {
                let drawn = |i| stream.uniform(before + i) >= 0.25;
                (0..n as u64).map(drawn).collect()
            };
            let drop = |x: &[f64]| rounded(reference::dropout(0.25, &kept(x.len()), x), 2);
            Case::new(&op, vec![Array::normal("x", shape, dtype)]).check(
                |x| vec![drop(&x[0].values)],
                |_, _, dy| vec![Some(drop(dy))],
            );
        }
    }
    assert!(
        Dropout {
            p: 1.0,
            name: String::new(),
            order: Default::default(),
            rows_before: 0,
        }
        .infer(&[])
        .is_err()
    );
}
