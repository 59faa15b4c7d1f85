//! The transformer, written once over sharded tensors: the same code on one chip and on any mesh of dp and tp.
//!
//! Tensor parallelism is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053): the first matrix of each pair is split by
//! columns and the second by rows, so that a block costs two all-reduces forward and two backward; the embedding and the
//! loss are split over the vocabulary. A vocabulary that tp does not divide is padded in storage only: padded logits are
//! masked and get no gradient. Weights are stored [in, out].

mod config;

pub(crate) use config::nearest_divisor;
pub use config::{Config, FeedForward, Norm, Positions};

use crate::dtype::DType;
use crate::error::Result;
use crate::mesh::Mesh;
use crate::ops;
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::placement::{Placement, Placements};
use crate::spmd::{Chip, Init, Sharded};

/// A decoder-only transformer: GPT-2's, Llama's, and what lies between, by its [`Config`].
#[derive(Clone, Debug)]
pub struct Transformer {
    config: Config,
    dtype: DType,
    recompute: bool,
    draw: Option<u64>,
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
            draw: None,
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

    /// The same model with dropout on. Each forward of a run has its own `draw`, which decides what is left out.
    pub fn training(&self, draw: u64) -> Self {
        Transformer {
            draw: Some(draw),
            ..self.clone()
        }
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

    /// Placement of a batch of token numbers or labels [b, t]: sequences split over dp.
    pub fn batch_placement(chip: &Chip) -> Placements {
        chip.placed(&[("dp", Shard(0))])
    }

    /// Logits [b, t, v padded], split over dp by sequences and over tp by vocabulary, from token numbers [b, t].
    #[track_caller]
    pub fn logits(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        let mut x = chip.scope("embedding", || self.embed(chip, tokens));
        for layer in 0..self.config.layers {
            x = if self.recompute {
                let model = self.clone();
                let block = move |chip: &Chip, x: &[Sharded]| vec![model.block(chip, layer, &x[0])];
                chip.recompute(&[&x], block).swap_remove(0)
            } else {
                self.block(chip, layer, &x)
            };
        }
        chip.scope("head", || {
            let x = self.norm(chip, "norm", &x);
            if self.config.tied {
                x.matmul_transposed(&self.embedding_table(chip).cast(self.dtype))
            } else {
                let (c, v, padded) = (
                    self.config.hidden,
                    self.config.vocab,
                    self.padded_vocab(chip),
                );
                let placement = chip.placed(&[("tp", Shard(1))]);
                let head = chip.padded_parameter(
                    "head",
                    [c, v],
                    [c, padded],
                    placement,
                    Init::normal(0.02),
                );
                x.matmul(&head.cast(self.dtype))
            }
        })
    }

    /// The loss at each position [b, t] in f32: minus the log of the probability of its label; 0 where the label is
    /// `u32::MAX`.
    #[track_caller]
    pub fn losses(&self, chip: &Chip, tokens: &Sharded, labels: &Sharded) -> Sharded {
        let logits = self.logits(chip, tokens);
        chip.scope("loss", || self.cross_entropy(chip, logits, labels))
    }

    fn cross_entropy(&self, chip: &Chip, logits: Sharded, labels: &Sharded) -> Sharded {
        let (valid, ignored) = (Some(self.config.vocab), u32::MAX);
        if chip.size_of("tp") == 1 {
            return chip.apply_one(ops::CrossEntropy { ignored, valid }, &[&logits, labels]);
        }
        let tokens = labels.placements();
        let max = chip.apply_one(ops::RowMax { valid }, &[&logits.detach()]);
        let max = chip.all_reduce_max(&max, "tp");
        let statistics = chip.apply(ops::RowExpSum { valid }, &[&logits.detach(), &max, labels]);
        let sum = statistics[0].redistribute(tokens);
        let target = statistics[1].redistribute(tokens);
        drop(statistics);
        let op = ops::CrossEntropyFromStatistics { ignored, valid };
        chip.apply_one(op, &[&logits, labels, &max, &sum, &target])
    }

    fn embedding_table(&self, chip: &Chip) -> Sharded {
        let (v, c, padded) = (
            self.config.vocab,
            self.config.hidden,
            self.padded_vocab(chip),
        );
        let placement = chip.placed(&[("tp", Shard(0))]);
        chip.padded_parameter("wte", [v, c], [padded, c], placement, Init::normal(0.02))
    }

    fn embed(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        let op = ops::Embedding {
            output: Some(self.dtype),
        };
        let x = chip.apply_one(op.clone(), &[&self.embedding_table(chip), tokens]);
        let x = x.redistribute(tokens.placements());
        let x = match self.config.positions {
            Positions::Rotary { .. } => x,
            Positions::Learned => {
                let shape = [self.config.context, self.config.hidden];
                let table = chip.parameter("wpe", shape, chip.replicated(), Init::normal(0.02));
                let at = chip.input(
                    "positions",
                    tokens.shape(),
                    tokens.placements(),
                    &positions(tokens.shape()[1]),
                );
                x.add(&chip.apply_one(op, &[&table, &at]))
            }
        };
        self.dropout(chip, "embedding.dropout", &x)
    }

    fn block(&self, chip: &Chip, layer: usize, x: &Sharded) -> Sharded {
        let name = format!("layers.{layer}");
        chip.scope(&name, || {
            let n = self.norm(chip, &format!("{name}.norm1"), x);
            let y = chip.scope("attention", || {
                self.attention(chip, &format!("{name}.attention"), &n)
            });
            drop(n);
            let x = x.add(&self.dropout(chip, &format!("{name}.attention.dropout"), &y));
            drop(y);
            let n = self.norm(chip, &format!("{name}.norm2"), &x);
            let y = chip.scope("mlp", || {
                self.feed_forward(chip, &format!("{name}.mlp"), &n)
            });
            drop(n);
            x.add(&self.dropout(chip, &format!("{name}.mlp.dropout"), &y))
        })
    }

    fn norm(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        let (c, eps) = (self.config.hidden, self.config.eps);
        let weight = chip.parameter(
            &format!("{name}.weight"),
            [c],
            chip.replicated(),
            Init::ones(),
        );
        match self.config.norm {
            Norm::RmsNorm => chip.apply_one(ops::RmsNorm { eps, weight: true }, &[x, &weight]),
            Norm::LayerNorm if self.config.bias => {
                let bias = chip.parameter(
                    &format!("{name}.bias"),
                    [c],
                    chip.replicated(),
                    Init::zeros(),
                );
                chip.apply_one(
                    ops::LayerNorm {
                        eps,
                        weight: true,
                        bias: true,
                    },
                    &[x, &weight, &bias],
                )
            }
            Norm::LayerNorm => chip.apply_one(
                ops::LayerNorm {
                    eps,
                    weight: true,
                    bias: false,
                },
                &[x, &weight],
            ),
        }
    }

    /// A weight split by columns with its bias: its outputs are split over tp.
    fn column(
        &self,
        chip: &Chip,
        name: &str,
        bias: &str,
        shape: [usize; 2],
    ) -> (Sharded, Option<Sharded>) {
        let weight = chip.parameter(
            name,
            shape,
            chip.placed(&[("tp", Shard(1))]),
            Init::normal(0.02),
        );
        let bias = self.config.bias.then(|| {
            chip.parameter(
                bias,
                [shape[1]],
                chip.placed(&[("tp", Shard(0))]),
                Init::zeros(),
            )
            .cast(self.dtype)
        });
        (weight.cast(self.dtype), bias)
    }

    /// `x w + b` with w split by rows: partial sums are reduced over tp, and the bias is added once, behind it.
    fn row(
        &self,
        chip: &Chip,
        name: &str,
        bias: Option<&str>,
        shape: [usize; 2],
        x: &Sharded,
    ) -> Sharded {
        // GPT-2 scales the projections that end in the residual stream by the number of them.
        let init = Init::normal(0.02 / (2.0 * self.config.layers as f32).sqrt());
        let weight = chip
            .parameter(name, shape, chip.placed(&[("tp", Shard(0))]), init)
            .cast(self.dtype);
        let bias = bias.filter(|_| self.config.bias);
        let bias = bias.map(|b| {
            chip.parameter(b, [shape[1]], chip.replicated(), Init::zeros())
                .cast(self.dtype)
        });
        if chip.size_of("tp") == 1 {
            return x.linear(&weight, bias.as_ref(), None);
        }
        let y = x.matmul(&weight);
        // A batch need not be split over dp: a sampled text is on every chip.
        let whole = |p: &Placement| if *p == Partial { Replicate } else { *p };
        let placements: Placements = y.placements().iter().map(whole).collect();
        let y = y.redistribute(placements);
        match bias {
            Some(bias) => y.add_bias(&bias),
            None => y,
        }
    }

    fn attention(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        let (c, h, g, d) = (
            self.config.hidden,
            self.config.heads,
            self.config.kv_heads,
            self.config.head_dim(),
        );
        let (b, t) = (x.shape()[0], x.shape()[1]);
        let project = |which: char, heads: usize| {
            let (weight, bias) = self.column(
                chip,
                &format!("{name}.w{which}"),
                &format!("{name}.b{which}"),
                [c, heads * d],
            );
            x.linear(&weight, bias.as_ref(), None)
                .reshape([b, t, heads, d])
        };
        let q = self.turn(chip, &format!("{name}.q_norm"), project('q', h));
        let k = self.turn(chip, &format!("{name}.k_norm"), project('k', g));
        let v = project('v', g);
        let op = ops::Attention {
            causal: true,
            ..Default::default()
        };
        let o = chip.apply_one(op, &[&q, &k, &v]).reshape([b, t, c]);
        drop((q, k, v));
        self.row(
            chip,
            &format!("{name}.wo"),
            Some(&format!("{name}.bo")),
            [c, c],
            &o,
        )
    }

    /// Queries or keys as attention takes them: normalized per head and turned by their position, if the model does so.
    fn turn(&self, chip: &Chip, norm: &str, x: Sharded) -> Sharded {
        let x = if self.config.qk_norm {
            let weight = chip.parameter(
                norm,
                [self.config.head_dim()],
                chip.replicated(),
                Init::ones(),
            );
            chip.apply_one(
                ops::RmsNorm {
                    eps: self.config.eps,
                    weight: true,
                },
                &[&x, &weight],
            )
        } else {
            x
        };
        match &self.rotary {
            Some(rotary) => chip.apply_one(rotary.clone(), &[&x]),
            None => x,
        }
    }

    fn feed_forward(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        let (c, f) = (self.config.hidden, self.config.ffn);
        match self.config.feed_forward.activation() {
            Some(activation) => {
                let (w1, b1) =
                    self.column(chip, &format!("{name}.w1"), &format!("{name}.b1"), [c, f]);
                let y = x.linear(&w1, b1.as_ref(), Some(activation));
                self.row(
                    chip,
                    &format!("{name}.w2"),
                    Some(&format!("{name}.b2")),
                    [f, c],
                    &y,
                )
            }
            None => {
                let weight = |which: &str| {
                    let placement = chip.placed(&[("tp", Shard(1))]);
                    chip.parameter(
                        &format!("{name}.{which}"),
                        [c, f],
                        placement,
                        Init::normal(0.02),
                    )
                    .cast(self.dtype)
                };
                let y = x.matmul(&weight("gate")).swiglu(&x.matmul(&weight("up")));
                self.row(chip, &format!("{name}.down"), None, [f, c], &y)
            }
        }
    }

    fn dropout(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        match (self.config.dropout, self.draw) {
            (p, Some(draw)) if p > 0.0 => chip.apply_one(
                ops::Dropout {
                    p,
                    name: format!("{name}@{draw}"),
                },
                &[x],
            ),
            _ => x.clone(),
        }
    }
}

/// Position of each token of [b, t], by its index in the batch.
fn positions(tokens: usize) -> crate::spmd::FromIndex<impl Fn(u64) -> u32> {
    crate::spmd::FromIndex(move |i| (i % tokens as u64) as u32)
}
