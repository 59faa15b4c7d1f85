//! A mixture of experts in place of the feed-forward half (Shazeer et al. 2017; Lepikhin et al. 2020, arXiv:2006.16668; Fedus
//! et al. 2021, arXiv:2101.03961; DeepSeek-AI 2024, arXiv:2412.19437).
//!
//! Axis ep splits the sequences of a batch everywhere but here, as dp does. Here it splits the experts: an all-to-all carries
//! the experts' buffers [e, b, s, c] from chips that have some sequences' tokens to chips that have some experts, and another
//! one carries the results back. So each of the two sends, per chip, layer and forward,
//!
//! `(ep - 1) / ep` of `e s c` elements for each of the chip's sequences, where `s = ceil(factor t k / e)`,
//!
//! that is `factor t k c (ep - 1) / ep` but for the rounding up of s, and the backward sends the same again.
//!
//! | axis | router | buffers | experts' weights |
//! |---|---|---|---|
//! | dp, fsdp | own sequences | own sequences | whole (fsdp keeps a part of each) |
//! | ep | own sequences | own sequences, then own experts | own experts |
//! | tp | all the same | all the same | by the inner width; results are partial sums until tokens are together again |
//! | cp | all tokens of the sequence, gathered | some slots of every expert | whole; each chip's slots give partial sums |
//!
//! What a sequence loses to the capacity depends on the sequence alone: slots are filled in the order of its tokens, which cp
//! gathers for it (and that gathering costs less than sending k copies of each token would).

use super::{Balance, FeedForward, Mixture, Score, Transformer};
use crate::dtype::DType;
use crate::ops;
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::spmd::{Chip, Init, Sharded};

/// The name under which the loads of a block's experts are counted while a model trains: see [`Chip::count`].
pub(crate) fn load_name(layer: usize) -> String {
    format!("layers.{layer}.mlp.experts.load")
}

/// The name under which close choices of all blocks are counted while a model trains: see [`ops::Route`].
pub(crate) const CLOSE: &str = "experts.close";

/// The name of the bias that balances a block's experts.
pub(crate) fn bias_name(layer: usize) -> String {
    format!("layers.{layer}.mlp.router.bias")
}

impl Transformer {
    /// The mixture of block `layer`, if it has one.
    pub fn mixture_of(&self, layer: usize) -> Option<&Mixture> {
        let mixture = self.config.mixture.as_ref();
        mixture.filter(|m| layer >= m.dense_layers)
    }

    /// The feed-forward half of block `layer` on [b, t, c].
    pub(super) fn mixture(&self, chip: &Chip, layer: usize, m: &Mixture, x: &Sharded) -> Sharded {
        let name = format!("layers.{layer}.mlp");
        let shared = self.whole_over_tp(chip, x);
        let tokens = over(chip, "cp", &shared, Replicate);
        let (weights, experts) =
            chip.scope("router", || self.route(chip, layer, &name, m, &tokens));
        let slots = ops::Slots {
            experts: m.experts,
            capacity: m.capacity(tokens.shape()[1]),
            order: None,
        };
        let [slots, origin, load] = three(chip.apply(slots, &[&experts]));
        drop(experts);
        if self.draw.is_some() {
            chip.count(&load_name(layer), &load);
        }
        drop(load);
        // Chips that share a sequence take some slots of every expert each.
        let shares = splits(chip, "cp", &shared, 1);
        let origin = match shares {
            true => over(chip, "cp", &origin, Shard(2)),
            false => origin,
        };
        let sent = chip.apply_one(ops::Dispatch, &[&tokens, &origin, &slots]);
        drop(tokens);
        let by_sequence = sent.placements().clone();
        let sent = chip.scope("dispatch", || over(chip, "ep", &sent, Shard(0)));
        let y = self.experts(chip, &name, m, sent);
        let y = chip.scope("combine", || match chip.mesh().has("ep") {
            true => {
                let ep = chip.mesh().axis_index("ep");
                y.redistribute(y.placements().with(ep, by_sequence[ep]))
            }
            false => y,
        });
        let y = chip.apply_one(ops::Combine, &[&y, &weights, &slots, &origin]);
        drop((weights, slots, origin));
        let y = match shares {
            true => over(chip, "cp", &y, Shard(1)),
            false => y,
        };
        let y = match m.shared_experts {
            0 => y,
            n => {
                let part = self.part(chip, &format!("{name}.shared"), n * m.expert_ffn, &shared);
                y.add(&part)
            }
        };
        drop(shared);
        self.settled(y)
    }

    /// Weights in f32 and numbers in u32 of each token's experts, [b, t, k].
    fn route(
        &self,
        chip: &Chip,
        layer: usize,
        name: &str,
        m: &Mixture,
        tokens: &Sharded,
    ) -> (Sharded, Sharded) {
        let shape = [self.config.hidden, m.experts];
        let init = Init::normal(m.router_init);
        let weight = chip.parameter(
            &format!("{name}.router.weight"),
            shape,
            chip.replicated(),
            init,
        );
        let product = ops::Matmul {
            output: Some(DType::F32),
            ..Default::default()
        };
        let logits = chip.apply_one(product, &[tokens, &weight]);
        let scores = match m.score {
            Score::Softmax => chip.apply_one(ops::Softmax, &[&logits]),
            Score::Sigmoid => chip.apply_one(ops::Sigmoid, &[&logits]),
        };
        let bias = matches!(m.balance, Balance::Bias { .. }).then(|| {
            chip.parameter(
                &bias_name(layer),
                [m.experts],
                chip.replicated(),
                Init::zeros(),
            )
        });
        let rule = ops::Route {
            k: m.experts_per_token,
            bias: bias.is_some(),
            normalize: m.normalize,
            scale: m.scale,
        };
        let mut operands = vec![&scores];
        operands.extend(&bias);
        let [weights, experts, close] = three(chip.apply(rule, &operands));
        if self.draw.is_some() {
            chip.count(CLOSE, &close);
        }
        (self.balanced(chip, m, &scores, weights, &experts), experts)
    }

    /// The weights, with the balance loss joined to them while the model trains.
    fn balanced(
        &self,
        chip: &Chip,
        m: &Mixture,
        scores: &Sharded,
        weights: Sharded,
        experts: &Sharded,
    ) -> Sharded {
        let Balance::Auxiliary { weight } = m.balance else {
            return weights;
        };
        if self.draw.is_none() {
            return weights;
        }
        let loss = ops::BalanceLoss {
            normalize: m.score == Score::Sigmoid,
        };
        let loss = chip.apply_one(loss, &[scores, experts]);
        let sequences = scores.shape()[0] as f32;
        let weight = weight * self.share / sequences;
        chip.apply_one(ops::JoinLoss { weight }, &[&weights, &loss])
    }

    /// All experts on their slots: [e, b, s, c] to [e, b, s, c], partial sums over tp.
    fn experts(&self, chip: &Chip, name: &str, m: &Mixture, x: Sharded) -> Sharded {
        let (e, c, f) = (m.experts, self.config.hidden, m.expert_ffn);
        let into = |which: &str| {
            let placed = chip.placed(&[("ep", Shard(0)), ("tp", Shard(2))]);
            let name = format!("{name}.experts.{which}");
            self.weight(chip, &name, &[e, c, f], placed, Init::normal(0.02))
        };
        let y = self.inner(&x, into);
        drop(x);
        let placed = chip.placed(&[("ep", Shard(0)), ("tp", Shard(1))]);
        let name = format!("{name}.experts.down");
        y.matmul(&self.weight(chip, &name, &[e, f, c], placed, self.last_init()))
    }

    /// A feed-forward part of width f without biases whose result is a partial sum over tp.
    fn part(&self, chip: &Chip, name: &str, f: usize, x: &Sharded) -> Sharded {
        let c = self.config.hidden;
        let into = |which: &str| {
            let placed = chip.placed(&[("tp", Shard(1))]);
            let name = format!("{name}.{which}");
            self.weight(chip, &name, &[c, f], placed, Init::normal(0.02))
        };
        let y = self.inner(x, into);
        let placed = chip.placed(&[("tp", Shard(0))]);
        let name = format!("{name}.down");
        y.matmul(&self.weight(chip, &name, &[f, c], placed, self.last_init()))
    }

    /// What stands between a feed-forward part's first matrices and its last.
    fn inner(&self, x: &Sharded, weight: impl Fn(&str) -> Sharded) -> Sharded {
        match self.config.feed_forward {
            FeedForward::SwiGlu => x.matmul(&weight("gate")).swiglu(&x.matmul(&weight("up"))),
            other => x.linear(&weight("up"), None, other.activation()),
        }
    }

    /// Partial sums over tp reduced to where the residual stream lies.
    fn settled(&self, y: Sharded) -> Sharded {
        let summed = if self.sequence_parallel {
            Shard(1)
        } else {
            Replicate
        };
        let settle = |p: &crate::placement::Placement| if *p == Partial { summed } else { *p };
        let placements: Vec<_> = y.placements().iter().map(settle).collect();
        y.redistribute(placements)
    }
}

/// `x` with another placement over one axis, if the mesh has it.
fn over(chip: &Chip, axis: &str, x: &Sharded, placement: crate::placement::Placement) -> Sharded {
    match chip.mesh().has(axis) {
        true => {
            let axis = chip.mesh().axis_index(axis);
            x.redistribute(x.placements().with(axis, placement))
        }
        false => x.clone(),
    }
}

/// True if the chips along `axis` hold parts of dimension `dim` of x.
fn splits(chip: &Chip, axis: &str, x: &Sharded, dim: usize) -> bool {
    chip.mesh().has(axis) && x.placements()[chip.mesh().axis_index(axis)] == Shard(dim)
}

fn three(results: Vec<Sharded>) -> [Sharded; 3] {
    <[Sharded; 3]>::try_from(results)
        .unwrap_or_else(|all| panic!("three results, not {}", all.len()))
}
