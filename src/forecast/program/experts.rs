//! A mixture's part of a layer: route, dispatch, multiply by experts, combine, and the experts that all tokens visit.
//!
//! Experts lie on the chips of `ep`, and on those of `tp` too where their number allows it (what Megatron-Core calls an expert
//! tensor parallelism of 1, MindSpeed extended expert parallelism); otherwise `tp` splits each of them.

use super::{Beside, Shape, Task, stream};
use crate::collective::Kind;
use crate::forecast::architecture::{Block, Mixture};
use crate::forecast::work::{Rows, Work};

/// Sizes of a chip's share of the experts.
struct Share {
    /// Experts on a chip.
    experts: usize,
    /// Rows for each of them.
    rows: usize,
    /// Width of an expert on a chip.
    ffn: usize,
    /// Tokens that a chip sends.
    sent: usize,
    /// Whether `tp` splits experts instead of their number.
    split: bool,
}

impl Shape<'_> {
    fn mixture(&self) -> Mixture {
        self.model.mixture.expect("a block of experts has them")
    }

    fn share(&self, m: &Mixture) -> Share {
        let split = self.tp > 1 && !m.experts.is_multiple_of(self.tp * self.ep);
        let (over, ffn) = match split {
            true => (self.ep, m.ffn.div_ceil(self.tp)),
            false => (self.ep * self.tp, m.ffn),
        };
        let experts = m.experts.div_ceil(over);
        // One chip that has all experts has all tokens too.
        let imbalance = if over > 1 { self.imbalance } else { 1.0 };
        let sent = self.tokens().div_ceil(self.tp);
        let visits = if split { self.tokens() } else { sent } * m.per_token;
        let rows = (visits as f64 * imbalance / experts as f64).ceil() as usize;
        Share {
            experts,
            rows: rows.max(1),
            ffn,
            sent,
            split,
        }
    }

    /// Tokens to their experts, or back.
    fn exchange(&self, m: &Mixture, s: &Share, size: f64) -> Vec<Task> {
        let axes = match (self.ep > 1, self.tp > 1 && !s.split) {
            (true, true) => "ep+tp",
            (true, false) => "ep",
            (false, true) => "tp",
            (false, false) => return vec![],
        };
        let work = Work::Exchange {
            axis: axes.into(),
            tokens: s.sent as f64 * self.imbalance,
            copies: m.per_token,
            token_bytes: size * self.model.hidden as f64,
            groups: (m.groups, m.groups_per_token),
            narrow: size < 2.0,
        };
        vec![Task::from(work).beside(Beside::Experts)]
    }

    /// Where `tp` splits experts, dispatched rows are gathered over it and results summed.
    fn over_tp(&self, s: &Share, kind: Kind) -> Vec<Task> {
        if !s.split {
            return vec![];
        }
        let bytes = 2.0 * (s.experts * s.rows * self.model.hidden) as f64;
        let axis = "tp".into();
        vec![Work::Collective { kind, axis, bytes }.into()]
    }

    fn grouped(&self, s: &Share, m: usize, n: usize, k: usize) -> Task {
        Work::Matmul {
            batch: s.experts,
            m,
            n,
            k,
            size: self.size,
        }
        .into()
    }

    /// Choosing experts: a narrow product, and passes over the scores in f32.
    fn router(&self, m: &Mixture, s: &Share) -> Vec<Task> {
        let product = Work::Matmul {
            batch: 1,
            m: s.sent,
            n: m.experts,
            k: self.model.hidden,
            size: self.size.max(2.0),
        };
        let passes = stream(Rows::Elementwise, 16.0 * (s.sent * m.experts) as f64);
        vec![product.into(), passes]
    }

    /// Copying rows into the experts' order, or adding them up again.
    fn permute(&self, m: &Mixture, s: &Share) -> Task {
        let rows = (s.sent * (m.per_token + 1)) as f64;
        stream(Rows::Elementwise, 4.0 * rows * self.model.hidden as f64)
    }

    /// Without sequence parallelism every chip of `tp` needs all results.
    fn whole_again(&self) -> Vec<Task> {
        match self.sequence_parallel {
            true => vec![],
            false => self.transfer(Kind::AllGather, Beside::Never),
        }
    }

    fn shared(&self, m: &Mixture, backward: bool) -> Vec<Task> {
        if m.shared_ffn == 0 {
            return vec![];
        }
        // Mixtures go on as without.
        let plain = Shape {
            collective_matmul: false,
            ..self.clone()
        };
        match backward {
            false => plain.dense(m.shared_ffn),
            true => plain.dense_backward(m.shared_ffn),
        }
    }

    pub(super) fn experts(&self) -> Vec<Task> {
        let m = self.mixture();
        let s = self.share(&m);
        let c = self.model.hidden;
        let rows = (s.experts * s.rows) as f64;
        let mut tasks = self.router(&m, &s);
        tasks.push(self.permute(&m, &s));
        tasks.extend(self.cast((s.sent * c) as f64));
        tasks.extend(self.exchange(&m, &s, self.size.min(2.0)));
        tasks.extend(self.over_tp(&s, Kind::AllGather));
        tasks.push(self.grouped(&s, s.rows, self.gates() * s.ffn, c));
        tasks.push(self.activation(rows * s.ffn as f64, false));
        tasks.extend(self.cast(rows * s.ffn as f64));
        tasks.push(self.grouped(&s, s.rows, c, s.ffn));
        tasks.extend(self.over_tp(&s, Kind::ReduceScatter));
        tasks.extend(self.exchange(&m, &s, 2.0));
        tasks.push(self.permute(&m, &s));
        tasks.extend(self.whole_again());
        tasks.extend(self.shared(&m, false));
        tasks
    }

    /// The activations of a layer once more, from what they read.
    pub(super) fn activations_again(&self, block: Block) -> Vec<Task> {
        let of = |rows: usize, ffn: usize| {
            let mut tasks = vec![self.activation((rows * ffn) as f64, false)];
            tasks.extend(self.cast((rows * ffn) as f64));
            tasks
        };
        if !self.model.has_experts(block) {
            return of(self.tokens(), self.model.ffn.div_ceil(self.tp));
        }
        let m = self.mixture();
        let s = self.share(&m);
        let mut tasks = of(s.experts * s.rows, s.ffn);
        if m.shared_ffn > 0 {
            tasks.extend(of(self.tokens(), m.shared_ffn.div_ceil(self.tp)));
        }
        tasks
    }

    pub(super) fn experts_backward(&self) -> Vec<Task> {
        let m = self.mixture();
        let s = self.share(&m);
        let (c, f) = (self.model.hidden, self.gates() * s.ffn);
        let rows = (s.experts * s.rows) as f64;
        let mut tasks = self.shared(&m, true);
        tasks.push(self.permute(&m, &s));
        tasks.extend(self.exchange(&m, &s, 2.0));
        tasks.extend(self.over_tp(&s, Kind::AllGather));
        tasks.extend(self.cast(rows * (2 * c + s.ffn) as f64));
        tasks.push(self.grouped(&s, s.rows, s.ffn, c));
        tasks.push(self.grouped(&s, s.ffn, c, s.rows).of_weight());
        tasks.extend(self.accumulate(s.experts * s.ffn * c));
        tasks.push(self.activation(rows * s.ffn as f64, true));
        tasks.extend(self.cast(rows * (2 * f + c) as f64));
        tasks.push(self.grouped(&s, s.rows, c, f));
        tasks.push(self.grouped(&s, c, f, s.rows).of_weight());
        tasks.extend(self.accumulate(s.experts * c * f));
        tasks.extend(self.over_tp(&s, Kind::ReduceScatter));
        tasks.extend(self.exchange(&m, &s, 2.0));
        tasks.push(self.permute(&m, &s));
        tasks.extend(self.whole_again());
        // The router's two gradients.
        tasks.extend(self.router(&m, &s));
        tasks.extend(self.router(&m, &s));
        tasks
    }
}
