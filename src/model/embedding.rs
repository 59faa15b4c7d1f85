//! The first part: token numbers become vectors, learned positions are added.

use super::{Positions, Transformer};
use crate::dtype::DType;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, FromIndex, Init, Sharded};

/// The name of the table of token vectors; a tied model's head is this table too.
pub(crate) const EMBEDDING: &str = "wte";

impl Transformer {
    /// The residual stream [b, t, c] in front of the first block, from token numbers [b, t].
    #[track_caller]
    pub fn embed(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        chip.scope("embedding", || self.vectors(chip, tokens))
    }

    pub(super) fn embedding_table(&self, chip: &Chip, dtype: DType) -> Sharded {
        let (v, c, padded) = (
            self.config.vocab,
            self.config.hidden,
            self.padded_vocab(chip),
        );
        let placement = chip.placed(&[("tp", Shard(0))]);
        let shapes = (vec![v, c], vec![padded, c]);
        chip.parameter_as(EMBEDDING, shapes, placement, Init::normal(0.02), dtype)
    }

    fn vectors(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        let op = ops::Embedding {
            output: Some(self.dtype),
        };
        let table = self.embedding_table(chip, DType::F32);
        let x = chip.apply_one(op.clone(), &[&table, tokens]);
        drop(table);
        let placed = self.residual_placement(chip, tokens.placements());
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
                    &repeated(self.positions(chip, tokens)),
                );
                x.add(&chip.apply_one(op, &[&table, &at]))
            }
        };
        self.dropout(chip, "embedding.dropout", &x)
    }
}

/// The numbers of `row` over and over, by an element's index.
fn repeated(row: Vec<u32>) -> FromIndex<impl Fn(u64) -> u32> {
    FromIndex(move |i| row[i as usize % row.len()])
}
