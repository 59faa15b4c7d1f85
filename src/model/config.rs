//! What a transformer is made of, and the ones with a name.

use super::{Latent, Mixture};
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::ops::{Activation, RotaryScaling};
use serde::{Deserialize, Serialize};

/// How a token knows its position.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// A learned vector per position, added to the embedding.
    Learned,
    /// Queries and keys are turned by their position.
    Rotary {
        /// Base of the wavelengths.
        theta: f64,
        /// How frequencies are changed to stretch the context.
        scaling: RotaryScaling,
    },
}

/// How activations are normalized in front of attention, of the feed-forward part, and of the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// LayerNorm; has a bias if the model has biases.
    LayerNorm,
    /// RMSNorm.
    RmsNorm,
}

/// The feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeedForward {
    /// `w2 f(w1 x)` with f the GELU by tanh.
    GeluTanh,
    /// `w2 f(w1 x)` with f the GELU by erf.
    GeluErf,
    /// `w2 f(w1 x)` with f the squared ReLU.
    Relu2,
    /// `down (silu(gate x) * up x)`.
    SwiGlu,
}

impl FeedForward {
    /// The activation of the ungated forms.
    pub fn activation(self) -> Option<Activation> {
        match self {
            FeedForward::GeluTanh => Some(Activation::GeluTanh),
            FeedForward::GeluErf => Some(Activation::GeluErf),
            FeedForward::Relu2 => Some(Activation::Relu2),
            FeedForward::SwiGlu => None,
        }
    }
}

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream, c.
    pub hidden: usize,
    /// Query heads, h.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of the feed-forward part, f.
    pub ffn: usize,
    /// Tokens of the vocabulary, v.
    pub vocab: usize,
    /// Longest sequence, t.
    pub context: usize,
    /// Positions.
    pub positions: Positions,
    /// Norms.
    pub norm: Norm,
    /// Added to a variance before its root.
    pub eps: f32,
    /// Feed-forward part.
    pub feed_forward: FeedForward,
    /// Whether linear layers and LayerNorms have biases.
    pub bias: bool,
    /// Whether the head is the embedding, transposed.
    pub tied: bool,
    /// Whether queries and keys are normalized per head.
    pub qk_norm: bool,
    /// Probability with which dropout zeroes an element of the embedding and of each block's two contributions.
    pub dropout: f32,
    /// Latent attention in place of heads of keys and values of their own.
    #[serde(default)]
    pub latent: Option<Latent>,
    /// A mixture of experts in place of feed-forward parts.
    #[serde(default)]
    pub mixture: Option<Mixture>,
}

/// Tokens of a context at most.
pub const MOST_CONTEXT: usize = 1 << 26;

impl Config {
    /// GPT-2's architecture (Radford et al. 2019): learned positions, LayerNorm, GELU by tanh, biases, tied embeddings.
    pub fn gpt2(layers: usize, hidden: usize, heads: usize, vocab: usize, context: usize) -> Self {
        Config {
            layers,
            hidden,
            heads,
            kv_heads: heads,
            ffn: 4 * hidden,
            vocab,
            context,
            positions: Positions::Learned,
            norm: Norm::LayerNorm,
            eps: 1e-5,
            feed_forward: FeedForward::GeluTanh,
            bias: true,
            tied: true,
            qk_norm: false,
            dropout: 0.0,
            latent: None,
            mixture: None,
        }
    }

    /// nanoGPT's variant of it: no biases, GELU by erf.
    pub fn nanogpt(
        layers: usize,
        hidden: usize,
        heads: usize,
        vocab: usize,
        context: usize,
    ) -> Self {
        Config {
            bias: false,
            feed_forward: FeedForward::GeluErf,
            ..Config::gpt2(layers, hidden, heads, vocab, context)
        }
    }

    /// Llama's architecture (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, grouped queries.
    pub fn llama(
        layers: usize,
        hidden: usize,
        heads: usize,
        kv_heads: usize,
        vocab: usize,
        context: usize,
    ) -> Self {
        Config {
            kv_heads,
            // Two thirds of 4 c, so that three matrices cost what two did, rounded up to a multiple of 32.
            ffn: (8 * hidden).div_ceil(3).next_multiple_of(32),
            positions: Positions::Rotary {
                theta: 10_000.0,
                scaling: RotaryScaling::None,
            },
            norm: Norm::RmsNorm,
            feed_forward: FeedForward::SwiGlu,
            bias: false,
            tied: false,
            ..Config::gpt2(layers, hidden, heads, vocab, context)
        }
    }

    /// Size of a head, d.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Number of parameters; padding of a split vocabulary is none.
    pub fn parameters(&self) -> u64 {
        let (c, f, v, d) = (self.hidden, self.ffn, self.vocab, self.head_dim());
        let kv = self.kv_heads * d;
        let bias = self.bias as usize;
        let norm_bias = (self.bias && self.norm == Norm::LayerNorm) as usize;
        let norm = c * (1 + norm_bias);
        let attention = match &self.latent {
            Some(latent) => latent.parameters(c, self.heads) + bias * c,
            None => {
                let norms = if self.qk_norm { 2 * d } else { 0 };
                2 * c * c + 2 * c * kv + bias * (2 * c + 2 * kv) + norms
            }
        };
        let (matrices, biases) = match self.feed_forward {
            FeedForward::SwiGlu => (3, 0),
            _ => (2, bias * (c + f)),
        };
        let dense = matrices * c * f + biases;
        let feed_forward = match &self.mixture {
            Some(m) => {
                let dense_layers = m.dense_layers.min(self.layers);
                let mixtures = (self.layers - dense_layers) * m.parameters(c, matrices);
                dense_layers * dense + mixtures
            }
            None => self.layers * dense,
        };
        let positions = if self.positions == Positions::Learned {
            self.context * c
        } else {
            0
        };
        let head = if self.tied { 0 } else { v * c };
        let blocks = self.layers * (2 * norm + attention) + feed_forward;
        (v * c + positions + blocks + norm + head) as u64
    }

    /// Heads of keys as attention has them: those of a latent are one for each query head.
    pub fn key_heads(&self) -> usize {
        match self.latent {
            Some(_) => self.heads,
            None => self.kv_heads,
        }
    }

    /// Checks what belongs to latent attention and to a mixture.
    fn check_parts(&self, mesh: &Mesh) -> Result<()> {
        if let Some(latent) = &self.latent {
            if !matches!(self.positions, Positions::Rotary { .. }) {
                return Err(Error::new(
                    ErrorKind::Input,
                    "latent attention turns part of its heads by their position; it goes with rotary positions, not with \
                     learned ones",
                ));
            }
            latent.check()?;
        }
        let ep = mesh.size_of("ep");
        match &self.mixture {
            Some(mixture) => mixture.check(self.layers, mesh),
            None if ep > 1 => Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "mesh axis ep={ep} splits experts, and the model has none; dp={ep} splits the same batch, or give the model \
                     experts"
                ),
            )),
            None => Ok(()),
        }
    }

    /// Checks the numbers against each other and against a mesh.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] or [`ErrorKind::Mesh`]: which number stands in the way, and the nearest that works.
    pub fn check(&self, mesh: &Mesh) -> Result<()> {
        let input = |why: String| Err(Error::new(ErrorKind::Input, why));
        let sizes = [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("ffn", self.ffn),
            ("vocab", self.vocab),
            ("context", self.context),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return input(format!("the model has 0 {name}; it needs at least 1"));
        }
        // What counts in 64 bits, token numbers in 32, and what a trace lists block by block.
        let experts = self.mixture.as_ref().map_or(1, |m| m.experts);
        let most = [
            1 << 16,
            1 << 24,
            1 << 16,
            1 << 16,
            1 << 26,
            u32::MAX as usize,
            MOST_CONTEXT,
        ];
        let sizes = sizes.into_iter().zip(most);
        for ((name, n), most) in sizes.chain([(("experts", experts), 1 << 16)]) {
            if n > most {
                return input(format!(
                    "the model has {n} {name}; at most {most} are possible"
                ));
            }
        }
        let [layers, hidden, ffn, vocab] =
            [self.layers, self.hidden, self.ffn, self.vocab].map(|x| x as f64);
        let parameters =
            layers * hidden * (4.0 * hidden + 3.0 * ffn * experts as f64) + vocab * hidden;
        if parameters > 1e18 {
            return input(format!(
                "the model has about {parameters:.1e} parameters, {layers} layers of {hidden} hidden, {ffn} ffn and {experts} experts; \
                 1e18 at most are counted"
            ));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return input(format!(
                "hidden {} is not divisible by {} heads; {} is",
                self.hidden,
                self.heads,
                self.hidden.next_multiple_of(self.heads)
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return input(format!(
                "{} heads are not divisible by {} kv-heads; {} are",
                self.heads,
                self.kv_heads,
                nearest_divisor(self.heads, self.kv_heads)
            ));
        }
        if self.latent.is_none() && self.head_dim() > 256 {
            return input(format!(
                "heads of {} elements; at most 256 are supported: use more heads",
                self.head_dim()
            ));
        }
        if matches!(self.positions, Positions::Rotary { .. })
            && self.latent.is_none()
            && !self.head_dim().is_multiple_of(2)
        {
            return input(format!(
                "rotary positions turn pairs, heads of {} elements are odd",
                self.head_dim()
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return input(format!(
                "dropout {} is not a probability below 1",
                self.dropout
            ));
        }
        for (axis, why) in EVEN {
            mesh.refuse_shares(axis, why)?;
        }
        self.check_parts(mesh)?;
        let dense = self.mixture.as_ref().is_none_or(|m| m.dense_layers > 0);
        let tp = mesh.size_of("tp");
        let split = [
            ("heads", self.heads),
            ("kv-heads", self.key_heads()),
            ("ffn", if dense { self.ffn } else { 0 }),
        ];
        let refuse = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        match split.iter().find(|(_, n)| n % tp != 0) {
            Some((name, n)) => refuse(format!(
                "mesh axis tp={tp} does not divide {n} {name}; tp={} does",
                nearest_divisor(*n, tp)
            )),
            None => Ok(()),
        }
    }
}

/// Axes whose chips have equal shares, and why.
const EVEN: [(&str, &str); 5] = [
    (
        "fsdp",
        "it cuts parameters, gradients and optimizer state too, and a faster chip has no more memory for them",
    ),
    (
        "ep",
        "every chip holds as many whole experts as the others, and tokens go where their experts are",
    ),
    (
        "cp",
        "tokens of a sequence are shared out so that attention is as much work on every chip, in pieces of one length",
    ),
    (
        "tp",
        "heads, columns of matrices and the vocabulary are cut in equal pieces, which padding and messages rely on",
    ),
    ("pp", "it cuts no tensor; its stages hold whole layers"),
];

/// The divisor of `n` that is nearest to `wish`, the smaller of two.
pub(crate) fn nearest_divisor(n: usize, wish: usize) -> usize {
    // 1 is nearer than anything beyond twice the wish.
    let divisors = (1..=n.min(2 * wish.max(1))).filter(|d| n.is_multiple_of(*d));
    divisors.min_by_key(|d| d.abs_diff(wish)).unwrap_or(1)
}
