//! Weights that tp splits, and where the tokens between pairs of them lie.

use super::Transformer;
use crate::ops::Activation;
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::placement::{Placement, Placements};
use crate::spmd::{Chip, Init, Sharded};

impl Transformer {
    /// Where the residual stream lies between pairs of matrices, for tokens [b, t] that lie as `tokens` does.
    pub fn residual_placement(&self, chip: &Chip, tokens: &Placements) -> Placements {
        match self.sequence_parallel && chip.size_of("tp") > 1 {
            true => tokens.with(chip.mesh().axis_index("tp"), Shard(1)),
            false => tokens.clone(),
        }
    }

    /// All the chip's tokens in front of a matrix that tp splits by columns: an all-gather under sequence parallelism.
    pub(super) fn whole_over_tp(&self, chip: &Chip, x: &Sharded) -> Sharded {
        match self.sequence_parallel && chip.size_of("tp") > 1 {
            true => {
                let tp = chip.mesh().axis_index("tp");
                x.redistribute(x.placements().with(tp, Replicate))
            }
            false => x.clone(),
        }
    }

    /// True if products run chunk by chunk beside the transfers of sequence parallelism.
    fn by_chunks(&self, chip: &Chip) -> bool {
        self.collective_matmul && self.sequence_parallel && chip.size_of("tp") > 1
    }

    /// Products of x with weights split by columns, from the tokens that lie between pairs of matrices; none unless they run
    /// chunk by chunk beside the all-gather of the tokens.
    pub(super) fn beside_gather<const N: usize>(
        &self,
        chip: &Chip,
        x: &Sharded,
        weights: impl FnOnce() -> [(Sharded, Option<Sharded>); N],
        activation: Option<Activation>,
    ) -> Option<[Sharded; N]> {
        if !self.by_chunks(chip) {
            return None;
        }
        let weights = weights();
        let each = |x: &Sharded| {
            let product = |(w, b): &(Sharded, Option<Sharded>)| x.linear(w, b.as_ref(), activation);
            weights.iter().map(product).collect()
        };
        let all = chip.gather_and("tp", x, each);
        Some(<[Sharded; N]>::try_from(all).expect("a result for each weight"))
    }

    /// A weight split by columns with its bias: its outputs are split over tp.
    pub(super) fn column(
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
    pub(super) fn weight(
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

    /// How projections that end in the residual stream begin: GPT-2 scales them by the number of them.
    pub(super) fn last_init(&self) -> Init {
        Init::normal(0.02 / (2.0 * self.config.layers as f32).sqrt())
    }

    /// `x w + b` with w split by rows: partial sums are reduced over tp, and the bias is added once, behind it.
    pub(super) fn row(
        &self,
        chip: &Chip,
        name: &str,
        bias: Option<&str>,
        shape: [usize; 2],
        x: &Sharded,
    ) -> Sharded {
        let placed = chip.placed(&[("tp", Shard(0))]);
        let weight = self.weight(chip, name, &shape, placed, self.last_init());
        let bias = bias.filter(|_| self.config.bias);
        let bias =
            bias.map(|b| self.weight(chip, b, &shape[1..], chip.replicated(), Init::zeros()));
        if chip.size_of("tp") == 1 {
            return x.linear(&weight, bias.as_ref(), None);
        }
        if self.by_chunks(chip) {
            let y = chip.scatter_from("tp", x, |x| x.matmul(&weight));
            return match bias {
                Some(bias) => y.add_bias(&bias),
                None => y,
            };
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
}
