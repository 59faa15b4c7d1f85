//! What a mixture of experts is made of.

use super::config::nearest_divisor;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use serde::{Deserialize, Serialize};

/// Experts in place of one feed-forward part. An expert is a feed-forward part of its own width and without biases; a router
/// sends each token to a few of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mixture {
    /// Experts, e.
    #[serde(alias = "n_routed_experts", alias = "num_local_experts")]
    pub experts: usize,
    /// Experts of each token, k.
    #[serde(alias = "num_experts_per_tok")]
    pub experts_per_token: usize,
    /// Experts that every token goes to, as one feed-forward part of so many times the width.
    #[serde(default, alias = "n_shared_experts")]
    pub shared_experts: usize,
    /// Width of an expert.
    #[serde(alias = "moe_intermediate_size")]
    pub expert_ffn: usize,
    /// Blocks, from the first on, that keep an ordinary feed-forward part.
    #[serde(default, alias = "first_k_dense_replace")]
    pub dense_layers: usize,
    /// How many times its fair share of a sequence's assignments an expert takes; what comes beyond is dropped. If none,
    /// nothing is dropped: an expert has a slot for every token.
    #[serde(default)]
    pub capacity_factor: Option<f32>,
    /// What becomes of the router's logits.
    #[serde(default, alias = "scoring_func")]
    pub score: Score,
    /// Whether a token's weights are divided by their sum. With one expert per token that would leave nothing to learn.
    #[serde(default, alias = "norm_topk_prob")]
    pub normalize: bool,
    /// What a token's weights are multiplied by.
    #[serde(default = "one", alias = "routed_scaling_factor")]
    pub scale: f32,
    /// What keeps loads even.
    #[serde(default)]
    pub balance: Balance,
    /// Standard deviation of the router's first weights.
    #[serde(default = "router_init", alias = "initializer_range")]
    pub router_init: f32,
}

fn router_init() -> f32 {
    0.02
}

fn one() -> f32 {
    1.0
}

/// What becomes of the router's logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// Probabilities over all experts (Shazeer et al. 2017).
    #[default]
    Softmax,
    /// Each expert by itself (DeepSeek-V3).
    Sigmoid,
}

/// What keeps the experts' loads even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balance {
    /// Nothing.
    #[default]
    Nothing,
    /// A loss beside the model's, each sequence's by itself: see [`BalanceLoss`](crate::ops::BalanceLoss). Its mean over
    /// sequences, summed over blocks, counts `weight` times in the gradient and not at all in the reported loss.
    Auxiliary {
        /// The weight; Switch takes 0.01.
        weight: f32,
    },
    /// A bias of the choice that moves between steps: see [`BalanceBias`](crate::ops::BalanceBias).
    Bias {
        /// How far in each step; DeepSeek-V3 takes 0.001.
        rate: f32,
    },
}

impl Mixture {
    /// A mixture of `experts` experts of width `expert_ffn`, of which each token takes `experts_per_token`: softmax scores
    /// that are divided by their sum (but for one expert per token), 1.25 times the fair share as capacity, and Switch's
    /// auxiliary loss.
    pub fn new(experts: usize, experts_per_token: usize, expert_ffn: usize) -> Self {
        Mixture {
            experts,
            experts_per_token,
            shared_experts: 0,
            expert_ffn,
            dense_layers: 0,
            capacity_factor: Some(1.25),
            score: Score::Softmax,
            normalize: experts_per_token > 1,
            scale: 1.0,
            balance: Balance::Auxiliary { weight: 0.01 },
            router_init: router_init(),
        }
    }

    /// Slots of an expert in a sequence of `tokens` tokens: `ceil(factor tokens k / e)`, at least 1 and at most one for every
    /// token, for a token names an expert once.
    pub fn capacity(&self, tokens: usize) -> usize {
        let Some(factor) = self.capacity_factor else {
            return tokens.max(1);
        };
        let fair = (tokens * self.experts_per_token) as f64 / self.experts as f64;
        let slots = (f64::from(factor) * fair).ceil() as usize;
        slots.min(tokens).max(1)
    }

    /// Parameters of one block's mixture over a residual stream of width c whose experts hold `matrices` matrices each.
    pub(super) fn parameters(&self, c: usize, matrices: usize) -> usize {
        let bias = match self.balance {
            Balance::Bias { .. } => self.experts,
            _ => 0,
        };
        let each = matrices * c * self.expert_ffn;
        c * self.experts + bias + (self.experts + self.shared_experts) * each
    }

    /// Checks the numbers against each other and against a mesh, for a model of `layers` blocks.
    pub(super) fn check(&self, layers: usize, mesh: &Mesh) -> Result<()> {
        let input = |why: String| Err(Error::new(ErrorKind::Input, why));
        let (e, k) = (self.experts, self.experts_per_token);
        if e == 0 || self.expert_ffn == 0 {
            return input(format!(
                "a mixture of {e} experts of width {}; both are at least 1",
                self.expert_ffn
            ));
        }
        if k == 0 || k > e {
            return input(format!(
                "{k} experts per token of {e} experts; from 1 to {e} work"
            ));
        }
        if self.dense_layers >= layers {
            return input(format!(
                "{} dense layers of {layers} leave no layer for the experts; at most {} do",
                self.dense_layers,
                layers.saturating_sub(1)
            ));
        }
        if self
            .capacity_factor
            .is_some_and(|f| !(f > 0.0 && f.is_finite()))
        {
            return input(format!(
                "capacity factor {}; above 0, or none for a slot for every token",
                self.capacity_factor.unwrap_or_default()
            ));
        }
        if !(self.scale.is_finite() && self.scale != 0.0) {
            return input(format!("weights scaled by {}; 1 leaves them", self.scale));
        }
        if self.normalize && k == 1 {
            return input(
                "one expert per token whose weight is divided by itself is always 1, and the router learns nothing; do not \
                 normalize, or take 2 experts per token"
                    .into(),
            );
        }
        let refuse = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        let (ep, tp) = (mesh.size_of("ep"), mesh.size_of("tp"));
        if !e.is_multiple_of(ep) {
            return refuse(format!(
                "mesh axis ep={ep} does not divide {e} experts; ep={} does, or {} experts",
                nearest_divisor(e, ep),
                e.next_multiple_of(ep)
            ));
        }
        if !self.expert_ffn.is_multiple_of(tp) {
            return refuse(format!(
                "mesh axis tp={tp} does not divide an expert's width of {}; tp={} does",
                self.expert_ffn,
                nearest_divisor(self.expert_ffn, tp)
            ));
        }
        Ok(())
    }
}
