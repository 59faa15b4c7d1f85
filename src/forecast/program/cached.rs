//! The forward of inference: tokens that meet a cache of keys and values.

use super::{Beside, Shape, Task, stream};
use crate::collective::Kind;
use crate::forecast::architecture::Block;
use crate::forecast::work::{Rows, Work};

impl Shape<'_> {
    /// A layer for the shape's tokens, of which each sequence has `past` in the cache already. Latent attention multiplies queries
    /// into the latent space and its result out of it (DeepSeek-V2, section 2.1.2), so the cache is read as it lies.
    pub fn cached(&self, block: Block, past: usize) -> Vec<Task> {
        let mut tasks = vec![self.norm(false)];
        if block == Block::Predict {
            tasks.extend([self.norm(false), self.norm(false)]);
            tasks.extend(self.predict_product());
        }
        tasks.extend(self.cached_projections());
        tasks.extend(self.rotary());
        tasks.extend(self.cached_core(past));
        let o = self.model.widths().2.div_ceil(self.tp);
        tasks.push(self.product(self.tokens(), self.model.hidden, o));
        tasks.extend(self.out_of_pair());
        tasks.extend([self.join(false), self.norm(false)]);
        match self.model.has_experts(block) {
            true => tasks.extend(self.experts()),
            false => tasks.extend(self.dense(self.model.ffn)),
        }
        tasks.push(self.join(false));
        tasks
    }

    fn cached_projections(&self) -> Vec<Task> {
        let (tokens, c) = (self.tokens(), self.model.hidden);
        let Some(l) = self.model.latent else {
            let mut tasks = self.before_pair();
            let (q, kv, _) = self.model.widths();
            let kv = (kv as f64 * self.kv_share()).ceil() as usize;
            tasks.push(self.product(tokens, q.div_ceil(self.tp) + kv, c));
            return tasks;
        };
        let heads = self.model.heads.div_ceil(self.tp);
        let down = l.q_rank + l.kv_rank + l.rope;
        let from = if l.q_rank == 0 { c } else { l.q_rank };
        let mut tasks = vec![self.product(tokens, down, c)];
        tasks.push(stream(Rows::Norm, 4.0 * (tokens * down) as f64));
        if self.sequence_parallel {
            tasks.extend(self.transfer_of(down, Kind::AllGather, Beside::Never));
        }
        tasks.push(self.product(tokens, heads * (l.nope + l.rope), from));
        tasks
    }

    /// Scores and their use against the cache; queries of the same step see each other too.
    fn cached_core(&self, past: usize) -> Vec<Task> {
        let m = self.model;
        let (tokens, heads) = (self.tokens(), m.heads.div_ceil(self.tp));
        let seen = m
            .seen(past + self.context, true)
            .min((past + self.context) as f64);
        let share = match m.latent {
            Some(_) => 1.0,
            None => self.kv_share(),
        };
        let cache = self.batch as f64 * seen * m.cache_width() as f64 * share;
        let written = (tokens * m.cache_width()) as f64 * share;
        let mut tasks = vec![stream(Rows::Elementwise, 4.0 * written)];
        let core = |width: usize, inside: usize| {
            let flops = 2.0 * (tokens * heads) as f64 * seen * width as f64;
            let bytes = 2.0 * (cache + (tokens * heads * inside) as f64);
            Work::Attention {
                flops,
                bytes,
                backward: false,
            }
        };
        let Some(l) = m.latent else {
            tasks.push(core(2 * m.head_dim, 2 * m.head_dim).into());
            return tasks;
        };
        let by = |n, k| {
            Task::from(Work::Matmul {
                batch: heads,
                m: tokens,
                n,
                k,
                size: self.size.max(2.0),
            })
        };
        tasks.push(by(l.kv_rank, l.nope));
        tasks.push(core(2 * l.kv_rank + l.rope, 2 * l.kv_rank + l.rope).into());
        tasks.push(by(l.value, l.kv_rank));
        tasks
    }

    /// Norm and logits of `rows` tokens, without a loss.
    pub fn logits(&self, rows: usize) -> Vec<Task> {
        let columns = self.model.vocab.div_ceil(self.tp);
        let product = Work::Matmul {
            batch: 1,
            m: rows,
            n: columns,
            k: self.model.hidden,
            size: self.size,
        };
        vec![
            stream(Rows::Norm, 4.0 * (rows * self.model.hidden) as f64),
            product.into(),
            stream(Rows::Elementwise, 6.0 * (rows * columns) as f64),
        ]
    }
}
