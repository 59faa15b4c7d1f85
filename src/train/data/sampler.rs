//! The next token, drawn from logits.

use crate::error::{Error, ErrorKind, Result};
use crate::random::Stream;

/// Draws tokens from logits: token `i` with probability proportional to `exp(logit_i / temperature)`, among the `top_k`
/// largest logits if that is given.
///
/// The draw at a position depends on seed, position and logits only, so that a text is sampled alike on every mesh.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    temperature: f64,
    top_k: Option<usize>,
    stream: Stream,
}

impl Sampler {
    /// A sampler under `seed`. Temperature 0 takes the largest logit. An error for a temperature that is negative or not
    /// finite, and for a `top_k` of 0.
    pub fn new(seed: u64, temperature: f64, top_k: Option<usize>) -> Result<Self> {
        if !temperature.is_finite() || temperature < 0.0 {
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "the temperature is {temperature}; it must be a number from 0 up (1 samples what the model says, 0 takes the likeliest token)"
                ),
            ));
        }
        if top_k == Some(0) {
            return Err(Error::new(
                ErrorKind::Input,
                "sampling among the 0 likeliest tokens leaves none; take at least 1",
            ));
        }
        Ok(Sampler {
            temperature,
            top_k,
            stream: Stream::new(seed, "sample"),
        })
    }

    /// The token at `position` of the sampled text, from `logits` \[v\]. Several texts at once draw from disjoint positions.
    ///
    /// Among equal logits the lowest token number goes first. `-inf` excludes a token. Logits that are NaN or +inf, or all
    /// excluded, are an error ([`ErrorKind::NotFinite`]). Panics without logits.
    pub fn draw(&self, position: u64, logits: &[f32]) -> Result<u32> {
        assert!(!logits.is_empty(), "no logits to draw a token from");
        let bad = |&x: &f32| x.is_nan() || x == f32::INFINITY;
        if let Some(token) = logits.iter().position(bad) {
            return Err(Error::new(
                ErrorKind::NotFinite,
                format!(
                    "the logit of token {token} at position {position} is {}; the weights are of no use",
                    logits[token]
                ),
            ));
        }
        let candidates = self.candidates(logits);
        let best = candidates.iter().map(|&i| logits[i as usize]);
        let best = best.fold(f32::NEG_INFINITY, f32::max) as f64;
        if best == f64::NEG_INFINITY {
            return Err(Error::new(
                ErrorKind::NotFinite,
                format!(
                    "all {} logits at position {position} are -inf",
                    logits.len()
                ),
            ));
        }
        let logit = |i: u32| logits[i as usize] as f64;
        if self.temperature == 0.0 {
            let first = candidates.iter().find(|&&i| logit(i) == best);
            return Ok(*first.expect("the maximum is one of its candidates"));
        }
        let weight = |i: u32| ((logit(i) - best) / self.temperature).exp();
        let total: f64 = candidates.iter().map(|&i| weight(i)).sum();
        let mut left = self.uniform(position) * total;
        let mut chosen = None;
        for &i in &candidates {
            let w = weight(i);
            if w > 0.0 {
                // Rounding can leave a rest after the last token: the last possible one takes it.
                chosen = Some(i);
                if left < w {
                    break;
                }
                left -= w;
            }
        }
        Ok(chosen.expect("the largest logit has weight 1"))
    }

    /// The tokens to choose among, ascending.
    fn candidates(&self, logits: &[f32]) -> Vec<u32> {
        let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
        if let Some(k) = self.top_k
            && k < tokens.len()
        {
            let logit = |i: u32| logits[i as usize];
            tokens.select_nth_unstable_by(k, |&a, &b| {
                let order = logit(b).partial_cmp(&logit(a));
                order.expect("NaN was refused").then(a.cmp(&b))
            });
            tokens.truncate(k);
            tokens.sort_unstable();
        }
        tokens
    }

    /// Uniform on [0, 1) in steps of 2^-53.
    fn uniform(&self, position: u64) -> f64 {
        let w = self.stream.words(position);
        let wide = (w[0] as u64) << 32 | w[1] as u64;
        (wide >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampler: Sampler, logits: &[f32], n: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..n {
            counts[sampler.draw(position, logits).unwrap() as usize] += 1.0;
        }
        counts
    }

    #[test]
    fn frequencies_are_the_softmax_at_the_temperature() {
        let logits = [1.0f32, -0.5, f32::NEG_INFINITY, 0.3];
        let n = 20_000;
        for temperature in [0.5, 1.0, 2.0] {
            let counts = counts(Sampler::new(1, temperature, None).unwrap(), &logits, n);
            let weights = logits.map(|x| (x as f64 / temperature).exp());
            let total: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let p = weight / total;
                // Five standard deviations of a binomial count.
                let bound = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
                let error = (count - n as f64 * p).abs();
                assert!(error <= bound, "{counts:?} at {temperature}");
            }
        }
    }

    #[test]
    fn top_k_takes_exactly_k_and_ties_go_to_the_lower_token() {
        let logits = [0.0, 1.0, 1.0, 1.0, -1.0];
        let sampler = Sampler::new(2, 1.0, Some(2)).unwrap();
        let counts = counts(sampler, &logits, 500);
        assert!(counts[1] > 0.0 && counts[2] > 0.0, "{counts:?}");
        assert_eq!(counts[1] + counts[2], 500.0);
        // More than there are: all of them.
        let all = Sampler::new(2, 1.0, Some(99)).unwrap();
        let none = Sampler::new(2, 1.0, None).unwrap();
        assert!((0..100).all(|p| all.draw(p, &logits).unwrap() == none.draw(p, &logits).unwrap()));
    }

    #[test]
    fn temperature_zero_takes_the_first_largest() {
        let sampler = Sampler::new(3, 0.0, None).unwrap();
        assert_eq!(sampler.draw(9, &[0.0, 2.0, 2.0]).unwrap(), 1);
        // A temperature so small that every weight but the best is 0.
        let cold = Sampler::new(3, 1e-300, None).unwrap();
        assert_eq!(cold.draw(9, &[0.0, 1.0, 2.0]).unwrap(), 2);
    }

    #[test]
    fn draws_repeat_and_differ_by_seed() {
        let text = |seed| {
            let sampler = Sampler::new(seed, 1.0, None).unwrap();
            (0..20).map(move |p| sampler.draw(p, &[0.0; 16]).unwrap())
        };
        assert!(text(1).eq(text(1)));
        assert!(text(1).ne(text(2)));
    }

    #[test]
    fn bad_logits_and_settings_are_sentences() {
        let sampler = Sampler::new(0, 1.0, Some(1)).unwrap();
        for (logits, words) in [
            (vec![0.0, f32::NAN], "logit of token 1 at position 7 is NaN"),
            (vec![f32::INFINITY], "logit of token 0 at position 7 is inf"),
            (
                vec![f32::NEG_INFINITY; 3],
                "all 3 logits at position 7 are -inf",
            ),
        ] {
            let error = sampler.draw(7, &logits).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFinite);
            assert!(error.to_string().contains(words), "{error}");
        }
        let wrong = |t, k| Sampler::new(0, t, k).unwrap_err().to_string();
        assert!(wrong(-1.0, None).contains("temperature is -1"));
        assert!(wrong(f64::NAN, None).contains("temperature is NaN"));
        assert!(wrong(1.0, Some(0)).contains("at least 1"));
    }
}
