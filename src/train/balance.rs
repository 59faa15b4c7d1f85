//! What follows a step of a mixture of experts: its loads are added up over the mesh, and the biases that balance it move.

use super::trainer::Training;
use crate::model::{Balance, CLOSE, bias_name, load_name};
use crate::ops::{self, BalanceBias};
use crate::spmd::{Chip, Sharded};
use crate::tensor::Tensor;
use crate::trace::Phase;

/// How a step's tokens were spread over the experts, over all blocks with a mixture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertLoads {
    /// Assignments of tokens to experts.
    pub asked: u64,
    /// Those that found their expert full and were dropped.
    pub dropped: u64,
    /// The largest share of a block's assignments that one expert was asked to take, times the number of experts: 1 is
    /// perfect balance.
    pub busiest: f64,
    /// Tokens whose choice hangs on less than [`Route::CLOSE`](crate::ops::Route::CLOSE), summed over blocks: another mesh may
    /// round them the other way. None of them, and losses do not depend on the mesh but for rounding.
    pub close: u64,
}

/// The same on the chips, before it is read.
pub(super) struct Counted {
    /// (asked, dropped) of the experts of each block: [2 blocks, e].
    loads: Sharded,
    close: Sharded,
}

impl ExpertLoads {
    /// None in a ghost.
    pub(super) fn read(counted: &Counted) -> Option<Self> {
        let all: Vec<f64> = counted.loads.read()?.iter().map(|&x| x.into()).collect();
        let close = counted.close.read()?.sum();
        let experts = counted.loads.shape()[1];
        let rows: Vec<&[f64]> = all.chunks(experts).collect();
        let sum =
            |first: usize| -> f64 { rows.iter().skip(first).step_by(2).copied().flatten().sum() };
        let uneven = |row: &&[f64]| {
            let most = row.iter().copied().fold(0.0, f64::max);
            most * experts as f64 / row.iter().sum::<f64>()
        };
        Some(ExpertLoads {
            asked: sum(0) as u64,
            dropped: sum(1) as u64,
            busiest: rows.iter().step_by(2).map(uneven).fold(0.0, f64::max),
            close: close as u64,
        })
    }
}

impl Training {
    /// Adds up what the step counted, for each axis that splits sequences in one all-reduce of all blocks' loads and one of
    /// close choices, and moves the biases of the model's mixtures. None without a mixture.
    pub(super) fn balance(&self, chip: &Chip) -> Option<Counted> {
        let counts = chip.take_counts();
        let found = |layer: usize| {
            let name = load_name(layer);
            let load = counts.iter().find(|(n, _)| **n == *name);
            load.map(|(_, load)| (layer, load))
        };
        let layers = 0..self.model.config().layers;
        let loads: Vec<(usize, &Sharded)> = layers.filter_map(found).collect();
        if loads.is_empty() {
            return None;
        }
        let close = counts.iter().find(|(name, _)| **name == *CLOSE);
        let (_, close) = close.expect("a router counts close choices beside loads");
        let counted = chip.phase(Phase::Update, || {
            chip.scope("balance", || {
                let parts: Vec<&Sharded> = loads.iter().map(|(_, load)| *load).collect();
                let all = match parts[..] {
                    [one] => one.gather(),
                    _ => chip
                        .apply_one(ops::Concatenate { axis: 0 }, &parts)
                        .gather(),
                };
                for (at, (layer, _)) in loads.iter().enumerate() {
                    self.move_bias(chip, *layer, &all, at);
                }
                Counted {
                    loads: all,
                    close: close.gather(),
                }
            })
        });
        Some(counted)
    }

    fn move_bias(&self, chip: &Chip, layer: usize, loads: &Sharded, at: usize) {
        let Some(mixture) = self.model.mixture_of(layer) else {
            return;
        };
        let Balance::Bias { rate } = mixture.balance else {
            return;
        };
        let name = bias_name(layer);
        let (index, kept) = {
            let all = chip.parameters();
            let index = all.iter().position(|p| *p.name == *name);
            let index = index.unwrap_or_else(|| panic!("the model has no parameter '{name}'"));
            (index, all[index].kept.clone())
        };
        let range = 2 * at..2 * at + 1;
        let load = chip.apply_one(ops::SliceAxis { axis: 0, range }, &[loads]);
        let load = load.reshape([mixture.experts]).redistribute(kept);
        let labels = self.batches.rows() * self.batches.context();
        let rule = BalanceBias {
            rate,
            mean: (labels * mixture.experts_per_token) as f32 / mixture.experts as f32,
        };
        let cost = rule.cost(load.tensor().ty());
        let update = |bias: &mut Tensor, _: &mut [Tensor]| {
            chip.change("balance_bias", &[&load], cost, || {
                rule.update(bias, load.tensor())
            });
        };
        chip.change_kept(index, update);
    }
}
