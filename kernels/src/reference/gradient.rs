//! Holds a backward to its forward by central differences.

use super::matmul::dot;
use super::tolerance::gamma;
use crate::random::Stream;

/// The step. Differences at h, 2h and 4h leave an error of order h^4 (about 1e-11) and 2^-53 / h (about 1e-13) of rounding.
const H: f64 = 1.0 / 512.0;

/// `n` numbers, normal with mean 0 and variance 1, the same ones for one `name`.
pub fn normals(name: &str, n: usize) -> Vec<f64> {
    let stream = Stream::new(0, name);
    (0..n as u64).map(|i| stream.normal(i).into()).collect()
}

/// Panics unless `backward(inputs, dy)` gives the derivatives of `L = sum of dy forward(inputs)` by each input, for a random
/// `dy`, along one random direction per input.
///
/// The bound is what `slope` says of its own error, and rounding: with N roundings in the longest chain of L and terms
/// whose sizes add up to S, L is off by `gamma(N, 2^-53) S`, which the differences multiply by `1.5 / h`. A bound so large that
/// a gradient could hide in it fails too. Inputs should be of size 1, and no kink may lie within 1/128 of them.
pub fn assert_gradient(
    what: &str,
    inputs: &[Vec<f64>],
    forward: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    backward: impl Fn(&[Vec<f64>], &[f64]) -> Vec<Vec<f64>>,
) {
    let y = forward(inputs);
    let dy = normals("dy", y.len());
    let gradients = backward(inputs, &dy);
    assert_eq!(
        gradients.len(),
        inputs.len(),
        "{what}: a gradient per input"
    );
    // Terms inside the op are about as large as its output, or as its inputs, which are of size 1.
    let size: f64 = dy
        .iter()
        .zip(&y)
        .map(|(dy, y)| dy.abs() * (1.0 + y.abs()))
        .sum();
    // 100: the roundings within one element of the small ops that the tests choose.
    let rounding = 1.5 / H * gamma(y.len() + 100, f64::EPSILON / 2.0) * size;
    for (i, gradient) in gradients.iter().enumerate() {
        let u = direction(&format!("{what} {i}"), inputs[i].len());
        let (want, truncation) = slope(|step| {
            let mut moved = inputs.to_vec();
            moved[i]
                .iter_mut()
                .zip(&u)
                .for_each(|(x, u)| *x += step * u);
            dot(&dy, &forward(&moved))
        });
        let got = dot(gradient, &u);
        let (error, bound) = ((got - want).abs(), truncation + rounding);
        assert!(
            error <= bound,
            "{what}: by input {i} the gradient says {got:e}, differences {want:e}, off by {error:e} > {bound:e}"
        );
        let shown = size + gradient.iter().map(|g| g.abs()).sum::<f64>();
        assert!(
            bound <= 1e-6 * shown,
            "{what}: bound {bound:e} hides gradient {i}"
        );
    }
}

/// The derivative of `f` at 0, and how far it may be off: `D(h) = (f(h) - f(-h)) / 2h`, `R(h) = (4 D(h) - D(2h)) / 3`
/// (Richardson 1911). R's error falls 16-fold as h halves, so `|R(2h) - R(h)|` is 15 times it.
fn slope(f: impl Fn(f64) -> f64) -> (f64, f64) {
    let difference = |h: f64| (f(h) - f(-h)) / (2.0 * h);
    let extrapolated = |h: f64| (4.0 * difference(h) - difference(2.0 * h)) / 3.0;
    let found = extrapolated(H);
    (found, (extrapolated(2.0 * H) - found).abs())
}

/// `n` numbers with random signs and sizes between 1/2 and 1.
fn direction(name: &str, n: usize) -> Vec<f64> {
    let stream = Stream::new(1, name);
    let number = |i| {
        let x = 2.0 * f64::from(stream.uniform(i)) - 1.0;
        x.signum() * (1.0 + x.abs()) / 2.0
    };
    (0..n as u64).map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks `y = x^3` against a slope of `3 x^2` that is off by `relative` in its last element.
    fn cube(relative: f64) {
        assert_gradient(
            "cube",
            &[normals("x", 10)],
            |x| x[0].iter().map(|x| x.powi(3)).collect(),
            |x, dy| {
                let mut dx: Vec<f64> = (0..10).map(|i| dy[i] * 3.0 * x[0][i].powi(2)).collect();
                dx[9] *= 1.0 + relative;
                vec![dx]
            },
        );
    }

    #[test]
    fn the_right_gradient_passes() {
        cube(0.0);
    }

    #[test]
    #[should_panic(expected = "off by")]
    fn one_element_slightly_off_fails() {
        cube(1e-7);
    }

    #[test]
    #[should_panic(expected = "off by")]
    fn nan_fails() {
        cube(f64::NAN);
    }
}
