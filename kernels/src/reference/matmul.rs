//! Products of matrices, with a bias and an activation.

use super::activation::{Activation, activation, activation_backward};

/// `c[i,j] = sum over p of a[i,p] b[p,j]`: a `[m, k]`, b `[k, n]`, c `[m, n]`.
pub fn matmul([m, n, k]: [usize; 3], a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), m * k, "matmul: a is [m, k] = [{m}, {k}]");
    assert_eq!(b.len(), k * n, "matmul: b is [k, n] = [{k}, {n}]");
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + p] * b[p * n + j];
            }
        }
    }
    c
}

/// `[da, db]` of [`matmul`]: `da = dc b^T`, `db = a^T dc`.
pub fn matmul_backward([m, n, k]: [usize; 3], a: &[f64], b: &[f64], dc: &[f64]) -> [Vec<f64>; 2] {
    // c = a b
    let da = matmul([m, k, n], dc, &transposed([k, n], b));
    let db = matmul([k, n, m], &transposed([m, k], a), dc);
    [da, db]
}

/// `y[j,i] = x[i,j]`: x `[r, c]`, y `[c, r]`.
pub fn transposed([r, c]: [usize; 2], x: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), r * c, "transposed: x is [{r}, {c}]");
    let mut y = vec![0.0; r * c];
    for i in 0..r {
        for j in 0..c {
            y[j * r + i] = x[i * c + j];
        }
    }
    y
}

/// `z = a b + bias` and `y = f(z)`: a `[m, k]`, b `[k, n]`, bias `[n]`. Gives `(y, z)`,
/// which are equal without an activation.
pub fn linear(
    [m, n, k]: [usize; 3],
    a: &[f64],
    b: &[f64],
    bias: Option<&[f64]>,
    f: Option<Activation>,
) -> (Vec<f64>, Vec<f64>) {
    let mut z = matmul([m, n, k], a, b);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "linear: bias is [n] = [{n}]");
        for i in 0..m {
            for j in 0..n {
                z[i * n + j] += bias[j];
            }
        }
    }
    let y = f.map_or_else(|| z.clone(), |f| activation(f, &z));
    (y, z)
}

/// `[da, db, dbias]` of [`linear`], from its `z` and `dy` `[m, n]`.
pub fn linear_backward(
    [m, n, k]: [usize; 3],
    a: &[f64],
    b: &[f64],
    z: &[f64],
    f: Option<Activation>,
    dy: &[f64],
) -> [Vec<f64>; 3] {
    // y = f(z)
    let dz = f.map_or_else(|| dy.to_vec(), |f| activation_backward(f, z, dy));
    // z = a b + bias
    let [da, db] = matmul_backward([m, n, k], a, b, &dz);
    let dbias = column_sum([m, n], &dz);
    [da, db, dbias]
}

/// `y[j] = sum over i of x[i,j]`: x `[r, c]`, y `[c]`. The gradient of a bias that every row shares.
pub fn column_sum([r, c]: [usize; 2], x: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), r * c, "column_sum: x is [{r}, {c}]");
    let mut y = vec![0.0; c];
    for i in 0..r {
        for j in 0..c {
            y[j] += x[i * c + j];
        }
    }
    y
}

/// `sum of a b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "dot: both sides have one length");
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    #[test]
    fn small_products_by_hand() {
        let c = matmul(
            [2, 2, 3],
            &[1., 2., 3., 4., 5., 6.],
            &[1., 0., 0., 1., 1., 1.],
        );
        assert_eq!(c, [4., 5., 10., 11.]);
        assert_eq!(matmul([1, 2, 0], &[], &[]), [0., 0.]);
        assert_eq!(
            transposed([2, 3], &[1., 2., 3., 4., 5., 6.]),
            [1., 4., 2., 5., 3., 6.]
        );
        assert_eq!(column_sum([2, 2], &[1., 2., 3., 4.]), [4., 6.]);
    }

    #[test]
    fn products_follow_their_gradients() {
        let s = [5, 7, 4];
        let inputs = [normals("a", 20), normals("b", 28), normals("bias", 7)];
        for f in [None, Some(Activation::GeluTanh), Some(Activation::Silu)] {
            assert_gradient(
                &format!("linear {f:?}"),
                &inputs,
                |x| linear(s, &x[0], &x[1], Some(&x[2]), f).0,
                |x, dy| {
                    let (_, z) = linear(s, &x[0], &x[1], Some(&x[2]), f);
                    linear_backward(s, &x[0], &x[1], &z, f, dy).into()
                },
            );
        }
    }
}
