//! AdamW over sharded parameters, with clipping by the global norm.
//!
//! Gradients are reduced once per parameter, then the norm is one scalar on the device: no program branches on it. If it
//! is not finite, every parameter and all state keep their values. Decay is decoupled and applies to matrices only
//! (Loshchilov and Hutter, arXiv:1711.05101; clipping: Pascanu et al., arXiv:1211.5063).

use super::stages::Stages;
use crate::ops::{self, ClipFactor, SumOfSquares};
use crate::placement::Placements;
use crate::spmd::{Chip, Sharded};
use crate::tensor::Tensor;
use crate::trace::Phase;
use serde::{Deserialize, Serialize};

/// AdamW's constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squared gradients.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Largest global gradient norm; none to leave gradients as they are.
    pub clip: Option<f32>,
}

impl Default for AdamW {
    /// GPT-3's and nanoGPT's choice: betas 0.9 and 0.95, decay 0.1, clipping at 1.
    fn default() -> Self {
        AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: Some(1.0),
        }
    }
}

/// AdamW on one chip. Its state is two tensors in f32 beside each parameter.
#[derive(Debug)]
pub struct Optimizer {
    options: AdamW,
    steps: u64,
}

/// The names of a parameter's state: mean of gradients, mean of their squares.
const STATE: [&str; 2] = ["adamw.m", "adamw.v"];

impl Optimizer {
    /// An optimizer that has done `steps` steps: 0, or what a checkpoint says.
    pub fn new(options: AdamW, steps: u64) -> Self {
        Optimizer { options, steps }
    }

    /// Makes room for the state of every parameter now and as further ones are first used, instead of at the first update:
    /// the first step then takes as much memory as every later one.
    pub fn prepare(&self, chip: &Chip) {
        chip.keep_state(&STATE);
    }

    /// The name in a checkpoint of each of a parameter's state tensors.
    pub fn state_names(parameter: &str) -> [String; 2] {
        STATE.map(|name| format!("{name}/{parameter}"))
    }

    /// Updates every parameter that has a gradient, and returns the global gradient norm before clipping, `[1]`.
    #[track_caller]
    pub fn step(&mut self, chip: &Chip, lr: f64) -> Sharded {
        self.step_over(chip, lr, None)
    }

    /// As [`Optimizer::step`], where parameters are spread over the stages of a pipeline.
    #[track_caller]
    pub(super) fn step_over(&mut self, chip: &Chip, lr: f64, stages: Option<&Stages>) -> Sharded {
        chip.phase(Phase::Update, || {
            self.steps += 1;
            self.prepare(chip);
            let mut gradients = chip.take_gradients();
            if let Some(stages) = stages {
                stages.add_shared(chip, &mut gradients);
            }
            let (factor, norm) = self.clip_factor(chip, &gradients, stages);
            for (index, gradient) in gradients {
                self.update(chip, index, gradient, lr, &factor);
            }
            norm
        })
    }

    /// The factor that clips, and the norm: the squares of shares are summed per placement and reduced once for each.
    fn clip_factor(
        &self,
        chip: &Chip,
        gradients: &[(usize, Sharded)],
        stages: Option<&Stages>,
    ) -> (Sharded, Sharded) {
        let mut sums: Vec<(Placements, Sharded)> = Vec::new();
        let counts = |index: usize| stages.is_none_or(|s| !s.counted_elsewhere(chip, index));
        for (_, gradient) in gradients.iter().filter(|(index, _)| counts(*index)) {
            let square = chip.apply_one(SumOfSquares, &[gradient]);
            match sums.iter_mut().find(|(p, _)| p == square.placements()) {
                Some((_, sum)) => *sum = sum.add(&square),
                None => sums.push((square.placements().clone(), square)),
            }
        }
        let total = sums
            .iter()
            .map(|(_, sum)| sum.gather())
            .reduce(|a, b| a.add(&b));
        let total = total.expect("an optimizer has parameters with gradients to update");
        let total = match stages {
            Some(stages) => stages.summed(chip, total),
            None => total,
        };
        let max_norm = self.options.clip.unwrap_or(f32::INFINITY);
        let mut both = chip.apply(ClipFactor { max_norm }, &[&total]);
        let norm = both.swap_remove(1);
        (both.swap_remove(0), norm)
    }

    fn update(&self, chip: &Chip, index: usize, gradient: Sharded, lr: f64, factor: &Sharded) {
        let all = chip.parameters();
        let p = &all[index];
        let rule = ops::AdamW {
            lr: lr as f32,
            beta1: self.options.beta1,
            beta2: self.options.beta2,
            eps: self.options.eps,
            weight_decay: if p.is_matrix() {
                self.options.weight_decay
            } else {
                0.0
            },
            step: self.steps,
        };
        // The update is of the piece that has a gradient here, f32 as the gradient is.
        let cost = rule.cost(gradient.tensor().ty(), gradient.tensor().ty());
        let name = p.name.clone();
        drop(all);
        let factor = factor.tensor();
        let update = |value: &mut Tensor, state: &mut [Tensor]| {
            let [m, v] = state else {
                panic!(
                    "parameter '{name}' has {} state tensors, AdamW keeps 2",
                    state.len()
                )
            };
            chip.change("adamw", &[&gradient], cost, || {
                rule.update(value, m, v, gradient.tensor(), Some(factor));
            });
        };
        chip.scope(&name, || chip.change_kept(index, update));
    }
}
