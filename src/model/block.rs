//! One block: the unit of recomputation, gathering and of the pipeline.

use super::{Norm, Transformer};
use crate::ops;
use crate::spmd::{Block, Chip, Init, Sharded};
use std::ops::Range;

impl Transformer {
    /// Blocks `layers` (from 0), one behind the other, on the residual stream [b, t, c]: each fetches the parameters of the
    /// next where they are split.
    #[track_caller]
    pub fn blocks(&self, chip: &Chip, layers: Range<usize>, x: Sharded) -> Sharded {
        let name = |layer: usize| format!("layers.{layer}.");
        let x = layers.clone().fold(x, |x, layer| {
            // A neighbour with experts has other parameters than one without.
            let alike = |other: &usize| {
                layers.contains(other)
                    && self.mixture_of(layer).is_some() == self.mixture_of(*other).is_some()
            };
            let place = Block {
                name: name(layer),
                before: layer.checked_sub(1).filter(alike).map(name),
                behind: Some(layer + 1).filter(alike).map(name),
            };
            self.block_among(chip, layer, place, x)
        });
        chip.drop_gathers();
        x
    }

    /// Block `layer` (from 0) on the residual stream [b, t, c]; computed again in the backward if the model recomputes.
    #[track_caller]
    pub fn block(&self, chip: &Chip, layer: usize, x: &Sharded) -> Sharded {
        self.blocks(chip, layer..layer + 1, x.clone())
    }

    fn block_among(&self, chip: &Chip, layer: usize, place: Block, x: Sharded) -> Sharded {
        let x = chip.border(&x, &[&place.name]);
        if !self.recompute {
            return chip.within(&place, || self.one_block(chip, layer, &x));
        }
        let model = self.clone();
        let block = move |chip: &Chip, x: &[Sharded]| {
            vec![chip.within(&place, || model.one_block(chip, layer, &x[0]))]
        };
        chip.recompute(&[&x], block).swap_remove(0)
    }

    fn one_block(&self, chip: &Chip, layer: usize, x: &Sharded) -> Sharded {
        let name = format!("layers.{layer}");
        chip.scope(&name, || {
            let n = self.norm(chip, &format!("{name}.norm1"), x);
            let y = chip.scope("attention", || {
                self.attention(chip, &format!("{name}.attention"), &n)
            });
            drop(n);
            let x = x.add(&self.dropout(chip, &format!("{name}.attention.dropout"), &y));
            drop(y);
            let n = self.norm(chip, &format!("{name}.norm2"), &x);
            let y = chip.scope("mlp", || match self.mixture_of(layer) {
                Some(mixture) => self.mixture(chip, layer, mixture, &n),
                None => self.feed_forward(chip, &format!("{name}.mlp"), &n),
            });
            drop(n);
            x.add(&self.dropout(chip, &format!("{name}.mlp.dropout"), &y))
        })
    }

    pub(super) fn norm(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        let (c, eps) = (self.config.hidden, self.config.eps);
        let weight = chip.parameter(
            &format!("{name}.weight"),
            [c],
            chip.replicated(),
            Init::ones(),
        );
        match self.config.norm {
            Norm::RmsNorm => chip.apply_one(ops::RmsNorm { eps, weight: true }, &[x, &weight]),
            Norm::LayerNorm if self.config.bias => {
                let bias = chip.parameter(
                    &format!("{name}.bias"),
                    [c],
                    chip.replicated(),
                    Init::zeros(),
                );
                chip.apply_one(
                    ops::LayerNorm {
                        eps,
                        weight: true,
                        bias: true,
                    },
                    &[x, &weight, &bias],
                )
            }
            Norm::LayerNorm => chip.apply_one(
                ops::LayerNorm {
                    eps,
                    weight: true,
                    bias: false,
                },
                &[x, &weight],
            ),
        }
    }

    pub(super) fn dropout(&self, chip: &Chip, name: &str, x: &Sharded) -> Sharded {
        match (self.config.dropout, self.draw) {
            (p, Some(draw)) if p > 0.0 => chip.apply_one(
                ops::Dropout {
                    p,
                    name: format!("{name}@{draw}"),
                    order: self.order_of(chip, x),
                    rows_before: self.rows_before,
                },
                &[x],
            ),
            _ => x.clone(),
        }
    }
}
