//! A transformer's step as work, for splits that the training loop does not run yet.
//!
//! The lists follow Megatron-LM (Narayanan et al. 2021, Korthikanti et al. 2022, arXiv:2205.05198): columns then rows of each pair of
//! matrices over `tp`, all-reduces between them, with sequence parallelism all-gathers and reduce-scatters in their place and
//! norms and dropout on 1/t of the tokens. Bytes are those of 2-byte activations. Where a ghost traces the same split, its trace
//! takes this list's place: see [`super::price_trace`].

use super::work::{Rows, Work};
use crate::collective::Kind;
use crate::model::{Config, FeedForward};

/// What is computed again in the backward instead of kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recompute {
    /// Nothing.
    None,
    /// The core of attention: scores, softmax, dropout, and the product with the values.
    Selective,
    /// Every layer, from its input.
    Full,
}

/// What decides the work of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape<'a> {
    /// The model.
    pub config: &'a Config,
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Chips over which matrices are split.
    pub tp: usize,
    /// Whether norms and dropout are split over the tokens.
    pub sequence_parallel: bool,
    /// Whether attention is one kernel.
    pub fused: bool,
    /// Whether there is dropout.
    pub dropout: bool,
    /// Bytes of an element of a matmul's operands.
    pub size: f64,
}

/// A kernel, and what may run beside it on the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// What is done.
    pub work: Work,
    /// A transfer that may run beside the next task instead of before it.
    pub beside: bool,
}

impl From<Work> for Task {
    fn from(work: Work) -> Task {
        Task {
            work,
            beside: false,
        }
    }
}

fn stream(rows: Rows, bytes: f64) -> Task {
    Work::Stream { rows, bytes }.into()
}

impl Shape<'_> {
    /// Tokens of a micro-batch.
    pub fn tokens(&self) -> usize {
        self.batch * self.context
    }

    /// Elements of the residual stream on a chip, where norms and dropout work.
    fn residual(&self) -> f64 {
        let split = if self.sequence_parallel { self.tp } else { 1 };
        (self.tokens() * self.config.hidden) as f64 / split as f64
    }

    fn product(&self, m: usize, n: usize, k: usize) -> Task {
        Work::Matmul {
            batch: 1,
            m,
            n,
            k,
            size: self.size,
        }
        .into()
    }

    /// A transfer of the whole residual stream over `tp`.
    fn transfer(&self, kind: Kind, beside: bool) -> Vec<Task> {
        if self.tp == 1 {
            return vec![];
        }
        let bytes = 2.0 * (self.tokens() * self.config.hidden) as f64;
        let work = Work::Collective {
            kind,
            axis: "tp".into(),
            bytes,
        };
        vec![Task { work, beside }]
    }

    /// Widths of a chip's four matrices: (columns, rows) of qkv, projection, first and second of the feed-forward part.
    fn matrices(&self) -> [(usize, usize); 4] {
        let c = self.config;
        let (t, d) = (self.tp, c.head_dim());
        let gates = if c.feed_forward == FeedForward::SwiGlu {
            2
        } else {
            1
        };
        [
            ((c.heads + 2 * c.kv_heads) * d / t, c.hidden),
            (c.hidden, c.heads * d / t),
            (gates * c.ffn / t, c.hidden),
            (c.hidden, c.ffn / t),
        ]
    }

    /// The core of attention. Scores of unfused attention are written, read, and written again: softmax moves 4 bytes an
    /// element, dropout 5 (two of values, a byte of mask); their gradients 6 and 5.
    fn core(&self, backward: bool) -> Vec<Task> {
        let c = self.config;
        let (b, h, d, s) = (self.batch, c.heads / self.tp, c.head_dim(), self.context);
        let scores = (b * h * s * s) as f64;
        if self.fused {
            // Causal: half of the scores are never computed. Backward: five products for two.
            let flops = 4.0 * scores * d as f64 * 0.5 * if backward { 2.5 } else { 1.0 };
            let rows = (self.tokens() * (2 * c.heads + 2 * c.kv_heads) * d / self.tp) as f64;
            let bytes = 2.0 * rows * if backward { 2.0 } else { 1.0 };
            return vec![Work::Attention { flops, bytes }.into()];
        }
        let batch = b * h;
        let by = |m, n, k| {
            Task::from(Work::Matmul {
                batch,
                m,
                n,
                k,
                size: 2.0,
            })
        };
        let mut tasks = vec![];
        if !backward {
            tasks.push(by(s, s, d));
            tasks.push(stream(Rows::Elementwise, 4.0 * scores));
            if self.dropout {
                tasks.push(stream(Rows::Elementwise, 5.0 * scores));
            }
            tasks.push(by(s, d, s));
        } else {
            tasks.extend([by(s, s, d), by(s, d, s)]);
            if self.dropout {
                tasks.push(stream(Rows::Elementwise, 5.0 * scores));
            }
            tasks.push(stream(Rows::Elementwise, 6.0 * scores));
            tasks.extend([by(s, d, s), by(s, d, s)]);
        }
        tasks
    }

    /// Bias, dropout and the sum with the residual stream; backward: dropout's gradient and the bias's.
    fn join(&self, backward: bool) -> Task {
        let mask = if self.dropout { 1.0 } else { 0.0 };
        let bytes = match backward {
            false => 6.0 + mask,
            true => {
                (if self.dropout { 5.0 } else { 0.0 }) + if self.config.bias { 2.0 } else { 0.0 }
            }
        };
        stream(Rows::Elementwise, bytes * self.residual())
    }

    fn activation(&self, backward: bool) -> Task {
        let values = if self.config.feed_forward == FeedForward::SwiGlu {
            3.0
        } else {
            2.0
        };
        let values = if backward { 2.0 * values - 1.0 } else { values };
        let bytes = 2.0 * values * (self.tokens() * self.config.ffn / self.tp) as f64;
        stream(Rows::Activation, bytes)
    }

    fn rotary(&self) -> Vec<Task> {
        let c = self.config;
        let rows = (self.tokens() * (c.heads + c.kv_heads) * c.head_dim() / self.tp) as f64;
        match c.positions {
            crate::model::Positions::Rotary { .. } => vec![stream(Rows::Elementwise, 4.0 * rows)],
            _ => vec![],
        }
    }

    /// The forward of one layer.
    pub fn forward(&self) -> Vec<Task> {
        let tokens = self.tokens();
        let [qkv, projection, up, down] = self.matrices();
        let (into, out) = if self.sequence_parallel {
            (
                self.transfer(Kind::AllGather, false),
                self.transfer(Kind::ReduceScatter, false),
            )
        } else {
            (vec![], self.transfer(Kind::AllReduce, false))
        };
        let norm = || stream(Rows::Norm, 4.0 * self.residual());
        let mut tasks = vec![norm()];
        tasks.extend(into.clone());
        tasks.push(self.product(tokens, qkv.0, qkv.1));
        tasks.extend(self.rotary());
        tasks.extend(self.core(false));
        tasks.push(self.product(tokens, projection.0, projection.1));
        tasks.extend(out.clone());
        tasks.extend([self.join(false), norm()]);
        tasks.extend(into);
        tasks.push(self.product(tokens, up.0, up.1));
        tasks.push(self.activation(false));
        tasks.push(self.product(tokens, down.0, down.1));
        tasks.extend(out);
        tasks.push(self.join(false));
        tasks
    }

    /// Gradients of a product of [tokens, rows] by [rows, columns]; a transfer of the input's gradient, or of the input once
    /// more, may run beside the weight's.
    fn gradients(&self, (columns, rows): (usize, usize), transfers: Vec<Task>) -> Vec<Task> {
        let tokens = self.tokens();
        let mut tasks = vec![self.product(tokens, rows, columns)];
        tasks.extend(transfers);
        tasks.push(self.product(rows, columns, tokens));
        tasks
    }

    /// What of [`Shape::backward`] gives the gradients of weights: the part that a zero-bubble schedule puts off.
    pub fn weights(&self) -> Vec<Task> {
        let product = |(columns, rows)| self.product(rows, columns, self.tokens());
        self.matrices().into_iter().map(product).collect()
    }

    /// The same of [`Shape::head`]'s backward.
    pub fn head_weights(&self) -> Vec<Task> {
        let columns = self.config.vocab.div_ceil(self.tp);
        vec![self.product(self.config.hidden, columns, self.tokens())]
    }

    /// The backward of one layer, without what is computed again.
    pub fn backward(&self) -> Vec<Task> {
        let [qkv, projection, up, down] = self.matrices();
        // Into the row-split matrix: with sequence parallelism the gradient is gathered first. Out of the column-split one: the
        // gradient is summed beside the weight's product, and the input gathered again beside the input's.
        let into = match self.sequence_parallel {
            true => self.transfer(Kind::AllGather, false),
            false => vec![],
        };
        let out = || match self.sequence_parallel {
            true => {
                let mut both = self.transfer(Kind::AllGather, true);
                both.extend(self.transfer(Kind::ReduceScatter, true));
                both
            }
            false => self.transfer(Kind::AllReduce, true),
        };
        // A norm reads the gradient, its input and the residual's gradient, and writes their sum.
        let norm = || stream(Rows::Norm, 8.0 * self.residual());
        let mut tasks = vec![self.join(true)];
        tasks.extend(into.clone());
        tasks.extend(self.gradients(down, vec![]));
        tasks.push(self.activation(true));
        tasks.extend(self.gradients(up, out()));
        tasks.extend([norm(), self.join(true)]);
        tasks.extend(into);
        tasks.extend(self.gradients(projection, vec![]));
        tasks.extend(self.core(true));
        tasks.extend(self.rotary());
        tasks.extend(self.gradients(qkv, out()));
        tasks.push(norm());
        tasks
    }

    /// What is computed again for a layer's backward.
    pub fn again(&self, recompute: Recompute) -> Vec<Task> {
        match recompute {
            Recompute::None => vec![],
            Recompute::Selective if self.fused => vec![],
            Recompute::Selective => self.core(false),
            Recompute::Full => self.forward(),
        }
    }

    /// What stands in front of the first layer: the embedding, its sum over `tp`, and dropout.
    pub fn embedding(&self) -> Vec<Task> {
        let bytes = (self.tokens() * self.config.hidden) as f64;
        let mut tasks = vec![stream(Rows::Elementwise, 4.0 * bytes)];
        let kind = if self.sequence_parallel {
            Kind::ReduceScatter
        } else {
            Kind::AllReduce
        };
        tasks.extend(self.transfer(kind, false));
        tasks.push(stream(
            Rows::Elementwise,
            (4.0 + self.dropout as u8 as f64) * self.residual(),
        ));
        tasks
    }

    /// What stands behind the last layer: norm, logits, and a loss that reads and writes them in f32.
    pub fn head(&self, backward: bool) -> Vec<Task> {
        let (columns, rows) = (self.config.vocab.div_ceil(self.tp), self.config.hidden);
        let logits = (self.tokens() * columns) as f64;
        if backward {
            let mut tasks = vec![stream(Rows::Elementwise, 10.0 * logits)];
            tasks.extend(self.gradients((columns, rows), self.transfer(Kind::AllReduce, true)));
            tasks.push(stream(Rows::Norm, 6.0 * self.residual()));
            return tasks;
        }
        let mut tasks = vec![stream(Rows::Norm, 4.0 * self.residual())];
        if self.sequence_parallel {
            tasks.extend(self.transfer(Kind::AllGather, false));
        }
        tasks.push(self.product(self.tokens(), columns, rows));
        // To f32, the maximum, the exponentials and their sum.
        tasks.push(stream(Rows::Elementwise, 18.0 * logits));
        tasks
    }

    /// Bytes that a layer keeps for its backward on a chip (Korthikanti et al. 2022, equations 1 to 4, for their model;
    /// counted the same way for gated and grouped ones).
    pub fn activation_bytes(&self, recompute: Recompute) -> f64 {
        let c = self.config;
        let t = self.tp as f64;
        let tokens = self.tokens() as f64;
        let width = tokens * c.hidden as f64;
        let split = if self.sequence_parallel { t } else { 1.0 };
        if recompute == Recompute::Full {
            return 2.0 * width / split;
        }
        let masks = if self.dropout { 2.0 } else { 0.0 };
        // Two norms' inputs and two inputs of column-split products, and the masks.
        let whole = (8.0 + masks) * width / split;
        let kv = tokens * (2 * c.kv_heads * c.head_dim()) as f64;
        let values = if c.feed_forward == FeedForward::SwiGlu {
            3.0
        } else {
            2.0
        };
        let cut = (2.0 * width + 2.0 * kv + 2.0 * width + 2.0 * values * tokens * c.ffn as f64) / t;
        let scores = (self.batch * c.heads * self.context * self.context) as f64 / t;
        let kept = match (self.fused, recompute) {
            (true, _) | (_, Recompute::Selective) => 0.0,
            _ => scores * if self.dropout { 5.0 } else { 4.0 },
        };
        whole + cut + kept
    }
}
