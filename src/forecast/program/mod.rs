//! A transformer's step as work, for splits that the training loop does not run yet.
//!
//! The lists follow Megatron-LM (Narayanan et al. 2021, Korthikanti et al. 2022, arXiv:2205.05198): columns then rows of each pair of
//! matrices over `tp`, all-reduces between them, with sequence parallelism all-gathers and reduce-scatters in their place and
//! norms and dropout on 1/t of the tokens. Bytes are those of 2-byte activations. Where a ghost traces the same split, its trace
//! takes this list's place: see [`super::price_trace`].

mod attention;
mod cached;
mod chunks;
mod ends;
mod experts;
mod kept;

use super::architecture::{Architecture, Block};
use super::work::{Rows, Work};
use crate::collective::Kind;
use crate::error::{Error, ErrorKind, Result};
pub use kept::{Activations, Again, Stored};

/// What is computed again in the backward instead of kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recompute {
    /// Nothing.
    None,
    /// The core of attention where it is not fused: scores, softmax, dropout, and the product with the values; and what [`Again`] says,
    /// with latent attention norms and up-projections if the stack says nothing.
    Selective,
    /// Every layer, from its input.
    Full,
}

/// How keys and values of other chips' tokens are met over `cp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContextParallel {
    /// They travel round a ring beside the computation (Liu et al. 2023), halves of the sequence dealt so that a causal mask is
    /// even.
    Ring,
    /// They are gathered first (Llama 3, arXiv:2407.21783, section 3.3.2).
    AllGather,
    /// Tokens are exchanged for heads (Ulysses, arXiv:2309.14509).
    Ulysses,
    /// So many neighbours exchange tokens for heads, and rings join their blocks (USP, arXiv:2405.07719); as many as heads and `cp`
    /// allow if none is given.
    Usp {
        /// Neighbours that exchange.
        exchange: Option<usize>,
    },
}

impl ContextParallel {
    /// Neighbours of `cp` that exchange tokens for heads, u, if `tp` chips share heads and `kv_heads`: 1 where all chips are a ring
    /// or gather, all of `cp` in Ulysses.
    ///
    /// # Errors
    /// If the heads do not allow it: which number stands in the way, and what would do.
    pub fn exchange(self, cp: usize, tp: usize, heads: usize, kv_heads: usize) -> Result<usize> {
        // Where chips of tp outnumber key heads each holds one.
        let left = [
            ("heads", heads, heads / tp),
            ("kv-heads", kv_heads, (kv_heads / tp).max(1)),
        ];
        let blocked = |u: usize| {
            left.into_iter()
                .find(|(.., n)| u == 0 || !n.is_multiple_of(u))
        };
        let most = |among: usize| {
            let fits = |u: &usize| among.is_multiple_of(*u) && blocked(*u).is_none();
            (1..=among).rev().find(fits).unwrap_or(1)
        };
        let refuse = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        match self {
            ContextParallel::Ring | ContextParallel::AllGather => Ok(1),
            _ if cp == 1 => Ok(1),
            ContextParallel::Ulysses => match blocked(cp) {
                Some((name, all, n)) => refuse(format!(
                    "Ulysses exchanges tokens for heads: cp={cp} does not divide the {n} {name} that tp={tp} leaves of {all}; the ring needs no such"
                )),
                None => Ok(cp),
            },
            ContextParallel::Usp { exchange: None } => Ok(most(cp)),
            ContextParallel::Usp { exchange: Some(u) } => match blocked(u) {
                _ if u == 0 || !cp.is_multiple_of(u) => refuse(format!(
                    "{u} chips that exchange tokens for heads do not divide cp={cp}; {} do",
                    most(cp)
                )),
                Some((name, all, n)) => refuse(format!(
                    "{u} chips that exchange tokens for heads do not divide the {n} {name} that tp={tp} leaves of {all}; {} do",
                    most(cp)
                )),
                None => Ok(u),
            },
        }
    }
}

/// What decides the work of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape<'a> {
    /// The model.
    pub model: &'a Architecture,
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Chips over which matrices are split.
    pub tp: usize,
    /// Chips over which the tokens of a sequence are split.
    pub cp: usize,
    /// Chips over which experts are split.
    pub ep: usize,
    /// How attention meets the tokens of other chips.
    pub context_parallel: ContextParallel,
    /// Neighbours of `cp` that exchange tokens for heads: see [`ContextParallel::exchange`].
    pub exchange: usize,
    /// Whether norms and dropout are split over the tokens.
    pub sequence_parallel: bool,
    /// Whether products of dense blocks run beside the transfers of sequence parallelism.
    pub collective_matmul: bool,
    /// Whether attention is one kernel.
    pub fused: bool,
    /// Whether there is dropout.
    pub dropout: bool,
    /// Bytes of an element of a gradient.
    pub gradient: f64,
    /// Whether a kernel of its own adds to the sum of a weight's gradients.
    pub accumulates: bool,
    /// Bytes of an element of a matmul's operands.
    pub size: f64,
    /// Tokens of the busiest expert's chip for those of the mean one.
    pub imbalance: f64,
    /// What selective recomputation makes again, and in what type values are kept.
    pub again: Again,
}

/// When a transfer may run beside kernels instead of before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// If the software overlaps everything.
    Never,
    /// Beside the next kernel, if the software overlaps backwards.
    Backward,
    /// Beside the next kernel: the algorithm is made so.
    Always,
    /// Beside other micro-batches' kernels, if the software exchanges tokens so.
    Experts,
}

/// A kernel, and what may run beside it on the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// What is done.
    pub work: Work,
    /// When a transfer hides.
    pub beside: Beside,
    /// Whether it is the gradient of a weight, for which no other stage waits.
    pub weight: bool,
}

impl From<Work> for Task {
    fn from(work: Work) -> Task {
        Task {
            work,
            beside: Beside::Never,
            weight: false,
        }
    }
}

impl Task {
    fn beside(self, beside: Beside) -> Task {
        Task { beside, ..self }
    }

    fn of_weight(self) -> Task {
        Task {
            weight: true,
            ..self
        }
    }
}

fn stream(rows: Rows, bytes: f64) -> Task {
    Work::Stream { rows, bytes }.into()
}

impl Shape<'_> {
    /// Tokens of a micro-batch on a chip.
    pub fn tokens(&self) -> usize {
        (self.batch * self.context).div_ceil(self.cp)
    }

    /// Chips over which sequence parallelism splits the tokens.
    fn sequence_split(&self) -> usize {
        if self.sequence_parallel { self.tp } else { 1 }
    }

    /// Elements of the residual stream on a chip, where norms and dropout work.
    fn residual(&self) -> f64 {
        (self.tokens() * self.model.hidden) as f64 / self.sequence_split() as f64
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

    /// Reading 2-byte values and writing narrow ones beside them, if matmuls are narrower.
    fn cast(&self, elements: f64) -> Vec<Task> {
        match self.size < 2.0 {
            true => vec![stream(Rows::Elementwise, (2.0 + self.size) * elements)],
            false => vec![],
        }
    }

    /// A transfer over `tp` of this many elements a token.
    fn transfer_of(&self, width: usize, kind: Kind, beside: Beside) -> Vec<Task> {
        if self.tp == 1 {
            return vec![];
        }
        let bytes = 2.0 * (self.tokens() * width) as f64;
        let axis = "tp".to_string();
        let work = Work::Collective { kind, axis, bytes };
        vec![Task::from(work).beside(beside)]
    }

    /// A transfer of the whole residual stream over `tp`.
    fn transfer(&self, kind: Kind, beside: Beside) -> Vec<Task> {
        self.transfer_of(self.model.hidden, kind, beside)
    }

    /// Into a pair of matrices: a gathering if tokens are split.
    fn before_pair(&self) -> Vec<Task> {
        match self.sequence_parallel {
            true => self.transfer(Kind::AllGather, Beside::Never),
            false => vec![],
        }
    }

    /// Out of a pair of matrices: the sum.
    fn out_of_pair(&self) -> Vec<Task> {
        let kind = match self.sequence_parallel {
            true => Kind::ReduceScatter,
            false => Kind::AllReduce,
        };
        self.transfer(kind, Beside::Never)
    }

    /// The gradient's way back through [`Shape::before_pair`], beside the weights' product: with sequence parallelism the input is
    /// gathered once more and the gradient's sum scattered, otherwise the gradient is summed.
    fn back_into_pair(&self) -> Vec<Task> {
        match self.sequence_parallel {
            true => {
                let mut both = self.transfer(Kind::AllGather, Beside::Backward);
                both.extend(self.transfer(Kind::ReduceScatter, Beside::Backward));
                both
            }
            false => self.transfer(Kind::AllReduce, Beside::Backward),
        }
    }

    /// Columns of the first feed-forward matrix for one of the second's rows.
    fn gates(&self) -> usize {
        if self.model.gated { 2 } else { 1 }
    }

    /// Bias, dropout and the sum with the residual stream; backward: dropout's gradient and the bias's.
    fn join(&self, backward: bool) -> Task {
        let mask = if self.dropout { 1.0 } else { 0.0 };
        let bytes = match backward {
            false => 6.0 + mask,
            true => {
                (if self.dropout { 5.0 } else { 0.0 }) + if self.model.bias { 2.0 } else { 0.0 }
            }
        };
        stream(Rows::Elementwise, bytes * self.residual())
    }

    fn activation(&self, elements: f64, backward: bool) -> Task {
        let (rows, values) = match self.model.gated {
            true => (Rows::Activation, 3.0),
            false => (Rows::Gelu, 2.0),
        };
        let values = if backward { 2.0 * values - 1.0 } else { values };
        stream(rows, 2.0 * values * elements)
    }

    /// A pass of its own over so many values a token, where kernels are not fused: values in and out.
    fn apart(&self, bytes: f64, width: usize) -> Option<Task> {
        let bytes = bytes * (self.tokens() * width) as f64;
        (!self.fused).then(|| stream(Rows::Elementwise, bytes))
    }

    /// Adding a bias to the result of a product, where no kernel does it on its way.
    fn add_bias(&self, width: usize) -> Option<Task> {
        self.apart(4.0, width).filter(|_| self.model.bias)
    }

    /// The sum over tokens that is a bias's gradient, where no product forms it.
    fn bias_gradient(&self, width: usize) -> Option<Task> {
        self.apart(2.0, width).filter(|_| self.model.bias)
    }

    fn norm(&self, backward: bool) -> Task {
        // Backward a norm reads the gradient, its input and the residual's gradient, and writes their sum.
        let bytes = if backward { 8.0 } else { 4.0 };
        stream(Rows::Norm, bytes * self.residual())
    }

    /// The forward of one layer.
    pub fn forward(&self, block: Block) -> Vec<Task> {
        self.forward_parts(block).concat()
    }

    /// The backward of one layer, without what is computed again.
    pub fn backward(&self, block: Block) -> Vec<Task> {
        self.backward_parts(block).concat()
    }

    /// Attention's part of a layer's forward, and the feed-forward part.
    pub fn forward_parts(&self, block: Block) -> Vec<Vec<Task>> {
        let mut attention = vec![];
        if block == Block::Predict {
            // Two normalized streams, projected into one.
            attention.extend([self.norm(false), self.norm(false)]);
            attention.extend(self.predict_product());
        }
        attention.push(self.norm(false));
        attention.extend(self.attention(false));
        attention.push(self.join(false));
        let mut forward = vec![self.norm(false)];
        match self.model.has_experts(block) {
            true => forward.extend(self.experts()),
            false => forward.extend(self.dense(self.model.ffn)),
        }
        forward.push(self.join(false));
        vec![attention, forward]
    }

    /// The feed-forward part of a layer's backward, and attention's, without what is computed again.
    pub fn backward_parts(&self, block: Block) -> Vec<Vec<Task>> {
        let mut forward = vec![self.join(true)];
        match self.model.has_experts(block) {
            true => forward.extend(self.experts_backward()),
            false => forward.extend(self.dense_backward(self.model.ffn)),
        }
        forward.push(self.norm(true));
        let mut attention = vec![self.join(true)];
        attention.extend(self.attention(true));
        attention.push(self.norm(true));
        if block == Block::Predict {
            attention.extend(self.predict_product());
            attention.extend(self.predict_product());
            attention.extend([self.norm(true), self.norm(true)]);
        }
        vec![forward, attention]
    }

    fn predict_product(&self) -> Vec<Task> {
        let c = self.model.hidden;
        let mut tasks = self.before_pair();
        tasks.push(self.product(self.tokens(), c.div_ceil(self.tp), 2 * c));
        tasks
    }

    /// The two products of a dense feed-forward part of this width, and the activation between them.
    fn dense(&self, ffn: usize) -> Vec<Task> {
        let (tokens, c, f) = (self.tokens(), self.model.hidden, ffn.div_ceil(self.tp));
        let mut tasks = self.cast((tokens * c) as f64);
        tasks.extend(self.gathered(self.gates() * f, c));
        tasks.push(self.activation((tokens * f) as f64, false));
        tasks.extend(self.cast((tokens * f) as f64));
        tasks.extend(self.scattered(c, f));
        tasks
    }

    fn dense_backward(&self, ffn: usize) -> Vec<Task> {
        let (tokens, c, f) = (self.tokens(), self.model.hidden, ffn.div_ceil(self.tp));
        let mut tasks = self.scattered_backward(c, f);
        tasks.push(self.activation((tokens * f) as f64, true));
        tasks.extend(self.bias_gradient(f));
        tasks.extend(self.gathered_backward(self.gates() * f, c));
        tasks
    }

    /// Gradients of a product of [tokens, rows] by [rows, columns]; a transfer of the input's gradient, or of the input once
    /// more, may run beside the weight's. Where the product does not add to the sum of earlier micro-batches itself, a kernel reads
    /// both and writes the sum.
    fn gradients(
        &self,
        tokens: usize,
        (columns, rows): (usize, usize),
        transfers: Vec<Task>,
    ) -> Vec<Task> {
        // A narrow gradient is written for both products, the input's once more for the weight's.
        let mut tasks = self.cast((2 * tokens * columns + tokens * rows) as f64);
        tasks.push(self.product(tokens, rows, columns));
        tasks.extend(transfers);
        tasks.push(self.product(rows, columns, tokens).of_weight());
        tasks.extend(self.accumulate(rows * columns));
        tasks
    }

    /// Adding so many weights' gradients to the sum of earlier micro-batches, where a kernel of its own does.
    fn accumulate(&self, weights: usize) -> Option<Task> {
        let moved = (2.0 + 2.0 * self.gradient) * weights as f64;
        let task = || stream(Rows::Elementwise, moved).of_weight();
        self.accumulates.then(task)
    }
}
