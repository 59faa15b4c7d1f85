//! Attention's part of a layer.

use super::{Beside, ContextParallel, Shape, Task, stream};
use crate::collective::Kind;
use crate::forecast::work::{Rows, Work};

impl Shape<'_> {
    /// The share of all keys and values that a chip holds: where there are fewer key heads than chips of `tp`, each is held by
    /// several.
    pub(super) fn kv_share(&self) -> f64 {
        match self.model.latent {
            Some(_) => 1.0 / self.tp as f64,
            None => 1.0 / self.tp.min(self.model.kv_heads) as f64,
        }
    }

    /// Elements on a chip of one token's queries, keys and values, and outputs.
    fn widths(&self) -> (usize, usize, usize) {
        let (q, kv, o) = self.model.widths();
        let kv = (kv as f64 * self.kv_share()).ceil() as usize;
        (q.div_ceil(self.tp), kv, o.div_ceil(self.tp))
    }

    /// Projections, positions, the core, and the way out; the gradients of all of it.
    pub(super) fn attention(&self, backward: bool) -> Vec<Task> {
        let (tokens, c) = (self.tokens(), self.model.hidden);
        let (q, kv, o) = self.widths();
        let mut tasks = vec![];
        if backward {
            tasks.extend(self.scattered_backward(c, o));
            tasks.extend(self.core(true));
            tasks.extend(self.rotary());
            match self.model.latent {
                Some(_) => tasks.extend(self.latent_backward()),
                None => {
                    // Gradients of queries, keys and values are put side by side.
                    tasks.extend(self.apart(4.0, q + kv));
                    tasks.extend(self.bias_gradient(q + kv));
                    tasks.extend(self.gathered_backward(q + kv, c));
                }
            }
            return tasks;
        }
        match self.model.latent {
            Some(_) => tasks.extend(self.latent_forward()),
            None => {
                tasks.extend(self.cast((tokens * c) as f64));
                tasks.extend(self.gathered(q + kv, c));
                tasks.extend(self.add_bias(q + kv));
            }
        }
        tasks.extend(self.rotary());
        tasks.extend(self.core(false));
        // From heads apart to a token's heads side by side.
        tasks.extend(self.apart(4.0, o));
        tasks.extend(self.cast((tokens * o) as f64));
        tasks.extend(self.scattered(c, o));
        tasks
    }

    /// Products from latent vectors: (columns, rows) for queries, and for keys and values.
    fn latent_products(&self) -> Vec<(usize, usize)> {
        let Some(l) = self.model.latent else {
            return vec![];
        };
        let heads = self.model.heads.div_ceil(self.tp);
        let from = if l.q_rank == 0 {
            self.model.hidden
        } else {
            l.q_rank
        };
        vec![
            (heads * (l.nope + l.rope), from),
            (heads * (l.nope + l.value), l.kv_rank),
        ]
    }

    fn latent_width(&self) -> usize {
        self.model
            .latent
            .map_or(0, |l| l.q_rank + l.kv_rank + l.rope)
    }

    /// Down to the latent vectors on the tokens that the chip has, their norms, and up again; with sequence parallelism the
    /// narrow vectors are gathered, not the stream.
    fn latent_forward(&self) -> Vec<Task> {
        let (width, near) = (
            self.latent_width(),
            self.tokens().div_ceil(self.sequence_split()),
        );
        let mut tasks = self.cast((near * self.model.hidden) as f64);
        tasks.push(self.product(near, width, self.model.hidden));
        tasks.push(stream(Rows::Norm, 4.0 * (near * width) as f64));
        tasks.extend(self.up_projections());
        tasks
    }

    /// Queries, keys and values from the latent vectors, which are gathered first if tokens are split.
    pub(super) fn up_projections(&self) -> Vec<Task> {
        let mut tasks = vec![];
        if self.sequence_parallel {
            tasks.extend(self.transfer_of(self.latent_width(), Kind::AllGather, Beside::Never));
        }
        let up = self.latent_products();
        tasks.extend(
            up.into_iter()
                .map(|(n, k)| self.product(self.tokens(), n, k)),
        );
        tasks
    }

    fn latent_backward(&self) -> Vec<Task> {
        let (width, near) = (
            self.latent_width(),
            self.tokens().div_ceil(self.sequence_split()),
        );
        let mut tasks = vec![];
        for product in self.latent_products() {
            tasks.extend(self.gradients(self.tokens(), product, vec![]));
        }
        let kind = match self.sequence_parallel {
            true => Kind::ReduceScatter,
            false => Kind::AllReduce,
        };
        tasks.extend(self.transfer_of(width, kind, Beside::Backward));
        tasks.push(stream(Rows::Norm, 8.0 * (near * width) as f64));
        tasks.extend(self.gradients(near, (width, self.model.hidden), vec![]));
        tasks
    }

    pub(super) fn rotary(&self) -> Vec<Task> {
        if !self.model.rotary {
            return vec![];
        }
        let (q, kv, _) = self.widths();
        let turned = match self.model.latent {
            Some(l) => self.model.heads.div_ceil(self.tp) * l.rope + l.rope,
            None => q + kv / 2,
        };
        vec![stream(
            Rows::Elementwise,
            4.0 * (self.tokens() * turned) as f64,
        )]
    }

    /// The core of attention, with what `cp` moves. Scores of unfused attention are written, read, and written again: softmax
    /// by Megatron-LM's kernel reads the half that the mask leaves and writes all, 3 bytes an element, 4 backward; dropout moves 5
    /// (values in and out, a byte of mask), and so does its gradient.
    pub(super) fn core(&self, backward: bool) -> Vec<Task> {
        let mut tasks = self.meet(backward);
        tasks.extend(self.computed(backward));
        tasks.extend(self.part(backward));
        tasks
    }

    /// The kernels of [`Shape::core`].
    fn computed(&self, backward: bool) -> Vec<Task> {
        let mut tasks = vec![];
        let c = self.model;
        let heads = c.heads.div_ceil(self.tp);
        let (query, value) = c.score_width();
        if self.fused {
            // Causal: half of the scores are never computed. Backward: five products for two.
            let scores = (self.tokens() * heads) as f64 * c.seen(self.context, false);
            let products = match backward {
                false => query + value,
                true => 3 * query + 2 * value,
            };
            let (q, kv, o) = self.widths();
            let bytes =
                2.0 * (self.tokens() * (q + kv + o)) as f64 * if backward { 2.0 } else { 1.0 };
            let work = Work::Attention {
                flops: 2.0 * scores * products as f64,
                bytes,
                backward,
            };
            tasks.push(work.into());
            return tasks;
        }
        let (batch, rows, s) = (
            self.batch * heads,
            self.context.div_ceil(self.cp),
            self.context,
        );
        let scores = (batch * rows * s) as f64;
        let size = self.size.max(2.0);
        let by = |m, n, k| {
            Task::from(Work::Matmul {
                batch,
                m,
                n,
                k,
                size,
            })
        };
        // Megatron-LM's kernel for scale, mask and softmax takes batches of heads in fours; otherwise each is a pass in f32.
        let passes = |fours: &'static [f64], single: &'static [f64]| {
            let bytes = if batch.is_multiple_of(4) {
                fours
            } else {
                single
            };
            bytes.iter().map(move |b| stream(Rows::Softmax, b * scores))
        };
        if !backward {
            tasks.push(by(rows, s, query));
            tasks.extend(passes(&[3.0], &[6.0, 9.0, 8.0, 6.0]));
            if self.dropout {
                tasks.push(stream(Rows::Softmax, 5.0 * scores));
            }
            tasks.push(by(rows, value, s));
        } else {
            tasks.extend([by(rows, s, value), by(s, value, rows)]);
            if self.dropout {
                tasks.push(stream(Rows::Softmax, 5.0 * scores));
            }
            tasks.extend(passes(&[4.0], &[6.0, 12.0, 9.0, 6.0]));
            tasks.extend([by(rows, query, s), by(s, query, rows)]);
        }
        tasks
    }

    /// Tensors of these widths exchanged between tokens and heads among u neighbours, each by itself (DeepSpeed-Ulysses): what each
    /// sends is little, so its latency counts.
    fn exchanged(&self, widths: &[f64]) -> Vec<Task> {
        let u = self.exchange;
        if u == 1 {
            return vec![];
        }
        let tokens = self.tokens() as f64;
        let one = |width: &f64| {
            Task::from(Work::Collective {
                kind: Kind::AllToAll,
                axis: format!("cp[..{u}]"),
                bytes: 2.0 * tokens * width,
            })
        };
        widths.iter().map(one).collect()
    }

    /// Widths of queries, keys and values, and results.
    fn exchanged_widths(&self) -> ([f64; 3], f64) {
        let (q, kv, o) = self.widths();
        let (query, value) = self.model.score_width();
        let k = kv as f64 * query as f64 / (query + value) as f64;
        ([q as f64, k, kv as f64 - k], o as f64)
    }

    /// What goes back to the chips of the tokens: results, or gradients of queries, keys and values.
    fn part(&self, backward: bool) -> Vec<Task> {
        let (inputs, result) = self.exchanged_widths();
        match backward {
            false => self.exchanged(&[result]),
            true => self.exchanged(&inputs),
        }
    }

    /// What `cp` moves for the core: keys and values round the ring (and their gradients with them in the backward), gathered, or
    /// everything exchanged for heads among u neighbours, whose blocks a ring joins. A member of that ring has u times the tokens and
    /// 1/u of the heads, so its share of the ring is as large as without exchange, and travels R - 1 times of R = cp / u.
    fn meet(&self, backward: bool) -> Vec<Task> {
        if self.cp == 1 {
            return vec![];
        }
        let kv = self.widths().1;
        let tokens = self.tokens() as f64;
        let (u, blocks) = (self.exchange, self.cp / self.exchange);
        let whole = 2.0 * tokens * self.cp as f64 * kv as f64;
        let collective =
            |kind, axis: String, bytes| Task::from(Work::Collective { kind, axis, bytes });
        if self.context_parallel == ContextParallel::AllGather {
            let over = |kind| collective(kind, "cp".into(), whole);
            return match backward {
                false => vec![over(Kind::AllGather)],
                true => vec![over(Kind::AllGather), over(Kind::ReduceScatter)],
            };
        }
        let (inputs, result) = self.exchanged_widths();
        let mut tasks = match backward {
            false => self.exchanged(&inputs),
            true => self.exchanged(&[result]),
        };
        if blocks > 1 {
            let work = Work::Ring {
                axis: format!("cp[{u}..]"),
                bytes: whole / u as f64 * if backward { 2.0 } else { 1.0 },
            };
            tasks.push(Task::from(work).beside(Beside::Always));
        }
        tasks
    }
}
