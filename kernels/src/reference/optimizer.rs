//! Optimizers, and the clipping of gradients.

/// The numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay per learning rate.
    pub weight_decay: f64,
    /// Which step this is; the first is 1.
    pub step: u32,
}

/// `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`, `p = p - lr wd p - lr m' / (sqrt(v') + eps)` with
/// `m' = m / (1 - beta1^step)`, `v' = v / (1 - beta2^step)` (Loshchilov and Hutter 2017). Gives `(p, m, v)`.
///
/// The gradient is multiplied by `factor` first; if that is not finite, everything stays as it was.
pub fn adamw(
    o: &AdamW,
    p: &[f64],
    [m, v]: [&[f64]; 2],
    g: &[f64],
    factor: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    assert_eq!(
        [m.len(), v.len(), g.len()],
        [p.len(); 3],
        "adamw: m, v and g are as long as p"
    );
    let (mut p, mut m, mut v) = (p.to_vec(), m.to_vec(), v.to_vec());
    if !factor.is_finite() {
        return (p, m, v);
    }
    for i in 0..p.len() {
        let g = g[i] * factor;
        m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * g;
        v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * g * g;
        let mean = m[i] / (1.0 - o.beta1.powi(o.step as i32));
        let square = v[i] / (1.0 - o.beta2.powi(o.step as i32));
        p[i] -= o.lr * o.weight_decay * p[i];
        p[i] -= o.lr * mean / (square.sqrt() + o.eps);
    }
    (p, m, v)
}

/// The numbers of an SGD step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the velocity; 0 is plain SGD.
    pub momentum: f64,
    /// Decay, added to the gradient.
    pub weight_decay: f64,
}

/// `velocity = momentum velocity + g + wd p`, `p = p - lr velocity` (Polyak 1964). Gives `(p, velocity)`.
///
/// The gradient is multiplied by `factor` first; if that is not finite, everything stays as it was.
pub fn sgd(o: &Sgd, p: &[f64], velocity: &[f64], g: &[f64], factor: f64) -> (Vec<f64>, Vec<f64>) {
    assert_eq!(
        [velocity.len(), g.len()],
        [p.len(); 2],
        "sgd: velocity and g are as long as p"
    );
    let (mut p, mut velocity) = (p.to_vec(), velocity.to_vec());
    if !factor.is_finite() {
        return (p, velocity);
    }
    for i in 0..p.len() {
        velocity[i] = o.momentum * velocity[i] + g[i] * factor + o.weight_decay * p[i];
        p[i] -= o.lr * velocity[i];
    }
    (p, velocity)
}

/// `sqrt(sum of g^2)` over all gradients.
pub fn global_norm(gradients: &[&[f64]]) -> f64 {
    let squares = gradients.iter().flat_map(|g| g.iter()).map(|g| g * g);
    squares.sum::<f64>().sqrt()
}

/// The factor that brings gradients of norm `norm` down to `max`: `min(1, max / (norm + 1e-6))` (Pascanu et al. 2013; the
/// 1e-6 is PyTorch's). Of a norm that is not finite it is NaN, so that the step is skipped.
pub fn clip(norm: f64, max: f64) -> f64 {
    if norm.is_finite() {
        (max / (norm + 1e-6)).min(1.0)
    } else {
        f64::NAN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_adamw_step_is_the_sign_of_the_gradient() {
        let o = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 0.0,
            weight_decay: 0.5,
            step: 1,
        };
        let (p, m, v) = adamw(&o, &[2.0, -2.0], [&[0.0; 2]; 2], &[3.0, -5.0], 2.0);
        // p (1 - 0.1 0.5) -+ 0.1, and the moments by hand.
        for (got, want) in [(p, [1.8, -1.8]), (m, [0.6, -1.0]), (v, [1.8, 5.0])] {
            assert!(
                got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-14),
                "{got:?} {want:?}"
            );
        }
    }

    #[test]
    fn moments_are_corrected_for_their_start() {
        // A constant gradient keeps both corrected moments constant, so every step is lr (without eps and decay).
        let mut o = AdamW {
            lr: 0.25,
            beta1: 0.9,
            beta2: 0.95,
            eps: 0.0,
            weight_decay: 0.0,
            step: 0,
        };
        let (mut p, mut m, mut v) = (vec![0.0], vec![0.0], vec![0.0]);
        for step in 1..=10 {
            o.step = step;
            (p, m, v) = adamw(&o, &p, [&m, &v], &[7.0], 1.0);
            assert!((p[0] + 0.25 * step as f64).abs() <= 1e-13);
        }
    }

    #[test]
    fn sgd_gathers_velocity() {
        let o = Sgd {
            lr: 0.5,
            momentum: 0.5,
            weight_decay: 1.0,
        };
        let (p, velocity) = sgd(&o, &[1.0], &[2.0], &[4.0], 0.5);
        assert_eq!((p, velocity), (vec![-1.0], vec![4.0]));
    }

    #[test]
    fn a_factor_that_is_not_finite_changes_nothing() {
        let a = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.5,
            step: 1,
        };
        let s = Sgd {
            lr: 0.5,
            momentum: 0.5,
            weight_decay: 1.0,
        };
        for factor in [f64::NAN, f64::INFINITY, clip(f64::INFINITY, 1.0)] {
            let (p, m, v) = adamw(&a, &[1.0], [&[2.0], &[3.0]], &[f64::NAN], factor);
            assert_eq!((p[0], m[0], v[0]), (1.0, 2.0, 3.0));
            let (p, velocity) = sgd(&s, &[1.0], &[2.0], &[f64::NAN], factor);
            assert_eq!((p[0], velocity[0]), (1.0, 2.0));
        }
    }

    #[test]
    fn clipping_brings_the_norm_down() {
        assert_eq!(global_norm(&[&[3.0], &[0.0, 4.0]]), 5.0);
        assert_eq!(clip(0.5, 1.0), 1.0);
        assert!((clip(5.0, 1.0) * 5.0 - 1.0).abs() <= 1e-6);
        assert!(clip(f64::NAN, 1.0).is_nan());
    }
}
