//! Rotary positions.

use std::f64::consts::TAU;

/// Which two elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryStyle {
    /// Element i with element `i + rotary_dim/2` (GPT-NeoX, Hugging Face's Llama).
    Halves,
    /// Element 2i with element 2i + 1 (Su et al. 2021; Meta's Llama).
    Pairs,
}

/// How the frequencies change to stretch the context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RotaryScaling {
    /// As they are.
    None,
    /// All divided by `factor`: positions are interpolated (Chen et al. 2023).
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// Waves longer than `original_context / low` divided by `factor`, those shorter than `original_context / high` kept, a
    /// linear blend in the number of turns per context between (Llama 3.1, 2024).
    Llama3 {
        /// How many times longer the context becomes.
        factor: f64,
        /// Turns per original context below which a frequency is divided.
        low: f64,
        /// Turns per original context above which a frequency is kept.
        high: f64,
        /// Tokens of context before stretching.
        original_context: f64,
    },
}

/// The angles per position: `f[i] = theta^(-2i / rotary_dim)`, scaled; `[rotary_dim / 2]`.
pub fn rotary_frequencies(rotary_dim: usize, theta: f64, scaling: RotaryScaling) -> Vec<f64> {
    assert!(
        rotary_dim.is_multiple_of(2),
        "rotary_dim {rotary_dim} is odd"
    );
    let scaled = |f: f64| match scaling {
        RotaryScaling::None => f,
        RotaryScaling::Linear { factor } => f / factor,
        RotaryScaling::Llama3 {
            factor,
            low,
            high,
            original_context,
        } => {
            let turns = original_context * f / TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            kept * f + (1.0 - kept) * f / factor
        }
    };
    (0..rotary_dim / 2)
        .map(|i| scaled(theta.powf(-2.0 * i as f64 / rotary_dim as f64)))
        .collect()
}

/// `(cos, sin)` of `(offset + t) f[i]`, each `[t, rotary_dim / 2]`.
pub fn rotary_table(offset: usize, tokens: usize, frequencies: &[f64]) -> (Vec<f64>, Vec<f64>) {
    (offset..offset + tokens)
        .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f))
        .map(|angle| (angle.cos(), angle.sin()))
        .unzip()
}

/// Turns each pair `(x1, x2)` of a head into `(x1 cos - x2 sin, x2 cos + x1 sin)` (Su et al. 2021). x, y `[b, t, h, d]`;
/// cos, sin `[t, rotary_dim / 2]`; elements from rotary_dim on are copied.
pub fn rotary(
    [b, t, h, d]: [usize; 4],
    x: &[f64],
    cos: &[f64],
    sin: &[f64],
    style: RotaryStyle,
) -> Vec<f64> {
    assert_eq!(x.len(), b * t * h * d, "rotary: x is [{b}, {t}, {h}, {d}]");
    assert_eq!(cos.len(), sin.len(), "rotary: cos and sin have one shape");
    let half = cos.len().checked_div(t).unwrap_or(0);
    assert!(
        2 * half <= d && half * t == cos.len(),
        "rotary: cos is [t, at most d/2]"
    );
    let mut y = x.to_vec();
    for row in 0..b * t * h {
        let token = row / h % t;
        for i in 0..half {
            let (first, second) = match style {
                RotaryStyle::Halves => (row * d + i, row * d + i + half),
                RotaryStyle::Pairs => (row * d + 2 * i, row * d + 2 * i + 1),
            };
            let (cos, sin) = (cos[token * half + i], sin[token * half + i]);
            y[first] = x[first] * cos - x[second] * sin;
            y[second] = x[second] * cos + x[first] * sin;
        }
    }
    y
}

/// `dx` of [`rotary`]: the turn backwards, because a rotation's transpose is its inverse.
pub fn rotary_backward(
    sizes: [usize; 4],
    dy: &[f64],
    cos: &[f64],
    sin: &[f64],
    style: RotaryStyle,
) -> Vec<f64> {
    let back: Vec<f64> = sin.iter().map(|s| -s).collect();
    rotary(sizes, dy, cos, &back, style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    #[test]
    fn rotary_follows_its_gradient_and_turns_back() {
        let sizes = [2, 3, 2, 8];
        let x = normals("x", 96);
        for (style, dim) in [(RotaryStyle::Halves, 8), (RotaryStyle::Pairs, 6)] {
            let (cos, sin) =
                rotary_table(5, 3, &rotary_frequencies(dim, 100.0, RotaryScaling::None));
            assert_gradient(
                &format!("{style:?}"),
                std::slice::from_ref(&x),
                |x| rotary(sizes, &x[0], &cos, &sin, style),
                |_, dy| vec![rotary_backward(sizes, dy, &cos, &sin, style)],
            );
            let there = rotary(sizes, &x, &cos, &sin, style);
            let back = rotary_backward(sizes, &there, &cos, &sin, style);
            assert!(back.iter().zip(&x).all(|(a, b)| (a - b).abs() <= 1e-14));
            let still = |i: &usize| i % 8 >= dim;
            assert!((0..96).filter(still).all(|i| there[i] == x[i]));
        }
    }

    #[test]
    fn a_quarter_turn_by_hand() {
        let x = [1., 2., 3., 4.];
        let (cos, sin) = (&[0.0, 0.0], &[1.0, 1.0]);
        let y = |style| rotary([1, 1, 1, 4], &x, cos, sin, style);
        assert_eq!(y(RotaryStyle::Halves), [-3., -4., 1., 2.]);
        assert_eq!(y(RotaryStyle::Pairs), [-2., 1., -4., 3.]);
    }

    #[test]
    fn scaling_stretches_the_long_waves() {
        let plain = rotary_frequencies(128, 500_000.0, RotaryScaling::None);
        let linear = rotary_frequencies(128, 500_000.0, RotaryScaling::Linear { factor: 4.0 });
        assert!(plain.iter().zip(&linear).all(|(p, l)| p / 4.0 == *l));
        // Llama 3.1's own numbers: waves up to 8192 / 4 tokens stay, waves from 8192 / 1 tokens on are divided by 8.
        let scaling = RotaryScaling::Llama3 {
            factor: 8.0,
            low: 1.0,
            high: 4.0,
            original_context: 8192.0,
        };
        let scaled = rotary_frequencies(128, 500_000.0, scaling);
        for (p, s) in plain.iter().zip(&scaled) {
            match TAU / p {
                wave if wave < 2048.0 => assert_eq!(s, p),
                wave if wave > 8192.0 => assert_eq!(*s, p / 8.0),
                _ => assert!(p / 8.0 < *s && s < p),
            }
        }
        assert!(
            scaled
                .iter()
                .zip(&plain)
                .any(|(s, p)| s != p && *s != p / 8.0)
        );
    }
}
