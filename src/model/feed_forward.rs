//! The feed-forward half of a block.

use super::Transformer;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, Init, Sharded};

impl Transformer {
    pub(super) fn feed_forward(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
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
}
