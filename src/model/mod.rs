//! The transformer, written once over sharded tensors: the same code on one chip and on any mesh of dp, fsdp, cp and tp.
//!
//! Tensor parallelism is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053): the first matrix of each pair is split by
//! columns and the second by rows, so that a block costs two all-reduces forward and two backward; the embedding and the
//! loss are split over the vocabulary. A vocabulary that tp does not divide is padded in storage only: padded logits are
//! masked and get no gradient. Weights are stored [in, out].
//!
//! Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) also splits over tp what lies between those pairs: the
//! residual stream, norms and dropout are cut by tokens, and each all-reduce becomes a reduce-scatter and an all-gather, of
//! the same bytes. Context parallelism is Ulysses' (Jacobs et al. 2023, arXiv:2309.14509): tokens are split over cp
//! everywhere but in attention, which has all tokens of some heads; all-to-alls lead there and back.

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
    sequence_parallel: bool,
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
            sequence_parallel: false,
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

    /// Whether tp also splits the tokens of what lies between its pairs of matrices.
    pub fn with_sequence_parallel(mut self, sequence_parallel: bool) -> Self {
        self.sequence_parallel = sequence_parallel;
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

    /// Placement of a batch of token numbers or labels [b, t]: sequences split over dp and fsdp, tokens over cp.
    pub fn batch_placement(chip: &Chip) -> Placements {
        chip.placed(&[("dp", Shard(0)), ("fsdp", Shard(0)), ("cp", Shard(1))])
    }

    /// Logits [b, t, v padded], split as the tokens are and over tp by vocabulary, from token numbers [b, t].
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
            let x = self.whole_over_tp(chip, &self.norm(chip, "norm", &x));
            if self.config.tied {
                x.matmul_transposed(&self.embedding_table(chip, self.dtype))
            } else {
                let (c, v, padded) = (
                    self.config.hidden,
                    self.config.vocab,
                    self.padded_vocab(chip),
                );
                let placement = chip.placed(&[("tp", Shard(1))]);
                let shapes = (vec![c, v], vec![c, padded]);
                let init = Init::normal(0.02);
                x.matmul(&chip.parameter_as("head", shapes, placement, init, self.dtype))
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

    fn embedding_table(&self, chip: &Chip, dtype: DType) -> Sharded {
        let (v, c, padded) = (
            self.config.vocab,
            self.config.hidden,
            self.padded_vocab(chip),
        );
        let placement = chip.placed(&[("tp", Shard(0))]);
        let shapes = (vec![v, c], vec![padded, c]);
        chip.parameter_as("wte", shapes, placement, Init::normal(0.02), dtype)
    }

    /// Where the residual stream lies between pairs of matrices, for tokens [b, t] that lie as `tokens` does.
    fn residual(&self, chip: &Chip, tokens: &Placements) -> Placements {
        match self.sequence_parallel && chip.size_of("tp") > 1 {
            true => tokens.with(chip.mesh().axis_index("tp"), Shard(1)),
            false => tokens.clone(),
        }
    }

    /// All the chip's tokens in front of a matrix that tp splits by columns: an all-gather under sequence parallelism.
    fn whole_over_tp(&self, chip: &Chip, x: &Sharded) -> Sharded {
        match self.sequence_parallel && chip.size_of("tp") > 1 {
            true => {
                let tp = chip.mesh().axis_index("tp");
                x.redistribute(x.placements().with(tp, Replicate))
            }
            false => x.clone(),
        }
    }

    fn embed(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        let op = ops::Embedding {
            output: Some(self.dtype),
        };
        let table = self.embedding_table(chip, DType::F32);
        let x = chip.apply_one(op.clone(), &[&table, tokens]);
        drop(table);
        let placed = self.residual(chip, tokens.placements());
        let x = x.redistribute(&placed);
        let x = match self.config.positions {
            Positions::Rotary { .. } => x,
            Positions::Learned => {
                let shape = [self.config.context, self.config.hidden];
                let table = chip.parameter("wpe", shape, chip.replicated(), Init::normal(0.02));
                let at = chip.input(
                    "positions",
                    tokens.shape(),
                    &placed,
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
        bias_name: &str,
        shape: [usize; 2],
    ) -> (Sharded, Option<Sharded>) {
        let placed = |dim| chip.placed(&[("tp", Shard(dim))]);
        let weight = self.weight(chip, name, &shape, placed(1), Init::normal(0.02));
        let bias = self.config.bias;
        let bias =
            bias.then(|| self.weight(chip, bias_name, &shape[1..], placed(0), Init::zeros()));
        (weight, bias)
    }

    /// A parameter as matmuls take it: in the type that activations have.
    fn weight(
        &self,
        chip: &Chip,
        name: &str,
        shape: &[usize],
        placements: Placements,
        init: Init,
    ) -> Sharded {
        let shapes = (shape.to_vec(), shape.to_vec());
        chip.parameter_as(name, shapes, placements, init, self.dtype)
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
        let weight = self.weight(chip, name, &shape, chip.placed(&[("tp", Shard(0))]), init);
        let bias = bias.filter(|_| self.config.bias);
        let bias =
            bias.map(|b| self.weight(chip, b, &shape[1..], chip.replicated(), Init::zeros()));
        if chip.size_of("tp") == 1 {
            return x.linear(&weight, bias.as_ref(), None);
        }
        let y = x.matmul(&weight);
        drop(weight);
        // A batch need not be split over dp: a sampled text is on every chip.
        let summed = if self.sequence_parallel {
            Shard(1)
        } else {
            Replicate
        };
        let settled = |p: &Placement| if *p == Partial { summed } else { *p };
        let placements: Placements = y.placements().iter().map(settled).collect();
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
        let x = self.whole_over_tp(chip, x);
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
        drop(x);
        let by_tokens = q.placements().clone();
        let [q, k, v] = [q, k, v].map(|x| all_tokens_of_some_heads(chip, x));
        let op = ops::Attention {
            causal: true,
            ..Default::default()
        };
        let o = chip.apply_one(op, &[&q, &k, &v]);
        drop((q, k, v));
        let o = o.redistribute(by_tokens).reshape([b, t, c]);
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
        let x = &self.whole_over_tp(chip, x);
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
                    let placed = chip.placed(&[("tp", Shard(1))]);
                    let name = format!("{name}.{which}");
                    self.weight(chip, &name, &[c, f], placed, Init::normal(0.02))
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

/// Queries, keys or values [b, t, h, d] as attention takes them: tokens that are split over cp are exchanged for heads.
fn all_tokens_of_some_heads(chip: &Chip, x: Sharded) -> Sharded {
    if chip.size_of("cp") == 1 {
        return x;
    }
    let cp = chip.mesh().axis_index("cp");
    match x.placements()[cp] {
        Shard(1) => x.redistribute(x.placements().with(cp, Shard(2))),
        _ => x,
    }
}

/// Position of each token of [b, t], by its index in the batch.
fn positions(tokens: usize) -> crate::spmd::FromIndex<impl Fn(u64) -> u32> {
    crate::spmd::FromIndex(move |i| (i % tokens as u64) as u32)
}
