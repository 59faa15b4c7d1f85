//! Which stage has which layers.

use super::Setting;
use crate::error::Result;
use crate::forecast::architecture::Block;
use crate::pipeline::{Plan, layers_of_parts};

/// Layers of a chunk by what they are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Dense ones.
    pub dense: usize,
    /// Mixtures.
    pub mixture: usize,
    /// Those that predict further tokens.
    pub predict: usize,
}

impl Counts {
    /// All of them.
    pub fn sum(&self) -> usize {
        self.dense + self.mixture + self.predict
    }

    /// Kinds and numbers.
    pub fn each(&self) -> [(Block, usize); 3] {
        [
            (Block::Dense, self.dense),
            (Block::Mixture, self.mixture),
            (Block::Predict, self.predict),
        ]
    }

    fn add(&mut self, block: Block) {
        match block {
            Block::Dense => self.dense += 1,
            Block::Mixture => self.mixture += 1,
            Block::Predict => self.predict += 1,
        }
    }
}

impl Setting {
    /// The stage that has the head.
    pub(in super::super) fn last_stage(&self) -> usize {
        self.plan().map_or(0, |plan| plan.last_stage())
    }

    /// Layers of each stage's chunks.
    ///
    /// If they do not divide evenly, embedding and head count as a layer each, as Llama 3 does; if that does not divide either,
    /// the stages with most work (the head by its operations) have a layer less. Layers that predict further tokens stand before
    /// the head.
    ///
    /// # Errors
    /// If there are more chunks than layers, embedding and head, or the schedule does not go with so many.
    pub fn layers(&self) -> Result<Vec<Vec<Counts>>> {
        let (pp, v, layers) = (self.along("pp"), self.virtual_stages, self.model.layers);
        let parts = pp * v;
        let plan = self.plan()?;
        let mut sizes = vec![layers / parts; parts];
        if layers < parts {
            // Embedding and head may be parts of their own.
            sizes = layers_of_parts(layers, parts)?
                .into_iter()
                .map(|r| r.len())
                .collect();
        } else if !layers.is_multiple_of(parts) {
            match (layers + 2).is_multiple_of(parts) && (layers + 2) / parts > 1 {
                true => {
                    sizes = vec![(layers + 2) / parts; parts];
                    sizes[0] -= 1;
                    sizes[parts - 1] -= 1;
                }
                false => self.balance(&plan, &mut sizes),
            }
        }
        let mut all = vec![vec![Counts::default(); v]; pp];
        let mut layer = 0;
        for (part, size) in sizes.into_iter().enumerate() {
            let (stage, chunk) = plan.place(part);
            for _ in 0..size {
                all[stage][chunk].add(self.model.block(layer));
                layer += 1;
            }
        }
        let (stage, chunk) = plan.place(parts - 1);
        all[stage][chunk].predict = self.model.predicted;
        Ok(all)
    }

    /// Gives the layers that are left over to the stages with least work.
    fn balance(&self, plan: &Plan, sizes: &mut [usize]) {
        let parts = sizes.len();
        let m = &self.model;
        let layer = m.forward_flops(self.context, true)
            - 2.0 * (1 + m.predicted) as f64 * m.embedding_parameters();
        let layer = (layer / (m.layers + m.predicted) as f64).max(1.0);
        let head = 2.0 * m.embedding_parameters() / layer;
        let mut work = vec![0.0; self.along("pp")];
        for (part, size) in sizes.iter().enumerate() {
            work[plan.place(part).0] += *size as f64;
        }
        work[plan.place(parts - 1).0] += head + m.predicted as f64 * (1.0 + head);
        work[plan.place(0).0] += 0.1;
        for _ in 0..m.layers % parts {
            // Of equals the earlier stage, and of its parts the one in the middle of the model.
            let key = |part: &usize| {
                let middle = (2 * part).abs_diff(parts - 1);
                (work[plan.place(*part).0], middle)
            };
            let least = sizes.iter().min().copied().unwrap_or(0);
            let open = (0..parts).filter(|p| sizes[*p] == least);
            let chosen = open.min_by(|a, b| {
                let (a, b) = (key(a), key(b));
                a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
            });
            let chosen = chosen.unwrap_or(0);
            sizes[chosen] += 1;
            work[plan.place(chosen).0] += 1.0;
        }
    }
}
