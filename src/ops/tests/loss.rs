//! Cross-entropy on a whole vocabulary and on a split one, and the numbers around it.

use super::harness::{Array, Bounded, Case, FLOATS, U, exact};
use crate::dtype::DType;
use crate::ops::*;
use crate::reference::{self, gamma};
use crate::tensor::TensorType;

/// A table of cases: (shape of the logits, valid columns).
const CASES: [(&[usize], Option<usize>); 6] = [
    (&[1, 1], None),
    (&[3, 37], None),
    (&[2, 3, 64], Some(50)),
    (&[4, 1031], Some(1030)),
    (&[5, 8], Some(3)),
    (&[0, 8], None),
];

fn inputs(shape: &[usize], valid: Option<usize>, dtype: DType) -> Vec<Array> {
    let ty = TensorType::new(shape, dtype);
    let valid = valid.unwrap_or(ty.last()) as u32;
    // The second row is ignored.
    let label = |i: usize| {
        if i == 1 {
            u32::MAX
        } else {
            (i as u32 * 7 + 2) % valid
        }
    };
    let labels: Vec<u32> = (0..ty.rows()).map(label).collect();
    vec![
        Array::normal("logits", shape, dtype),
        Array::indices(&shape[..shape.len() - 1], &labels),
    ]
}

/// The textbook's max, sum and target of each row.
fn statistics(x: &Array, labels: &[u32], valid: usize) -> [Vec<f64>; 3] {
    let rows = x.values.chunks(x.ty.last());
    let max: Vec<f64> = rows
        .clone()
        .map(|r| r[..valid].iter().copied().fold(f64::NEG_INFINITY, f64::max))
        .collect();
    let sum = rows
        .clone()
        .zip(&max)
        .map(|(r, m)| r[..valid].iter().map(|x| (x - m).exp()).sum());
    let target = rows
        .zip(labels)
        .map(|(r, &l)| r.get(l as usize).copied().unwrap_or(0.0));
    [max.clone(), sum.collect(), target.collect()]
}

/// e^(x - max) of normal numbers, with differences below 16: 16 roundings of the argument, 8 of the polynomial; v sums.
fn relative(v: usize) -> f64 {
    gamma(v + 40, U)
}

fn loss_bound(v: usize, [max, sum, target]: &[Vec<f64>; 3]) -> Vec<f64> {
    (0..max.len())
        .map(|i| {
            let size = max[i].abs() + sum[i].ln().abs() + target[i].abs();
            1.01 * relative(v) + gamma(6, U) * size
        })
        .collect()
}

fn gradient(x: &Array, labels: &[u32], valid: usize, dloss: &[f64]) -> Bounded {
    let sizes @ [_, v] = [x.ty.rows(), x.ty.last()];
    let dx = reference::cross_entropy_backward(sizes, valid, &x.values, labels, u32::MAX, dloss);
    let bound = (0..dx.len())
        .map(|i| {
            let (row, d) = (i / v, dloss[i / v].abs());
            let exists = i % v < valid && labels[row] != u32::MAX;
            if exists {
                (relative(v) + gamma(2, U)) * (dx[i].abs() + 2.0 * d).min(2.0 * d)
            } else {
                0.0
            }
        })
        .collect();
    (dx, bound)
}

#[test]
pub(super) fn on_a_whole_vocabulary() {
    for (shape, valid) in CASES {
        for dtype in FLOATS {
            let op = CrossEntropy {
                valid,
                ..Default::default()
            };
            let inputs = inputs(shape, valid, dtype);
            let labels = inputs[1].labels();
            let sizes @ [_, v] = [inputs[0].ty.rows(), inputs[0].ty.last()];
            let valid = valid.unwrap_or(v);
            for gradient_type in [None, Some(DType::F32)] {
                let mut case = Case::new(&op, inputs.clone());
                case.gradient_type = gradient_type;
                case.check(
                    |x| {
                        let want =
                            reference::cross_entropy(sizes, valid, &x[0].values, &labels, u32::MAX);
                        let found = statistics(&x[0], &labels, valid);
                        let bound = loss_bound(v, &found);
                        let [max, sum, _] = found;
                        let sum_off = sum.iter().map(|s| relative(v) * s).collect();
                        vec![(want, bound), exact(max), (sum, sum_off)]
                    },
                    |x, _, dy| vec![Some(gradient(&x[0], &labels, valid, dy)), None],
                );
            }
        }
    }
}

#[test]
pub(super) fn on_a_vocabulary_in_parts() {
    for (shape, valid) in CASES {
        for dtype in FLOATS {
            let whole = inputs(shape, valid, dtype);
            let (logits, labels) = (&whole[0], &whole[1]);
            let numbers = labels.labels();
            let sizes @ [_, v] = [logits.ty.rows(), logits.ty.last()];
            let real = valid.unwrap_or(v);
            let found = statistics(logits, &numbers, real);
            let row = |x: &[f64]| Array::rounded(&labels.ty.shape, DType::F32, x.to_vec());
            let [max, sum, target] = [0, 1, 2].map(|i| row(&found[i]));
            let op = RowMax { valid };
            let mut case = Case::new(&op, vec![logits.clone()]);
            case.maximum = true;
            case.check(|_| vec![exact(found[0].clone())], |_, _, _| vec![None]);
            let op = RowExpSum { valid };
            Case::new(&op, vec![logits.clone(), max.clone(), labels.clone()]).check(
                |_| {
                    let sum_off = found[1].iter().map(|s| relative(v) * s).collect();
                    vec![(found[1].clone(), sum_off), exact(found[2].clone())]
                },
                |_, _, _| vec![None; 3],
            );
            let op = CrossEntropyFromStatistics {
                valid,
                ..Default::default()
            };
            let inputs = vec![logits.clone(), labels.clone(), max, sum, target];
            Case::new(&op, inputs).check(
                |x| {
                    let want =
                        reference::cross_entropy(sizes, real, &x[0].values, &numbers, u32::MAX);
                    vec![(want, loss_bound(v, &found))]
                },
                |x, _, dy| {
                    let mut gradients = vec![None; 5];
                    gradients[0] = Some(gradient(&x[0], &numbers, real, dy));
                    gradients
                },
            );
        }
    }
}

#[test]
pub(super) fn the_three_ops_give_the_bits_of_the_one() {
    let whole = inputs(&[7, 301], Some(299), DType::Bf16);
    let valid = Some(299);
    let one = CrossEntropy {
        valid,
        ..Default::default()
    };
    let one = Case::new(&one, whole.clone()).run();
    let (logits, labels) = (whole[0].clone(), whole[1].clone());
    let max = Case::new(&RowMax { valid }, vec![logits.clone()])
        .run()
        .remove(0);
    let op = RowExpSum { valid };
    let sums = Case::new(&op, vec![logits.clone(), max.clone(), labels.clone()]).run();
    let op = CrossEntropyFromStatistics {
        valid,
        ..Default::default()
    };
    let inputs = vec![
        logits,
        labels,
        max.clone(),
        sums[0].clone(),
        sums[1].clone(),
    ];
    let losses = Case::new(&op, inputs).run();
    assert_eq!(one[0].values, losses[0].values);
    assert_eq!(one[1].values, max.values);
    assert_eq!(one[2].values, sums[0].values);
}

#[test]
#[should_panic(expected = "label 3 of row 0 is neither below the vocabulary's 3")]
fn a_label_that_is_padding_is_refused() {
    let op = CrossEntropy {
        valid: Some(3),
        ..Default::default()
    };
    let inputs = vec![
        Array::normal("x", &[1, 8], DType::F32),
        Array::indices(&[1], &[3]),
    ];
    Case::new(&op, inputs).run();
}

#[test]
pub(super) fn counts_and_means() {
    for n in [0, 1, 9] {
        let labels: Vec<u32> = (0..n)
            .map(|i| if i % 3 == 1 { u32::MAX } else { i })
            .collect();
        let count = labels.iter().filter(|&&l| l != u32::MAX).count() as f64;
        let op = CountLabels::default();
        Case::new(&op, vec![Array::indices(&[n as usize], &labels)])
            .check(|_| vec![exact(vec![count])], |_, _, _| vec![None]);
    }
    let number = |x| Array::rounded(&[1], DType::F32, vec![x]);
    Case::new(&Ratio, vec![number(10.0), number(3.0)]).check(
        |_| vec![(vec![10.0 / 3.0], vec![0.0])],
        |_, _, dy| vec![Some((vec![dy[0] / 3.0], vec![0.0])), None],
    );
}
