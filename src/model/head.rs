//! The last part: a norm, the projection to the vocabulary, and the loss.

use super::Transformer;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, Init, Sharded};

impl Transformer {
    /// Logits [b, t, v padded] from the residual stream [b, t, c] behind the last block.
    #[track_caller]
    pub fn head(&self, chip: &Chip, x: &Sharded) -> Sharded {
        chip.scope("head", || {
            let x = &chip.border(x, &["norm.", "head"]);
            let x = self.whole_over_tp(chip, &self.norm(chip, "norm", x));
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

    /// The loss at each position [b, t] of logits [b, t, v padded], as [`Transformer::losses`] gives it.
    #[track_caller]
    pub fn losses_of(&self, chip: &Chip, logits: Sharded, labels: &Sharded) -> Sharded {
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
}
