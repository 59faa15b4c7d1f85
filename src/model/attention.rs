//! Attention: queries, keys and values split over tp by heads, and over cp by tokens around it.

use super::Transformer;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, Init, Sharded};

impl Transformer {
    pub(super) fn attention(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        if let Some(latent) = &self.config.latent {
            return self.latent_attention(chip, name, latent, x);
        }
        let (c, h, g, d) = (
            self.config.hidden,
            self.config.heads,
            self.config.kv_heads,
            self.config.head_dim(),
        );
        let (b, t) = (x.shape()[0], x.shape()[1]);
        let weight = |which: char, heads: usize| {
            let (weight, bias) = (format!("{name}.w{which}"), format!("{name}.b{which}"));
            self.column(chip, &weight, &bias, [c, heads * d])
        };
        let q_norm = |x: Sharded| self.turn(chip, &format!("{name}.q_norm"), x);
        let k_norm = |x: Sharded| self.turn(chip, &format!("{name}.k_norm"), x);
        let weights = || [weight('q', h), weight('k', g), weight('v', g)];
        let (q, k, v) = match self.beside_gather(chip, x, weights, None) {
            Some([q, k, v]) => (
                q_norm(q.reshape([b, t, h, d])),
                k_norm(k.reshape([b, t, g, d])),
                v.reshape([b, t, g, d]),
            ),
            None => {
                let x = self.whole_over_tp(chip, x);
                let project = |which: char, heads: usize| {
                    let (weight, bias) = weight(which, heads);
                    x.linear(&weight, bias.as_ref(), None)
                        .reshape([b, t, heads, d])
                };
                (
                    q_norm(project('q', h)),
                    k_norm(project('k', g)),
                    project('v', g),
                )
            }
        };
        let o = self.attend(chip, name, [q, k, v]).reshape([b, t, c]);
        self.row(
            chip,
            &format!("{name}.wo"),
            Some(&format!("{name}.bo")),
            [c, c],
            &o,
        )
    }

    /// Causal attention of queries, keys and values [b, t, h, d]; the result lies as the queries do.
    pub(super) fn attend(&self, chip: &Chip, name: &str, [q, k, v]: [Sharded; 3]) -> Sharded {
        if let Some(past) = &self.past {
            return self.attend_past(chip, name, [q, k, v], past);
        }
        self.attend_now(chip, [q, k, v])
    }

    /// The same without a cache; inside of documents if rows hold several.
    pub(super) fn attend_now(&self, chip: &Chip, [q, k, v]: [Sharded; 3]) -> Sharded {
        let op = ops::Attention {
            causal: true,
            documents: self.documents.is_some(),
            ..Default::default()
        };
        if let Some(ring) = self.ring(chip, &q) {
            let documents = self.documents_of(chip, &q);
            let operands: Vec<&Sharded> = [&q, &k, &v].into_iter().chain(&documents).collect();
            return chip.ring_attention(&op, &operands, &ring);
        }
        let by_tokens = q.placements().clone();
        let [q, k, v] = [q, k, v].map(|x| all_tokens_of_some_heads(chip, x));
        // The op has documents for queries and for keys; here they are one.
        let documents = self.documents_of(chip, &q);
        let twice = documents.iter().chain(&documents);
        let operands: Vec<&Sharded> = [&q, &k, &v].into_iter().chain(twice).collect();
        let o = chip.apply_one(op, &operands);
        drop((q, k, v));
        o.redistribute(by_tokens)
    }

    /// Queries or keys as attention takes them: normalized per head and turned by their position, if the model does so.
    fn turn(&self, chip: &Chip, norm: &str, x: Sharded) -> Sharded {
        let x = if self.config.qk_norm {
            let weight = chip.parameter(
                norm,
                [self.config.head_dim()],
                chip.replicated(),
                Init::ones(),
            );
            chip.apply_one(
                ops::RmsNorm {
                    eps: self.config.eps,
                    weight: true,
                },
                &[&x, &weight],
            )
        } else {
            x
        };
        self.turned(chip, x)
    }

    /// Heads [b, t, h, d] turned by their position, if the model does so.
    pub(super) fn turned(&self, chip: &Chip, x: Sharded) -> Sharded {
        match &self.rotary {
            Some(rotary) => {
                let rotary = ops::Rotary {
                    positions: self.rotary_positions(chip, &x),
                    ..rotary.clone()
                };
                chip.apply_one(rotary, &[&x])
            }
            None => x,
        }
    }
}

/// Queries, keys or values [b, t, h, d] as attention takes them: tokens that are split over cp are exchanged for heads.
fn all_tokens_of_some_heads(chip: &Chip, x: Sharded) -> Sharded {
    if chip.size_of("cp") == 1 {
        return x;
    }
    let cp = chip.mesh().axis_index("cp");
    match x.placements()[cp] {
        Shard(1) => x.redistribute(x.placements().with(cp, Shard(2))),
        _ => x,
    }
}
