//! Functions of one element at a time.

use super::special::erfc;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016, the approximation in GPT-2).
    GeluTanh,
    /// `x/2 (1 + erf(x / sqrt(2)))` (Hendrycks and Gimpel 2016).
    GeluErf,
    /// `max(x, 0)^2` (So et al. 2021, "Primer").
    Relu2,
    /// `x sigmoid(x)` (Hendrycks and Gimpel 2016; Elfwing et al. 2017).
    Silu,
}

impl Activation {
    /// All of them, for tables of tests.
    pub const ALL: [Activation; 4] = [
        Activation::GeluTanh,
        Activation::GeluErf,
        Activation::Relu2,
        Activation::Silu,
    ];

    /// The function at `x`.
    pub fn at(self, x: f64) -> f64 {
        match self {
            // (1 + tanh(u)) / 2 = sigmoid(2u) and (1 + erf(x)) / 2 = erfc(-x) / 2: no cancellation in the left tail.
            Activation::GeluTanh => x * sigmoid(2.0 * inner(x)),
            Activation::GeluErf => x * 0.5 * erfc(-x * FRAC_1_SQRT_2),
            Activation::Relu2 => x * x * above_zero(x),
            Activation::Silu => x * sigmoid(x),
        }
    }

    /// Its derivative at `x`.
    pub fn slope(self, x: f64) -> f64 {
        match self {
            // y = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
            Activation::GeluTanh => {
                let (u, du) = (inner(x), FRAC_2_PI.sqrt() * (1.0 + 3.0 * 0.044715 * x * x));
                sigmoid(2.0 * u) + x * sigmoid(2.0 * u) * sigmoid(-2.0 * u) * 2.0 * du
            }
            // y = x erfc(-x / sqrt(2)) / 2
            Activation::GeluErf => {
                0.5 * erfc(-x * FRAC_1_SQRT_2) + x * (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
            }
            // y = max(x, 0)^2
            Activation::Relu2 => 2.0 * x * above_zero(x),
            // y = x sigmoid(x)
            Activation::Silu => sigmoid(x) + x * sigmoid(x) * sigmoid(-x),
        }
    }
}

/// `1 / (1 + exp(-x))`.
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `sqrt(2/pi) (x + 0.044715 x^3)`.
fn inner(x: f64) -> f64 {
    FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x)
}

/// 1 above zero, 0 elsewhere.
fn above_zero(x: f64) -> f64 {
    f64::from(u8::from(x > 0.0))
}

/// `y = f(x)`.
pub fn activation(f: Activation, x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| f.at(x)).collect()
}

/// `dx = dy f'(x)`.
pub fn activation_backward(f: Activation, x: &[f64], dy: &[f64]) -> Vec<f64> {
    // y = f(x)
    zip(x, dy, |x, dy| dy * f.slope(x))
}

/// `y = silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer").
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    zip(gate, up, |g, u| Activation::Silu.at(g) * u)
}

/// `[dgate, dup]` of [`swiglu`].
pub fn swiglu_backward(gate: &[f64], up: &[f64], dy: &[f64]) -> [Vec<f64>; 2] {
    // y = silu(gate) * up
    let dgate = multiply(&activation_backward(Activation::Silu, gate, dy), up);
    let dup = multiply(&activation(Activation::Silu, gate), dy);
    [dgate, dup]
}

/// `y = a + b`. Its backward hands `dy` to both.
pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    zip(a, b, |a, b| a + b)
}

/// `y = a b`, element by element.
pub fn multiply(a: &[f64], b: &[f64]) -> Vec<f64> {
    zip(a, b, |a, b| a * b)
}

/// `[da, db]` of [`multiply`].
pub fn multiply_backward(a: &[f64], b: &[f64], dy: &[f64]) -> [Vec<f64>; 2] {
    // y = a b
    [multiply(dy, b), multiply(dy, a)]
}

/// `y = s x`. Its backward is `scale(s, dy)`.
pub fn scale(s: f64, x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| s * x).collect()
}

/// `y = x / (1 - p)` where `keep` is true, 0 elsewhere (Srivastava et al. 2014). Its backward is the same function of `dy`.
pub fn dropout(p: f64, keep: &[bool], x: &[f64]) -> Vec<f64> {
    assert_eq!(keep.len(), x.len(), "dropout: one mask entry per element");
    let kept = x.iter().zip(keep);
    kept.map(|(x, &keep)| if keep { x / (1.0 - p) } else { 0.0 })
        .collect()
}

/// `f` of each pair.
fn zip(a: &[f64], b: &[f64], f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    assert_eq!(a.len(), b.len(), "both sides have one length");
    a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    #[test]
    fn activations_follow_their_slopes() {
        // Squared ReLU has a jump in its second derivative at 0, where differences would not converge: stay 0.01 away,
        // which is more than the widest step.
        let x: Vec<f64> = normals("x", 64)
            .iter()
            .map(|x| x + 0.01 * x.signum())
            .collect();
        for f in Activation::ALL {
            assert_gradient(
                &format!("{f:?}"),
                std::slice::from_ref(&x),
                |x| activation(f, &x[0]),
                |x, dy| vec![activation_backward(f, &x[0], dy)],
            );
        }
    }

    #[test]
    fn products_follow_their_gradients() {
        let inputs = [normals("a", 33), normals("b", 33)];
        assert_gradient(
            "swiglu",
            &inputs,
            |x| swiglu(&x[0], &x[1]),
            |x, dy| swiglu_backward(&x[0], &x[1], dy).into(),
        );
        assert_gradient(
            "multiply",
            &inputs,
            |x| multiply(&x[0], &x[1]),
            |x, dy| multiply_backward(&x[0], &x[1], dy).into(),
        );
        assert_gradient(
            "add",
            &inputs,
            |x| add(&x[0], &x[1]),
            |_, dy| vec![dy.to_vec(), dy.to_vec()],
        );
        assert_gradient(
            "scale",
            &inputs[..1],
            |x| scale(0.3, &x[0]),
            |_, dy| vec![scale(0.3, dy)],
        );
    }

    #[test]
    fn dropout_keeps_and_rescales() {
        assert_eq!(
            dropout(0.75, &[true, false, true], &[1.0, 2.0, -3.0]),
            [4.0, 0.0, -12.0]
        );
        let keep: Vec<bool> = (0..20).map(|i| i % 3 != 0).collect();
        assert_gradient(
            "dropout",
            &[normals("x", 20)],
            |x| dropout(0.25, &keep, &x[0]),
            |_, dy| vec![dropout(0.25, &keep, dy)],
        );
    }

    #[test]
    fn tails_are_kept() {
        // gelu(-10) = -10 erfc(10 / sqrt(2)) / 2 = -10 * 7.619853024160527e-24
        let y = Activation::GeluErf.at(-10.0);
        assert!(
            (y / -7.619_853_024_160_527e-23 - 1.0).abs() <= 1e-13,
            "{y:e}"
        );
        assert_eq!(Activation::Silu.at(-800.0), 0.0);
        assert!(Activation::GeluTanh.at(-4.0) < 0.0);
        assert!(Activation::ALL.iter().all(|f| f.at(f64::NAN).is_nan()));
    }
}
