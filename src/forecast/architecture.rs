//! A transformer as the forecast sees it: sizes only, wider than what the program of this crate computes.

use crate::error::{Error, ErrorKind, Result};
use crate::model::{Config, FeedForward, Positions};

/// Latent attention (DeepSeek-V2, arXiv:2405.04434): queries, keys and values pass through narrow vectors, and the cache keeps one
/// of `kv_rank + rope` elements a token for all heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latent {
    /// Width of the queries' vector; 0 if queries are projected straight.
    pub q_rank: usize,
    /// Width of the keys' and values' vector.
    pub kv_rank: usize,
    /// Elements of a head's query and key without a position.
    pub nope: usize,
    /// Elements of them that are turned by the position; the key's are shared by all heads.
    pub rope: usize,
    /// Elements of a head's value.
    pub value: usize,
}

/// A mixture of experts in the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixture {
    /// Experts that a router chooses from.
    pub experts: usize,
    /// Experts that a token visits.
    pub per_token: usize,
    /// Experts that every token visits.
    pub shared: usize,
    /// Width of an expert.
    pub ffn: usize,
    /// Width of all shared experts together.
    pub shared_ffn: usize,
    /// Layers in front that have the dense part instead.
    pub dense_layers: usize,
    /// Of the others, one in so many is a mixture.
    pub every: usize,
    /// Groups of experts, of which a token may visit `groups_per_token`; 1 and 1 without such a limit.
    pub groups: usize,
    /// See `groups`.
    pub groups_per_token: usize,
}

/// Layers of which a query sees the latest tokens only.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Tokens that it sees.
    pub tokens: usize,
    /// Share of the layers that have it.
    pub share: f64,
}

/// A decoder-only transformer by its sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream, c.
    pub hidden: usize,
    /// Query heads, h.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head, d.
    pub head_dim: usize,
    /// Width of the dense feed-forward part.
    pub ffn: usize,
    /// Whether it is gated (three matrices for two).
    pub gated: bool,
    /// Tokens of the vocabulary, v.
    pub vocab: usize,
    /// Longest sequence, t.
    pub context: usize,
    /// Whether linear layers have biases.
    pub bias: bool,
    /// Whether the head is the embedding, transposed.
    pub tied: bool,
    /// Whether queries and keys are turned by their position; learned vectors otherwise.
    pub rotary: bool,
    /// Latent attention in place of grouped queries.
    pub latent: Option<Latent>,
    /// Experts in place of the dense feed-forward part.
    pub mixture: Option<Mixture>,
    /// Windows of attention.
    pub window: Option<Window>,
    /// Further layers that predict tokens beyond the next, each with a head of its own pass (DeepSeek-V3, arXiv:2412.19437).
    pub predicted: usize,
}

impl From<&Config> for Architecture {
    fn from(c: &Config) -> Architecture {
        Architecture {
            layers: c.layers,
            hidden: c.hidden,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim(),
            ffn: c.ffn,
            gated: c.feed_forward == FeedForward::SwiGlu,
            vocab: c.vocab,
            context: c.context,
            bias: c.bias,
            tied: c.tied,
            rotary: matches!(c.positions, Positions::Rotary { .. }),
            latent: None,
            mixture: None,
            window: None,
            predicted: 0,
        }
    }
}

/// What a layer is made of, as far as its price depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Block {
    /// Attention and a dense feed-forward part.
    Dense,
    /// Attention and a mixture of experts.
    Mixture,
    /// A layer that predicts a further token: a projection of two residual streams into one, a block, and a pass of the head.
    Predict,
}

impl Architecture {
    /// The block of layer `layer`; beyond the last one those that predict further tokens.
    pub fn block(&self, layer: usize) -> Block {
        match self.mixture {
            _ if layer >= self.layers => Block::Predict,
            Some(m) if layer >= m.dense_layers && (layer + 1).is_multiple_of(m.every) => {
                Block::Mixture
            }
            _ => Block::Dense,
        }
    }

    /// Whether a layer that predicts has experts: it is built like the last layer.
    pub fn has_experts(&self, block: Block) -> bool {
        match block {
            Block::Dense => false,
            Block::Mixture => true,
            Block::Predict => self.mixture.is_some(),
        }
    }

    fn gates(&self) -> usize {
        if self.gated { 3 } else { 2 }
    }

    /// Elements of all heads' queries, of all keys and values, and of all heads' outputs, for one token.
    pub fn widths(&self) -> (usize, usize, usize) {
        match self.latent {
            Some(l) => (
                self.heads * (l.nope + l.rope),
                self.heads * (l.nope + l.rope + l.value),
                self.heads * l.value,
            ),
            None => (
                self.heads * self.head_dim,
                2 * self.kv_heads * self.head_dim,
                self.heads * self.head_dim,
            ),
        }
    }

    /// Elements that a token leaves in a layer's cache: keys and values, or their latent vector.
    pub fn cache_width(&self) -> usize {
        match self.latent {
            Some(l) => l.kv_rank + l.rope,
            None => 2 * self.kv_heads * self.head_dim,
        }
    }

    /// Elements of a query and key, and of a value: what a score and its use cost.
    pub fn score_width(&self) -> (usize, usize) {
        match self.latent {
            Some(l) => (l.nope + l.rope, l.value),
            None => (self.head_dim, self.head_dim),
        }
    }

    /// Parameters of a layer's attention: those that `tp` splits, and those that it does not.
    pub fn attention_parameters(&self) -> (f64, f64) {
        let c = self.hidden;
        let (q, kv, o) = self.widths();
        let bias = self.bias as usize * (q + kv + c);
        match self.latent {
            Some(l) => {
                let straight = if l.q_rank == 0 { c * q } else { l.q_rank * q };
                let up = straight + l.kv_rank * self.heads * (l.nope + l.value) + o * c;
                (up as f64, (c * (l.q_rank + l.kv_rank + l.rope)) as f64)
            }
            None => ((c * (q + kv) + o * c + bias) as f64, 0.0),
        }
    }

    /// Parameters of a layer: (split over `tp`, split over `tp` and `ep`, not split).
    pub fn block_parameters(&self, block: Block) -> [f64; 3] {
        let c = self.hidden as f64;
        let (split, whole) = self.attention_parameters();
        let norms = 2.0 * c * (1 + self.bias as usize) as f64;
        let join = if block == Block::Predict {
            2.0 * c * c
        } else {
            0.0
        };
        let whole = whole + norms;
        let gates = self.gates() as f64;
        match self.mixture {
            Some(m) if self.has_experts(block) => {
                let expert = gates * c * m.ffn as f64;
                let shared = gates * c * m.shared_ffn as f64;
                let router = c * m.experts as f64;
                [
                    split + shared + join,
                    expert * m.experts as f64,
                    whole + router,
                ]
            }
            _ => {
                let bias = self.bias as usize * (self.ffn + self.hidden);
                [
                    split + gates * c * self.ffn as f64 + bias as f64 + join,
                    0.0,
                    whole,
                ]
            }
        }
    }

    /// Parameters of the embedding, or of a head of its own.
    pub fn embedding_parameters(&self) -> f64 {
        (self.vocab * self.hidden) as f64
    }

    /// All parameters, those of layers that predict further tokens not counted (as papers do).
    pub fn parameters(&self) -> f64 {
        self.count(|[split, experts, whole]| split + experts + whole)
    }

    /// Parameters that one token meets.
    pub fn active_parameters(&self) -> f64 {
        let share = self
            .mixture
            .map_or(0.0, |m| m.per_token as f64 / m.experts as f64);
        self.count(|[split, experts, whole]| split + experts * share + whole)
    }

    fn count(&self, of: impl Fn([f64; 3]) -> f64) -> f64 {
        let blocks: f64 = (0..self.layers)
            .map(|l| of(self.block_parameters(self.block(l))))
            .sum();
        let ends = if self.tied { 1.0 } else { 2.0 };
        let positions = if self.rotary {
            0
        } else {
            self.context * self.hidden
        };
        blocks + ends * self.embedding_parameters() + (positions + self.hidden) as f64
    }

    /// Keys that a query meets in the middle, of `context` tokens, under a causal mask or (`whole`) without one.
    pub fn seen(&self, context: usize, whole: bool) -> f64 {
        let all = if whole {
            context as f64
        } else {
            context as f64 / 2.0
        };
        match self.window {
            Some(w) if w.tokens < context => {
                // The first `w` queries see half of a window on average, the others all of it.
                let (w, t) = (w.tokens as f64, context as f64);
                let near = w - w * w / (2.0 * t);
                let share = self.window.map_or(0.0, |w| w.share);
                share * near.min(all) + (1.0 - share) * all
            }
            _ => all,
        }
    }

    /// Operations of the model for one token in the forward: two for every parameter of a product, and those of the scores,
    /// `2 L c s` for equal heads, which is Megatron's rule: as if nothing were masked. `causal` counts what a causal mask leaves.
    pub fn forward_flops(&self, context: usize, causal: bool) -> f64 {
        let (q, v) = self.score_width();
        let scores = 2.0 * (self.heads * (q + v)) as f64 * self.seen(context, !causal);
        let layers = self.layers + self.predicted;
        let share = self
            .mixture
            .map_or(0.0, |m| m.per_token as f64 / m.experts as f64);
        let products: f64 = (0..layers)
            .map(|l| {
                let [split, experts, whole] = self.block_parameters(self.block(l));
                let bias = match self.bias {
                    true => (self.widths().0 + self.widths().1 + self.ffn + 2 * self.hidden) as f64,
                    false => 0.0,
                };
                let norms = 2.0 * (self.hidden * (1 + self.bias as usize)) as f64;
                split + experts * share + whole - bias - norms
            })
            .sum();
        let heads = (1 + self.predicted) as f64 * self.embedding_parameters();
        2.0 * (products + heads) + layers as f64 * scores
    }

    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] with the size that stands in the way.
    pub fn check(&self) -> Result<()> {
        let wrong = |why: String| Err(Error::new(ErrorKind::Input, why));
        let sizes = [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("head-dim", self.head_dim),
            ("ffn", self.ffn),
            ("vocab", self.vocab),
            ("context", self.context),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return wrong(format!("the model has 0 {name}; it needs at least 1"));
        }
        let experts = self.mixture.map_or(1, |m| m.experts);
        for (name, n) in sizes.into_iter().chain([("experts", experts)]) {
            // Layers and experts are priced one by one.
            let most = if ["layers", "experts"].contains(&name) {
                1 << 16
            } else {
                1 << 32
            };
            if n > most {
                return wrong(format!(
                    "{n} {name} are more than any model has; at most {most} are priced"
                ));
            }
        }
        if self.predicted > self.layers {
            return wrong(format!(
                "{} layers that predict further tokens are more than the {} before them",
                self.predicted, self.layers
            ));
        }
        if let Some(m) = self.mixture.filter(|m| m.dense_layers > self.layers) {
            return wrong(format!(
                "{} dense layers in front of a model of {} layers",
                m.dense_layers, self.layers
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return wrong(format!(
                "{} heads are not divisible by {} kv-heads",
                self.heads, self.kv_heads
            ));
        }
        if let Some(m) = self.mixture {
            if m.experts == 0 || m.per_token == 0 || m.ffn == 0 || m.per_token > m.experts {
                return wrong(format!(
                    "{} experts, {} of them a token, {} wide: at least 1 each, and no more a token than there are",
                    m.experts, m.per_token, m.ffn
                ));
            }
            if m.every == 0 || m.groups == 0 || m.groups_per_token == 0 {
                return wrong(
                    "a mixture's step of layers and its groups are at least 1 each".into(),
                );
            }
        }
        Ok(())
    }
}
