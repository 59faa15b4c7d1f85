//! The feed-forward half of a block.

use super::Transformer;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, Init, Sharded};

impl Transformer {
    pub(super) fn feed_forward(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        let (c, f) = (self.config.hidden, self.config.ffn);
        let gated = |which: &str| {
            let placed = chip.placed(&[("tp", Shard(1))]);
            let name = format!("{name}.{which}");
            self.weight(chip, &name, &[c, f], placed, Init::normal(0.02))
        };
        let plain = || self.column(chip, &format!("{name}.w1"), &format!("{name}.b1"), [c, f]);
        let activation = self.config.feed_forward.activation();
        let y = match activation {
            Some(_) => match self.beside_gather(chip, x, || [plain()], activation) {
                Some([y]) => y,
                None => {
                    let x = self.whole_over_tp(chip, x);
                    let (w1, b1) = plain();
                    x.linear(&w1, b1.as_ref(), activation)
                }
            },
            None => {
                let both = || ["gate", "up"].map(|which| (gated(which), None));
                match self.beside_gather(chip, x, both, None) {
                    Some([gate, up]) => gate.swiglu(&up),
                    None => {
                        let x = self.whole_over_tp(chip, x);
                        x.matmul(&gated("gate")).swiglu(&x.matmul(&gated("up")))
                    }
                }
            }
        };
        let (down, bias) = match activation {
            Some(_) => ("w2", Some(format!("{name}.b2"))),
            None => ("down", None),
        };
        let down = format!("{name}.{down}");
        self.row(chip, &down, bias.as_deref(), [f, c], &y)
    }
}
