//! Layer norm, RMS norm, softmax.

use super::harness::{Array, Bounded, Case, FLOATS, U};
use crate::dtype::DType;
use crate::ops::{LayerNorm, Op, RmsNorm, Softmax};
use crate::reference::{self, gamma};
use crate::tensor::TensorType;

const SHAPES: [&[usize]; 5] = [&[0, 8], &[3, 1], &[2, 3, 37], &[5, 256], &[2, 1031]];

fn mean_size(row: &[f64]) -> f64 {
    row.iter().map(|x| x.abs()).sum::<f64>() / row.len().max(1) as f64
}

/// The bound of dx, dweight and dbias, given the statistics that the op saved.
fn gradient_bounds(
    [r, c]: [usize; 2],
    x: &[f64],
    weight: Option<&[f64]>,
    (mean, rstd): (&[f64], &[f64]),
    dy: &[f64],
) -> [Vec<f64>; 3] {
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; r * c], vec![0.0; c], vec![0.0; c]);
    for i in 0..r {
        let normal: Vec<f64> = (0..c).map(|j| (x[i * c + j] - mean[i]) * rstd[i]).collect();
        let g: Vec<f64> = (0..c)
            .map(|j| dy[i * c + j] * weight.map_or(1.0, |w| w[j]))
            .collect();
        let products: Vec<f64> = g.iter().zip(&normal).map(|(g, n)| g * n).collect();
        for j in 0..c {
            let size = g[j].abs() + mean_size(&g) + normal[j].abs() * mean_size(&products);
            dx[i * c + j] = gamma(c + 16, U) * rstd[i] * size;
            dweight[j] += gamma(r + 8, U) * (dy[i * c + j] * normal[j]).abs();
            dbias[j] += gamma(r + 1, U) * dy[i * c + j].abs();
        }
    }
    [dx, dweight, dbias]
}

#[test]
pub(super) fn layer_norm() {
    for shape in SHAPES {
        for dtype in FLOATS {
            for (weight, bias, gradient) in [
                (true, true, None),
                (true, true, Some(DType::F32)),
                (true, false, None),
                (false, true, None),
                (false, false, None),
            ] {
                check_layer_norm(shape, dtype, weight, bias, gradient);
            }
        }
    }
}

fn check_layer_norm(
    shape: &[usize],
    dtype: DType,
    weight: bool,
    bias: bool,
    gradient: Option<DType>,
) {
    let op = LayerNorm {
        eps: 1e-5,
        weight,
        bias,
    };
    let ty = TensorType::new(shape, dtype);
    let sizes @ [r, c] = [ty.rows(), ty.last()];
    let mut inputs = vec![Array::normal("x", shape, dtype)];
    inputs.extend(weight.then(|| Array::normal("w", &[c], dtype)));
    inputs.extend(bias.then(|| Array::normal("b", &[c], dtype)));
    let vectors = |x: &[Array]| {
        let w = weight.then(|| x[1].values.clone());
        let b = bias.then(|| x[1 + weight as usize].values.clone());
        (w, b)
    };
    let mut case = Case::new(&op, inputs);
    case.gradient_type = gradient;
    case.check(
        |x| {
            let (w, b) = vectors(x);
            let x = &x[0].values;
            let (y, mean, rstd) =
                reference::layer_norm(sizes, x, w.as_deref(), b.as_deref(), op.eps.into());
            let (mut y_off, mut mean_off, mut rstd_off) = (vec![], vec![], vec![]);
            for i in 0..r {
                let row = &x[i * c..][..c];
                let shift = gamma(c + 1, U) * mean_size(row);
                // The variance gains at most the shift's square; c - 1 sums and two roundings a square; eps and the root.
                let stretch = gamma(c + 8, U) + (shift * rstd[i]).powi(2);
                mean_off.push(shift);
                rstd_off.push(stretch * rstd[i]);
                for j in 0..c {
                    let w = w.as_ref().map_or(1.0, |w| w[j].abs());
                    let b = b.as_ref().map_or(0.0, |b| b[j].abs());
                    let normal = ((row[j] - mean[i]) * rstd[i]).abs();
                    let off = shift * rstd[i] + normal * (stretch + gamma(4, U));
                    y_off.push(1.01 * w * off + gamma(2, U) * (w * normal + b));
                }
            }
            vec![(y, y_off), (mean, mean_off), (rstd, rstd_off)]
        },
        |x, outputs, dy| {
            let (w, _) = vectors(x);
            let (x, mean, rstd) = (&x[0].values, &outputs[1].values, &outputs[2].values);
            let want = reference::layer_norm_backward(sizes, x, w.as_deref(), mean, rstd, dy);
            let bounds = gradient_bounds(sizes, x, w.as_deref(), (mean, rstd), dy);
            let mut found = want.into_iter().zip(bounds);
            let mut next = |wanted: bool| found.next().filter(|_| wanted);
            let all = [next(true), next(weight), next(bias)];
            all.into_iter().flatten().map(Some).collect()
        },
    );
}

#[test]
pub(super) fn rms_norm_over_rows_and_heads() {
    for shape in [
        &[0, 8][..],
        &[3, 1],
        &[2, 3, 37],
        &[2, 3, 4, 64],
        &[2, 1031],
    ] {
        for dtype in FLOATS {
            for (weight, gradient) in [(true, None), (true, Some(DType::F32)), (false, None)] {
                check_rms_norm(shape, dtype, weight, gradient);
            }
        }
    }
}

fn check_rms_norm(shape: &[usize], dtype: DType, weight: bool, gradient: Option<DType>) {
    let op = RmsNorm { eps: 1e-6, weight };
    let ty = TensorType::new(shape, dtype);
    let sizes @ [r, c] = [ty.rows(), ty.last()];
    let mut inputs = vec![Array::normal("x", shape, dtype)];
    inputs.extend(weight.then(|| Array::normal("w", &[c], dtype)));
    let mut case = Case::new(&op, inputs);
    case.gradient_type = gradient;
    case.check(
        |x| {
            let w = weight.then(|| &x[1].values[..]);
            let (y, rstd) = reference::rms_norm(sizes, &x[0].values, w, op.eps.into());
            let within = |x: Vec<f64>| -> Bounded {
                let bound = x.iter().map(|x| gamma(c + 12, U) * x.abs()).collect();
                (x, bound)
            };
            vec![within(y), within(rstd)]
        },
        |x, outputs, dy| {
            let w = weight.then(|| &x[1].values[..]);
            let (x, rstd) = (&x[0].values, &outputs[1].values);
            let [dx, dweight] = reference::rms_norm_backward(sizes, x, w, rstd, dy);
            let [dx_off, dweight_off, _] = gradient_bounds(sizes, x, w, (&vec![0.0; r], rstd), dy);
            let mut gradients = vec![Some((dx, dx_off))];
            gradients.extend(weight.then_some(Some((dweight, dweight_off))));
            gradients
        },
    );
}

#[test]
pub(super) fn softmax() {
    for shape in SHAPES {
        for dtype in FLOATS {
            let ty = TensorType::new(shape, dtype);
            let sizes @ [_, c] = [ty.rows(), ty.last()];
            Case::new(&Softmax, vec![Array::normal("x", shape, dtype)]).check(
                |x| {
                    // exp of differences below 16, each rounded, and c of them added.
                    let y = reference::softmax(sizes, &x[0].values);
                    let bound = y.iter().map(|y| gamma(c + 48, U) * y).collect();
                    vec![(y, bound)]
                },
                |_, outputs, dy| {
                    let y = &outputs[0].values;
                    let dx = reference::softmax_backward(sizes, y, dy);
                    let products: Vec<f64> = y.iter().zip(dy).map(|(y, d)| (y * d).abs()).collect();
                    let bound = (0..y.len())
                        .map(|i| {
                            let row = &products[i / c * c..][..c];
                            gamma(c + 4, U) * y[i] * row.iter().sum::<f64>()
                                + gamma(3, U) * products[i]
                        })
                        .collect();
                    vec![Some((dx, bound))]
                },
            );
        }
    }
}

#[test]
fn a_wrong_vector_is_refused() {
    let ty = |shape: &[usize]| TensorType::new(shape, DType::F32);
    let why = LayerNorm::default()
        .infer(&[ty(&[2, 8]), ty(&[8]), ty(&[7])])
        .unwrap_err();
    assert!(why.contains("f32[2, 8]") && why.contains("f32[7]"), "{why}");
    assert!(RmsNorm::default().infer(&[ty(&[2, 8])]).is_err());
    assert!(Softmax.infer(&[TensorType::new([2], DType::U32)]).is_err());
}
