//! The transformer, written once over sharded tensors: the same code on one chip and on any mesh of dp, fsdp, ep, cp, tp and
//! pp.
//!
//! Tensor parallelism is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053): the first matrix of each pair is split by
//! columns and the second by rows, so that a block costs two all-reduces forward and two backward; the embedding and the
//! loss are split over the vocabulary. A vocabulary that tp does not divide is padded in storage only: padded logits are
//! masked and get no gradient. Weights are stored [in, out].
//!
//! Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) also splits over tp what lies between those pairs: the
//! residual stream, norms and dropout are cut by tokens, and each all-reduce becomes a reduce-scatter and an all-gather, of
//! the same bytes. Context parallelism splits tokens over cp everywhere: attention is a ring (see [`Ring`](crate::spmd::Ring)), or
//! Ulysses' (Jacobs et al. 2023, arXiv:2309.14509), which has all tokens of some heads, all-to-alls leading there and back, or
//! both together.
//!
//! | file | what it holds |
//! |---|---|
//! | `config` | sizes and choices, and the models with a name |
//! | `context` | how cp splits a sequence |
//! | `decode` | a text that grows, over a cache |
//! | `documents` | several documents in a row |
//! | `embedding` | tokens and positions become the residual stream |
//! | `block` | norm, attention, norm, feed-forward; dropout |
//! | `attention`, `feed_forward` | the two halves of a block |
//! | `latent`, `absorbed` | multi-head latent attention; of new tokens over a cache |
//! | `mixture`, `experts` | a mixture of experts: what it is made of, and what it does |
//! | `linear` | weights split by columns and by rows |
//! | `head` | the last norm, logits and the loss |
//!
//! Embedding, blocks and head can be called apart: that is how a pipeline's stages run them.

mod absorbed;
mod attention;
mod block;
mod config;
mod context;
mod decode;
mod documents;
mod embedding;
mod experts;
mod feed_forward;
mod head;
mod latent;
mod linear;
mod mixture;

pub(crate) use config::nearest_divisor;
pub use config::{Config, FeedForward, MOST_CONTEXT, Norm, Positions};
pub use context::ContextMethod;
pub use decode::{Part, Past};
pub use documents::Documents;
pub(crate) use embedding::EMBEDDING;
pub(crate) use experts::{CLOSE, bias_name, load_name};
pub use latent::{KeyLatent, Latent};
pub use mixture::{Balance, Mixture, Score};

use crate::dtype::DType;
use crate::error::Result;
use crate::mesh::Mesh;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::placement::Placements;
use crate::spmd::{Chip, Sharded};

/// A decoder-only transformer: GPT-2's, Llama's, and what lies between, by its [`Config`].
#[derive(Clone, Debug)]
pub struct Transformer {
    config: Config,
    dtype: DType,
    recompute: bool,
    sequence_parallel: bool,
    collective_matmul: bool,
    draw: Option<u64>,
    /// Sequences of the step in earlier forwards.
    rows_before: usize,
    context_method: Option<ContextMethod>,
    past: Option<Past>,
    documents: Option<Documents>,
    absorbed: bool,
    share: f32,
    rotary: Option<ops::Rotary>,
}

impl Transformer {
    /// A model that computes in f32.
    ///
    /// # Errors
    /// If the configuration contradicts itself or the mesh cannot split it.
    pub fn new(config: Config, mesh: &Mesh) -> Result<Self> {
        config.check(mesh)?;
        let rotary = match config.positions {
            Positions::Rotary { theta, scaling } => Some(ops::Rotary {
                theta,
                scaling,
                ..Default::default()
            }),
            Positions::Learned => None,
        };
        Ok(Transformer {
            config,
            dtype: DType::F32,
            recompute: false,
            sequence_parallel: false,
            collective_matmul: false,
            draw: None,
            rows_before: 0,
            context_method: None,
            past: None,
            documents: None,
            absorbed: true,
            share: 1.0,
            rotary,
        })
    }

    /// The type that activations and the operands of matmuls have; parameters stay in f32.
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        assert!(dtype.is_float(), "a model does not compute in {dtype}");
        self.dtype = dtype;
        self
    }

    /// Whether backward computes each block again instead of keeping its intermediate values.
    pub fn with_recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// Whether tp also splits the tokens of what lies between its pairs of matrices.
    pub fn with_sequence_parallel(mut self, sequence_parallel: bool) -> Self {
        self.sequence_parallel = sequence_parallel;
        self
    }

    /// Whether the products of dense blocks run beside the all-gathers and reduce-scatters of sequence parallelism, chunk by chunk:
    /// see [`Chip::gather_and`]. Bytes stay the same. Mixtures, latents and the head go on as without.
    pub fn with_collective_matmul(mut self, collective_matmul: bool) -> Self {
        self.collective_matmul = collective_matmul;
        self
    }

    /// Whether products run beside the transfers of sequence parallelism.
    pub fn is_collective_matmul(&self) -> bool {
        self.collective_matmul
    }

    /// The same model with dropout on, and with what balances a mixture's experts: the balance loss joins the backward, and
    /// loads are counted. Each step of a run has its own `draw`, which with an element's place in the step's batch decides what is left
    /// out ([`Transformer::with_rows_before`]).
    pub fn training(&self, draw: u64) -> Self {
        Transformer {
            draw: Some(draw),
            ..self.clone()
        }
    }

    /// How many of the step's sequences earlier forwards had, micro-batch by micro-batch: so that dropout leaves out the same
    /// elements however the batch is cut.
    pub fn with_rows_before(mut self, rows: usize) -> Self {
        self.rows_before = rows;
        self
    }

    /// What share of a step's sequences one forward has, so that balance losses count as if all were one batch; 1 unless said.
    /// They join a backward that starts from the mean over the step's labels.
    pub fn with_share(mut self, share: f32) -> Self {
        self.share = share;
        self
    }

    /// The same model with a slot for every token: its mixtures drop nothing. For decoding, where a token must not miss its
    /// experts because others were there before it.
    pub fn without_capacity(mut self) -> Self {
        if let Some(mixture) = &mut self.config.mixture {
            mixture.capacity_factor = None;
        }
        self
    }

    /// Whether tp also splits the tokens of what lies between its pairs of matrices.
    pub fn is_sequence_parallel(&self) -> bool {
        self.sequence_parallel
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The type that activations have.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Entries of the vocabulary as they are stored: padded so that tp divides them.
    pub fn padded_vocab(&self, chip: &Chip) -> usize {
        self.config.vocab.next_multiple_of(chip.size_of("tp"))
    }

    /// Placement of a batch of token numbers or labels [b, t]: sequences split over dp, fsdp and ep, tokens over cp, which keeps
    /// them in the order of [`Transformer::token_order`]: see [`Transformer::batch`].
    pub fn batch_placement(chip: &Chip) -> Placements {
        let sequences = ["dp", "fsdp", "ep"].map(|axis| (axis, Shard(0)));
        chip.placed(&[&sequences[..], &[("cp", Shard(1))]].concat())
    }

    /// Logits [b, t, v padded], split as the tokens are and over tp by vocabulary, from token numbers [b, t] as
    /// [`Transformer::batch`] gives them.
    #[track_caller]
    pub fn logits(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        let x = self.embed(chip, tokens);
        let x = self.blocks(chip, 0..self.config.layers, x);
        self.head(chip, &x)
    }

    /// The loss at each position [b, t] in f32: minus the log of the probability of its label; 0 where the label is
    /// `u32::MAX`.
    #[track_caller]
    pub fn losses(&self, chip: &Chip, tokens: &Sharded, labels: &Sharded) -> Sharded {
        let logits = self.logits(chip, tokens);
        self.losses_of(chip, logits, labels)
    }
}
