//! Softmax and the cross entropy.

/// `y[j] = exp(x[j]) / sum over j of exp(x[j])` in each row: x, y `[r, v]`.
pub fn softmax([r, v]: [usize; 2], x: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), r * v, "softmax: x is [{r}, {v}]");
    let mut y = Vec::with_capacity(r * v);
    for i in 0..r {
        let row = &x[i * v..][..v];
        let max = maximum(row);
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        y.extend(row.iter().map(|x| (x - max).exp() / sum));
    }
    y
}

/// `dx` of [`softmax`] from its `y`: `dx = y (dy - sum over j of dy y)`.
pub fn softmax_backward([r, v]: [usize; 2], y: &[f64], dy: &[f64]) -> Vec<f64> {
    assert_eq!(
        [y.len(), dy.len()],
        [r * v; 2],
        "softmax: y and dy are [{r}, {v}]"
    );
    let mut dx = vec![0.0; r * v];
    for i in 0..r {
        let row = i * v..(i + 1) * v;
        let mean: f64 = row.clone().map(|j| dy[j] * y[j]).sum();
        for j in row {
            dx[j] = y[j] * (dy[j] - mean);
        }
    }
    dx
}

/// `loss = ln(sum over j < valid of exp(x[j])) - x[label]` of each row: logits x `[r, v]`, labels and losses `[r]`.
///
/// Columns from `valid` on pad the vocabulary and do not exist. The loss of an `ignored` label is 0.
/// Panics on any other label from `valid` on.
pub fn cross_entropy(
    [r, v]: [usize; 2],
    valid: usize,
    x: &[f64],
    labels: &[u32],
    ignored: u32,
) -> Vec<f64> {
    assert_eq!(x.len(), r * v, "cross_entropy: logits are [{r}, {v}]");
    assert_eq!(labels.len(), r, "cross_entropy: one label per row");
    assert!(valid <= v, "cross_entropy: {valid} valid columns of {v}");
    let row_loss = |i: usize| {
        if labels[i] == ignored {
            return 0.0;
        }
        let row = &x[i * v..][..valid];
        let max = maximum(row);
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        sum.ln() - (row[labels[i] as usize] - max)
    };
    (0..r).map(row_loss).collect()
}

/// The derivative of [`cross_entropy`] by the logits, from `dloss` `[r]`: `dx = dloss (softmax(x) - 1 at the label)`; 0 in
/// padded columns and in rows with the ignored label.
pub fn cross_entropy_backward(
    [r, v]: [usize; 2],
    valid: usize,
    x: &[f64],
    labels: &[u32],
    ignored: u32,
    dloss: &[f64],
) -> Vec<f64> {
    assert_eq!(x.len(), r * v, "cross_entropy: logits are [{r}, {v}]");
    assert_eq!(
        [labels.len(), dloss.len()],
        [r; 2],
        "cross_entropy: one label and dloss per row"
    );
    let mut dx = vec![0.0; r * v];
    for i in (0..r).filter(|&i| labels[i] != ignored) {
        // loss = ln(sum over j of exp(x[j])) - x[label]
        let p = softmax([1, valid], &x[i * v..][..valid]);
        for j in 0..valid {
            dx[i * v + j] = dloss[i] * p[j];
        }
        dx[i * v + labels[i] as usize] -= dloss[i];
    }
    dx
}

/// The mean loss over the rows whose label is not ignored, and its derivative by each row's loss. `(0, zeros)` if all are
/// ignored.
pub fn mean_loss(losses: &[f64], labels: &[u32], ignored: u32) -> (f64, Vec<f64>) {
    assert_eq!(losses.len(), labels.len(), "mean_loss: one label per loss");
    let counted = labels.iter().filter(|&&l| l != ignored).count().max(1) as f64;
    let dloss = labels
        .iter()
        .map(|&l| if l == ignored { 0.0 } else { 1.0 / counted })
        .collect();
    (losses.iter().sum::<f64>() / counted, dloss)
}

/// The largest x. Taken from the exponents, it keeps `exp` in range and their digits where all x are large.
fn maximum(x: &[f64]) -> f64 {
    x.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    const IGNORED: u32 = u32::MAX;

    #[test]
    fn softmax_follows_its_gradient() {
        assert_gradient(
            "softmax",
            &[normals("x", 21)],
            |x| softmax([3, 7], &x[0]),
            |x, dy| vec![softmax_backward([3, 7], &softmax([3, 7], &x[0]), dy)],
        );
        assert_eq!(softmax([1, 2], &[1000.0, 1000.0]), [0.5, 0.5]);
        assert!(softmax([1, 2], &[0.0, f64::NAN]).iter().all(|y| y.is_nan()));
    }

    #[test]
    fn cross_entropy_follows_its_gradient() {
        let labels = [2, IGNORED, 0, 5];
        let f = |x: &[f64]| cross_entropy([4, 7], 6, x, &labels, IGNORED);
        assert_gradient(
            "cross entropy",
            &[normals("x", 28)],
            |x| f(&x[0]),
            |x, dy| {
                vec![cross_entropy_backward(
                    [4, 7],
                    6,
                    &x[0],
                    &labels,
                    IGNORED,
                    dy,
                )]
            },
        );
        assert_gradient(
            "mean loss",
            &[normals("x", 4)],
            |x| vec![mean_loss(&x[0], &[2, 1, 0, 5], IGNORED).0],
            |x, dy| {
                let (_, dloss) = mean_loss(&x[0], &[2, 1, 0, 5], IGNORED);
                vec![dloss.iter().map(|d| d * dy[0]).collect()]
            },
        );
    }

    #[test]
    fn equal_logits_cost_the_logarithm_and_padding_costs_nothing() {
        let x = [1.0, 1.0, 1.0, 1e9, 0.0, 0.0, 0.0, 0.0];
        let losses = cross_entropy([2, 4], 3, &x, &[1, IGNORED], IGNORED);
        assert!((losses[0] - 3f64.ln()).abs() <= 1e-15);
        assert_eq!(losses[1], 0.0);
        assert_eq!(
            mean_loss(&losses, &[1, IGNORED], IGNORED),
            (losses[0], vec![1.0, 0.0])
        );
        assert_eq!(mean_loss(&[0.0], &[IGNORED], IGNORED), (0.0, vec![0.0]));
        let dx = cross_entropy_backward([2, 4], 3, &x, &[1, IGNORED], IGNORED, &[1.0, 1.0]);
        assert!(dx[3..].iter().all(|&d| d == 0.0));
    }

    #[test]
    #[should_panic]
    fn a_padded_label_is_a_mistake() {
        cross_entropy([1, 4], 3, &[0.0; 4], &[3], IGNORED);
    }
}
