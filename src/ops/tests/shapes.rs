//! Ops that move elements: embedding, rotary, transpose, slice, concatenate; and sums.

use super::harness::{Array, Bounded, Case, FLOATS, U, exact};
use crate::dtype::DType;
use crate::ops::*;
use crate::reference::{self, gamma};
use crate::tensor::TensorType;

fn sizes(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| x.abs()).collect()
}

#[test]
pub(super) fn embeddings_and_parts_of_them() {
    let ids = Array::indices(&[2, 7], &[3, 0, 8, 8, 1, 3, 3, 5, 8, 0, 2, 2, 2, 8]);
    for c in [1, 5, 64] {
        for dtype in FLOATS {
            for (output, gradient) in [(None, None), (Some(DType::Bf16), Some(DType::F32))] {
                let op = Embedding { output };
                let inputs = vec![Array::normal("table", &[9, c], dtype), ids.clone()];
                let labels = ids.labels();
                let mut case = Case::new(&op, inputs);
                case.gradient_type = gradient;
                case.check(
                    |x| {
                        vec![exact(reference::embedding(
                            [9, c],
                            &x[0].values,
                            &labels,
                            0,
                        ))]
                    },
                    |_, _, dy| {
                        let want = reference::embedding_backward([9, c], &labels, 0, dy);
                        let size = reference::embedding_backward([9, c], &labels, 0, &sizes(dy));
                        let bound = size.iter().map(|s| gamma(14, U) * s).collect();
                        vec![Some((want, bound)), None]
                    },
                );
            }
        }
    }
    let op = Embedding::default();
    let none = vec![
        Array::normal("table", &[4, 3], DType::F32),
        Array::indices(&[0], &[]),
    ];
    Case::new(&op, none).check(
        |_| vec![exact(vec![])],
        |_, _, _| vec![Some(exact(vec![0.0; 12])), None],
    );
}

#[test]
#[should_panic(expected = "embedding: id 4 at position 1 is not below the vocabulary's 4")]
fn an_id_outside_the_table_is_refused() {
    let op = Embedding::default();
    let inputs = vec![
        Array::normal("table", &[4, 3], DType::F32),
        Array::indices(&[2], &[0, 4]),
    ];
    Case::new(&op, inputs).run();
}

#[test]
pub(super) fn rotary_positions() {
    use reference::RotaryScaling as Textbook;
    let llama = |factor| (factor, 1.0, 4.0, 64.0);
    let (factor, low, high, original_context) = llama(8.0);
    let scalings = [
        (RotaryScaling::None, Textbook::None),
        (
            RotaryScaling::Linear { factor },
            Textbook::Linear { factor },
        ),
        (
            RotaryScaling::Llama3 {
                factor,
                low,
                high,
                original_context,
            },
            Textbook::Llama3 {
                factor,
                low,
                high,
                original_context,
            },
        ),
    ];
    for (style, textbook) in [
        (RotaryStyle::Halves, reference::RotaryStyle::Halves),
        (RotaryStyle::Pairs, reference::RotaryStyle::Pairs),
    ] {
        for (scaling, in_textbook) in scalings {
            for (rotary_dim, dim, head) in [(None, 8, 8), (Some(6), 6, 8), (None, 64, 64)] {
                for dtype in FLOATS {
                    let op = Rotary {
                        theta: 500.0,
                        rotary_dim,
                        style,
                        positions: RotaryPositions::Alike {
                            offset: 11,
                            order: Default::default(),
                        },
                        scaling,
                        ..Default::default()
                    };
                    let shape @ [_, t, ..] = [2, 5, 4, head];
                    let frequencies = reference::rotary_frequencies(dim, 500.0, in_textbook);
                    let (cos, sin) = reference::rotary_table(11, t, &frequencies);
                    // Each result is two products of numbers that are each rounded, and a sum.
                    let size = |x: &[f64]| {
                        let both = reference::rotary(
                            shape,
                            &sizes(x),
                            &sizes(&cos),
                            &sizes(&sin),
                            textbook,
                        );
                        let other: Vec<f64> = sin.iter().map(|s| -s.abs()).collect();
                        let turned =
                            reference::rotary(shape, &sizes(x), &sizes(&cos), &other, textbook);
                        both.iter()
                            .zip(&turned)
                            .map(|(a, b)| gamma(4, U) * a.max(*b))
                            .collect::<Vec<_>>()
                    };
                    Case::new(&op, vec![Array::normal("x", &shape, dtype)]).check(
                        |x| {
                            let y = reference::rotary(shape, &x[0].values, &cos, &sin, textbook);
                            vec![(y, size(&x[0].values))]
                        },
                        |_, _, dy| {
                            let dx = reference::rotary_backward(shape, dy, &cos, &sin, textbook);
                            vec![Some((dx, size(dy)))]
                        },
                    );
                }
            }
        }
    }
}

/// Every token at its own position: as one long sequence whose table has a line for each token.
#[test]
pub(super) fn rotary_positions_of_documents() {
    let (shape @ [b, t, h, d], textbook) = ([2, 5, 3, 8], reference::RotaryStyle::Halves);
    let positions: [u32; 10] = [0, 1, 2, 0, 1, 0, 0, 1, 2, 3];
    let frequencies = reference::rotary_frequencies(d, 10_000.0, reference::RotaryScaling::None);
    let (cos, sin) = reference::rotary_table(0, t, &frequencies);
    let lines = |table: &[f64]| -> Vec<f64> {
        let line = |p: &u32| table[*p as usize * d / 2..][..d / 2].to_vec();
        positions.iter().flat_map(line).collect()
    };
    let (cos, sin) = (lines(&cos), lines(&sin));
    let row = [1, b * t, h, d];
    // Each result is two products of numbers that are each rounded, and a sum; both factors are at most 1.
    let size = |x: &[f64]| -> Vec<f64> {
        let pairs = x.chunks(d).flat_map(|head| {
            let pair = |i: usize| head[i % (d / 2)].abs() + head[i % (d / 2) + d / 2].abs();
            (0..d).map(pair).collect::<Vec<_>>()
        });
        pairs.map(|both| gamma(4, U) * both).collect()
    };
    for dtype in FLOATS {
        let op = Rotary {
            positions: RotaryPositions::Each(positions.into()),
            ..Default::default()
        };
        Case::new(&op, vec![Array::normal("x", &shape, dtype)]).check(
            |x| {
                let y = reference::rotary(row, &x[0].values, &cos, &sin, textbook);
                vec![(y, size(&x[0].values))]
            },
            |_, _, dy| {
                let dx = reference::rotary_backward(row, dy, &cos, &sin, textbook);
                vec![Some((dx, size(dy)))]
            },
        );
    }
    let op = Rotary {
        positions: RotaryPositions::Each(vec![0; 9].into()),
        ..Default::default()
    };
    let x = TensorType::new(shape, DType::F32);
    let message = op.infer(&[x]).expect_err("refused");
    assert!(
        message.contains("as many tokens as positions, 9"),
        "{message}"
    );
}

#[test]
#[should_panic(expected = "of 1 sequences of 2 tokens are as many numbers below 2, not 2 up to 2")]
fn rotary_positions_lie_in_a_row() {
    let op = Rotary {
        positions: RotaryPositions::Each(vec![0, 2].into()),
        ..Default::default()
    };
    Case::new(&op, vec![Array::normal("x", &[1, 2, 1, 4], DType::F32)]).run();
}

#[test]
pub(super) fn transposes() {
    for (shape, order) in [
        (&[3, 5][..], &[1, 0][..]),
        (&[2, 3, 4, 5], &[0, 2, 1, 3]),
        (&[2, 3, 4, 5], &[3, 1, 0, 2]),
        (&[1, 67, 65], &[0, 2, 1]),
        (&[0, 3], &[1, 0]),
        (&[7], &[0]),
    ] {
        for dtype in FLOATS {
            for gradient in [None, Some(DType::F32)] {
                let op = Transpose {
                    order: order.to_vec(),
                };
                let mut case = Case::new(&op, vec![Array::normal("x", shape, dtype)]);
                case.gradient_type = gradient;
                case.check(
                    |x| vec![exact(reference::permute(shape, order, &x[0].values))],
                    |_, _, dy| vec![Some(exact(reference::permute_backward(shape, order, dy)))],
                );
            }
        }
    }
    let op = Transpose { order: vec![0, 0] };
    let why = op
        .infer(&[TensorType::new([2, 3], DType::F32)])
        .unwrap_err();
    assert!(why.contains("[0, 0]") && why.contains("f32[2, 3]"), "{why}");
}

#[test]
pub(super) fn slices_and_what_they_join_to() {
    for (shape, axis, range) in [
        (&[6, 5, 4][..], 1, 1..3),
        (&[6, 5, 4], 0, 2..6),
        (&[6, 5, 4], 2, 0..4),
        (&[6, 5, 4], 2, 3..4),
        (&[6, 5, 4], 1, 2..2),
        (&[9], 0, 0..1),
    ] {
        for dtype in FLOATS {
            for gradient in [None, Some(DType::F32)] {
                let op = SliceAxis {
                    axis,
                    range: range.clone(),
                };
                let mut case = Case::new(&op, vec![Array::normal("x", shape, dtype)]);
                case.gradient_type = gradient;
                case.check(
                    |x| {
                        vec![exact(reference::slice(
                            shape,
                            axis,
                            range.clone(),
                            &x[0].values,
                        ))]
                    },
                    |_, _, dy| {
                        vec![Some(exact(reference::slice_backward(
                            shape,
                            axis,
                            range.clone(),
                            dy,
                        )))]
                    },
                );
            }
        }
    }
    let op = SliceAxis {
        axis: 1,
        range: 2..4,
    };
    let why = op
        .infer(&[TensorType::new([5, 3], DType::F32)])
        .unwrap_err();
    assert!(why.contains("2..4") && why.contains("f32[5, 3]"), "{why}");
}

#[test]
pub(super) fn concatenations() {
    for (axis, parts) in [
        (0, vec![vec![2, 4, 3], vec![1, 4, 3]]),
        (1, vec![vec![2, 4, 3], vec![2, 1, 3], vec![2, 0, 3]]),
        (2, vec![vec![2, 4, 3], vec![2, 4, 5]]),
        (0, vec![vec![7]]),
    ] {
        let shapes: Vec<&[usize]> = parts.iter().map(|p| &p[..]).collect();
        for dtype in FLOATS {
            for gradient in [None, Some(DType::F32)] {
                let op = Concatenate { axis };
                let inputs = parts.iter().enumerate();
                let inputs = inputs.map(|(i, p)| Array::normal(&format!("x{i}"), p, dtype));
                let mut case = Case::new(&op, inputs.collect());
                case.gradient_type = gradient;
                case.check(
                    |x| {
                        let parts: Vec<(&[usize], &[f64])> =
                            x.iter().map(|x| (&x.ty.shape[..], &x.values[..])).collect();
                        vec![exact(reference::concatenate(axis, &parts))]
                    },
                    |_, _, dy| {
                        let parts = reference::concatenate_backward(axis, &shapes, dy);
                        parts.into_iter().map(|p| Some(exact(p))).collect()
                    },
                );
            }
        }
    }
    let ty = |shape: &[usize], dtype| TensorType::new(shape, dtype);
    let op = Concatenate { axis: 0 };
    for other in [
        ty(&[2, 4], DType::F32),
        ty(&[2, 3], DType::Bf16),
        ty(&[2], DType::F32),
    ] {
        assert!(op.infer(&[ty(&[5, 3], DType::F32), other]).is_err());
    }
}

#[test]
pub(super) fn sums_over_everything() {
    for shape in [&[0][..], &[1], &[31], &[2, 3, 5], &[67, 131]] {
        for dtype in FLOATS {
            let x = || vec![Array::normal("x", shape, dtype)];
            let n: usize = shape.iter().product();
            let total = |x: f64, size: f64| -> Bounded { (vec![x], vec![gamma(n + 2, U) * size]) };
            Case::new(&Sum, x()).check(
                |x| {
                    vec![total(
                        reference::sum(&x[0].values),
                        reference::sum(&sizes(&x[0].values)),
                    )]
                },
                |_, _, dy| vec![Some(exact(reference::sum_backward(n, dy[0])))],
            );
            Case::new(&SumOfSquares, x()).check(
                |x| {
                    let sum: f64 = x[0].values.iter().map(|x| x * x).sum();
                    vec![total(sum, sum)]
                },
                |x, _, dy| {
                    let dx: Vec<f64> = x[0].values.iter().map(|x| 2.0 * x * dy[0]).collect();
                    let bound = sizes(&dx).iter().map(|x| gamma(2, U) * x).collect();
                    vec![Some((dx, bound))]
                },
            );
        }
    }
}
