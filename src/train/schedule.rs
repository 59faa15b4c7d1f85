//! The learning rate of each step: constant, or warm-up and cosine.

use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Which learning rate a step takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "schedule", rename_all = "lowercase", deny_unknown_fields)]
pub enum LearningRate {
    /// The same in every step.
    Constant {
        /// The learning rate.
        lr: f64,
    },
    /// Linear warm-up, then half a cosine from `lr` down to `min_lr`, then `min_lr` (Loshchilov and Hutter, "SGDR", 2017,
    /// without restarts, with nanoGPT's counting). With `min_lr` equal to `lr` it is a warm-up to a constant.
    Cosine {
        /// The highest learning rate, reached at step `warmup`.
        lr: f64,
        /// The learning rate from step `decay` on.
        min_lr: f64,
        /// Steps of warm-up.
        warmup: u64,
        /// The step, counted from 0 and warm-up included, at which `min_lr` is reached.
        decay: u64,
    },
}

impl LearningRate {
    /// The learning rate of `step`, counted from 0:
    ///
    /// ```text
    /// lr (step + 1) / (warmup + 1)                              step < warmup
    /// min_lr + (lr - min_lr) (1 + cos(pi r)) / 2                warmup <= step < decay,
    ///                                 r = (step - warmup) / (decay - warmup)
    /// min_lr                                                    step >= decay
    /// ```
    pub fn at(&self, step: u64) -> f64 {
        match *self {
            LearningRate::Constant { lr } => lr,
            LearningRate::Cosine { lr, warmup, .. } if step < warmup => {
                lr * (step + 1) as f64 / (warmup + 1) as f64
            }
            LearningRate::Cosine { min_lr, decay, .. } if step >= decay => min_lr,
            LearningRate::Cosine {
                lr,
                min_lr,
                warmup,
                decay,
            } => {
                let ratio = (step - warmup) as f64 / (decay - warmup) as f64;
                min_lr + 0.5 * (1.0 + (PI * ratio).cos()) * (lr - min_lr)
            }
        }
    }

    /// An error if a rate is negative or not finite, `min_lr` is above `lr`, or the decay ends before the warm-up does.
    pub fn check(&self) -> Result<()> {
        let wrong = |sentence: String| Err(Error::new(ErrorKind::Input, sentence));
        let (lr, min_lr) = match *self {
            LearningRate::Constant { lr } => (lr, lr),
            LearningRate::Cosine { lr, min_lr, .. } => (lr, min_lr),
        };
        for (name, rate) in [
            ("learning rate", lr),
            ("learning rate after the decay", min_lr),
        ] {
            if !rate.is_finite() || rate < 0.0 {
                return wrong(format!(
                    "the {name} is {rate}; it must be a number from 0 up"
                ));
            }
        }
        if min_lr > lr {
            return wrong(format!(
                "the learning rate after the decay, {min_lr}, is above the highest, {lr}; swap or lower it"
            ));
        }
        match *self {
            LearningRate::Cosine { warmup, decay, .. } if decay < warmup => wrong(format!(
                "the learning rate's decay ends at step {decay}, before its warm-up of {warmup} steps; shorten the warm-up or lengthen the decay"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NANOGPT_CPU: LearningRate = LearningRate::Cosine {
        lr: 1e-3,
        min_lr: 1e-4,
        warmup: 100,
        decay: 2000,
    };

    #[test]
    fn warm_up_is_linear_and_starts_above_zero() {
        assert_eq!(NANOGPT_CPU.at(0), 1e-3 / 101.0);
        assert_eq!(NANOGPT_CPU.at(99), 1e-3 * 100.0 / 101.0);
        assert_eq!(NANOGPT_CPU.at(100), 1e-3);
    }

    #[test]
    fn cosine_passes_its_middle_and_ends_at_the_minimum() {
        let middle = NANOGPT_CPU.at(1050);
        assert!((middle - 5.5e-4).abs() <= 1e-18, "{middle}");
        // A quarter of the way: min + (lr - min) (1 + sqrt(1/2)) / 2.
        let quarter = NANOGPT_CPU.at(575);
        let expected = 1e-4 + 9e-4 * (1.0 + 0.5f64.sqrt()) / 2.0;
        assert!((quarter - expected).abs() <= 1e-18, "{quarter} {expected}");
        assert!(NANOGPT_CPU.at(1999) > 1e-4);
        assert_eq!(NANOGPT_CPU.at(2000), 1e-4);
        assert_eq!(NANOGPT_CPU.at(u64::MAX), 1e-4);
    }

    #[test]
    fn it_never_rises_after_the_warm_up() {
        assert!((100..2100).all(|s| NANOGPT_CPU.at(s + 1) <= NANOGPT_CPU.at(s)));
    }

    #[test]
    fn edges_without_warm_up_or_without_decay() {
        let at_once = LearningRate::Cosine {
            lr: 2.0,
            min_lr: 1.0,
            warmup: 0,
            decay: 2,
        };
        assert_eq!([0, 1, 2, 3].map(|s| at_once.at(s)), [2.0, 1.5, 1.0, 1.0]);
        let drop = LearningRate::Cosine {
            lr: 2.0,
            min_lr: 1.0,
            warmup: 3,
            decay: 3,
        };
        assert_eq!([0, 2, 3].map(|s| drop.at(s)), [0.5, 1.5, 1.0]);
        let constant = LearningRate::Constant { lr: 0.5 };
        assert_eq!([0, 7, u64::MAX].map(|s| constant.at(s)), [0.5; 3]);
    }

    #[test]
    fn wrong_settings_are_sentences() {
        let sentence = |l: LearningRate| l.check().unwrap_err().to_string();
        assert!(sentence(LearningRate::Constant { lr: f64::NAN }).contains("is NaN"));
        assert!(sentence(LearningRate::Constant { lr: -1.0 }).contains("is -1"));
        let cosine = |lr, min_lr, warmup, decay| LearningRate::Cosine {
            lr,
            min_lr,
            warmup,
            decay,
        };
        let low = sentence(cosine(1.0, 2.0, 0, 1));
        assert!(low.contains("2, is above the highest, 1"), "{low}");
        let short = sentence(cosine(1.0, 0.5, 10, 9));
        assert!(
            short.contains("step 9") && short.contains("10 steps"),
            "{short}"
        );
        assert!(NANOGPT_CPU.check().is_ok());
    }

    #[test]
    fn json_round_trip() {
        let text = serde_json::to_string(&NANOGPT_CPU).unwrap();
        assert_eq!(
            serde_json::from_str::<LearningRate>(&text).unwrap(),
            NANOGPT_CPU
        );
    }
}
