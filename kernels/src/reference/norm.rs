//! Layer norm and RMS norm.

use super::matmul::dot;

/// `y = (x - mean) rstd w + bias` with `mean` and `rstd = 1 / sqrt(variance + eps)` of each row (Ba et al. 2016).
/// x, y `[r, c]`; weight, bias `[c]`. Gives `(y, mean, rstd)`, the latter two `[r]`.
pub fn layer_norm(
    [r, c]: [usize; 2],
    x: &[f64],
    weight: Option<&[f64]>,
    bias: Option<&[f64]>,
    eps: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    check([r, c], x, &[weight, bias]);
    let (mut y, mut mean, mut rstd) = (vec![0.0; r * c], vec![0.0; r], vec![0.0; r]);
    for i in 0..r {
        let row = &x[i * c..][..c];
        mean[i] = row.iter().sum::<f64>() / c as f64;
        let variance = row.iter().map(|x| (x - mean[i]).powi(2)).sum::<f64>() / c as f64;
        rstd[i] = 1.0 / (variance + eps).sqrt();
        for j in 0..c {
            let normal = (row[j] - mean[i]) * rstd[i];
            y[i * c + j] = normal * weight.map_or(1.0, |w| w[j]) + bias.map_or(0.0, |b| b[j]);
        }
    }
    (y, mean, rstd)
}

/// `[dx, dweight, dbias]` of [`layer_norm`] from its `mean` and `rstd`. `dweight` and `dbias` are given whether or not the
/// forward had them.
pub fn layer_norm_backward(
    [r, c]: [usize; 2],
    x: &[f64],
    weight: Option<&[f64]>,
    mean: &[f64],
    rstd: &[f64],
    dy: &[f64],
) -> [Vec<f64>; 3] {
    check([r, c], x, &[weight]);
    check([r, c], dy, &[]);
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; r * c], vec![0.0; c], vec![0.0; c]);
    for i in 0..r {
        // normal = (x - mean) rstd, y = normal w + bias
        let normal: Vec<f64> = (0..c).map(|j| (x[i * c + j] - mean[i]) * rstd[i]).collect();
        let dnormal: Vec<f64> = (0..c)
            .map(|j| dy[i * c + j] * weight.map_or(1.0, |w| w[j]))
            .collect();
        // mean and rstd depend on every x of the row: what moves all of it or scales all of it does not count.
        let shift = dnormal.iter().sum::<f64>() / c as f64;
        let stretch = dot(&dnormal, &normal) / c as f64;
        for j in 0..c {
            dx[i * c + j] = rstd[i] * (dnormal[j] - shift - normal[j] * stretch);
            dweight[j] += dy[i * c + j] * normal[j];
            dbias[j] += dy[i * c + j];
        }
    }
    [dx, dweight, dbias]
}

/// `y = x rstd w` with `rstd = 1 / sqrt(mean of x^2 + eps)` of each row (Zhang and Sennrich 2019). x, y `[r, c]`; weight `[c]`.
/// Gives `(y, rstd)`. The norm of each head of q or k is this with `c = d`.
pub fn rms_norm(
    [r, c]: [usize; 2],
    x: &[f64],
    weight: Option<&[f64]>,
    eps: f64,
) -> (Vec<f64>, Vec<f64>) {
    check([r, c], x, &[weight]);
    let (mut y, mut rstd) = (vec![0.0; r * c], vec![0.0; r]);
    for i in 0..r {
        let row = &x[i * c..][..c];
        rstd[i] = 1.0 / (dot(row, row) / c as f64 + eps).sqrt();
        for j in 0..c {
            y[i * c + j] = row[j] * rstd[i] * weight.map_or(1.0, |w| w[j]);
        }
    }
    (y, rstd)
}

/// `[dx, dweight]` of [`rms_norm`] from its `rstd`.
pub fn rms_norm_backward(
    [r, c]: [usize; 2],
    x: &[f64],
    weight: Option<&[f64]>,
    rstd: &[f64],
    dy: &[f64],
) -> [Vec<f64>; 2] {
    check([r, c], x, &[weight]);
    check([r, c], dy, &[]);
    let (mut dx, mut dweight) = (vec![0.0; r * c], vec![0.0; c]);
    for i in 0..r {
        // normal = x rstd, y = normal w
        let normal: Vec<f64> = (0..c).map(|j| x[i * c + j] * rstd[i]).collect();
        let dnormal: Vec<f64> = (0..c)
            .map(|j| dy[i * c + j] * weight.map_or(1.0, |w| w[j]))
            .collect();
        let stretch = dot(&dnormal, &normal) / c as f64;
        for j in 0..c {
            dx[i * c + j] = rstd[i] * (dnormal[j] - normal[j] * stretch);
            dweight[j] += dy[i * c + j] * normal[j];
        }
    }
    [dx, dweight]
}

/// Panics unless x is `[r, c]` and each vector `[c]`.
fn check([r, c]: [usize; 2], x: &[f64], vectors: &[Option<&[f64]>]) {
    assert_eq!(x.len(), r * c, "norm: x and dy are [{r}, {c}]");
    for w in vectors.iter().flatten() {
        assert_eq!(w.len(), c, "norm: weight and bias are [{c}]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    #[test]
    fn small_rows_by_hand() {
        let (y, mean, rstd) = layer_norm(
            [1, 2],
            &[1.0, 5.0],
            Some(&[2.0, 3.0]),
            Some(&[1.0, 0.0]),
            0.0,
        );
        assert_eq!((y, mean, rstd), (vec![-1.0, 3.0], vec![3.0], vec![0.5]));
        let (y, rstd) = rms_norm([1, 2], &[3.0, 3.0], Some(&[2.0, 3.0]), 7.0);
        assert_eq!((y, rstd), (vec![1.5, 2.25], vec![0.25]));
    }

    #[test]
    fn layer_norm_follows_its_gradient() {
        let (s, eps) = ([3, 11], 1e-5);
        let inputs = [normals("x", 33), normals("w", 11), normals("b", 11)];
        assert_gradient(
            "layer norm",
            &inputs,
            |x| layer_norm(s, &x[0], Some(&x[1]), Some(&x[2]), eps).0,
            |x, dy| {
                let (_, mean, rstd) = layer_norm(s, &x[0], Some(&x[1]), Some(&x[2]), eps);
                layer_norm_backward(s, &x[0], Some(&x[1]), &mean, &rstd, dy).into()
            },
        );
        assert_gradient(
            "layer norm without weight",
            &inputs[..1],
            |x| layer_norm(s, &x[0], None, None, eps).0,
            |x, dy| {
                let (_, mean, rstd) = layer_norm(s, &x[0], None, None, eps);
                let [dx, ..] = layer_norm_backward(s, &x[0], None, &mean, &rstd, dy);
                vec![dx]
            },
        );
    }

    #[test]
    fn rms_norm_follows_its_gradient() {
        let (s, eps) = ([3, 11], 1e-5);
        let inputs = [normals("x", 33), normals("w", 11)];
        assert_gradient(
            "rms norm",
            &inputs,
            |x| rms_norm(s, &x[0], Some(&x[1]), eps).0,
            |x, dy| {
                let (_, rstd) = rms_norm(s, &x[0], Some(&x[1]), eps);
                rms_norm_backward(s, &x[0], Some(&x[1]), &rstd, dy).into()
            },
        );
    }
}
