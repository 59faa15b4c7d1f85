//! What follows a step of a mixture of experts: its loads are added up over the mesh, and the biases that balance it move.

use super::stages::Stages;
use super::trainer::Training;
use crate::model::{Balance, CLOSE, bias_name, load_name};
use crate::ops::{self, BalanceBias};
use crate::spmd::{Chip, FromIndex, Sharded};
use crate::tensor::Tensor;
use crate::trace::Phase;
use std::ops::Range;

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
    /// Adds up what the step counted, in one all-reduce of all blocks' loads and one of close choices for each axis that splits
    /// sequences, and moves the biases of the model's mixtures; then the stages of a pipeline tell each other. None without a
    /// mixture.
    pub(super) fn balance(&self, chip: &Chip, stages: &Stages) -> Option<Counted> {
        let blocks = 0..self.model.config().layers;
        let blocks: Vec<usize> = blocks
            .filter(|&layer| self.model.mixture_of(layer).is_some())
            .collect();
        let experts = self.model.mixture_of(*blocks.last()?)?.experts;
        let counts = chip.take_counts();
        let counted = |name: &str| counts.iter().find(|(n, _)| **n == *name).map(|(_, x)| x);
        let own: Vec<(usize, &Sharded)> = blocks
            .iter()
            .filter_map(|&layer| counted(&load_name(layer)).map(|load| (layer, load)))
            .collect();
        let zeros =
            |shape: &[usize]| chip.input("nothing", shape, chip.replicated(), &FromIndex(|_| 0f32));
        let sum = || {
            let loads = (!own.is_empty()).then(|| {
                let parts: Vec<&Sharded> = own.iter().map(|(_, load)| *load).collect();
                joined(chip, &parts).gather()
            });
            for (at, (layer, _)) in own.iter().enumerate() {
                let loads = loads.as_ref().expect("a block has a load");
                self.move_bias(chip, *layer, loads, at);
            }
            let here = |layer: &usize| {
                let at = own.iter().position(|(own, _)| own == layer);
                match (at, &loads) {
                    (Some(at), Some(loads)) => rows(chip, loads, 2 * at..2 * at + 2),
                    _ => zeros(&[2, experts]),
                }
            };
            let loads = match loads {
                Some(loads) if own.len() == blocks.len() => loads,
                _ => {
                    let all: Vec<Sharded> = blocks.iter().map(here).collect();
                    joined(chip, &all.iter().collect::<Vec<_>>())
                }
            };
            let close = counted(CLOSE).map_or_else(|| zeros(&[1]), Sharded::gather);
            Counted {
                loads: stages.summed(chip, loads),
                close: stages.summed(chip, close),
            }
        };
        Some(chip.phase(Phase::Update, || chip.scope("balance", sum)))
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
        let load = rows(chip, loads, 2 * at..2 * at + 1);
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

/// Tensors one behind the other.
fn joined(chip: &Chip, parts: &[&Sharded]) -> Sharded {
    match parts {
        [one] => (*one).clone(),
        several => chip.apply_one(ops::Concatenate { axis: 0 }, several),
    }
}

fn rows(chip: &Chip, x: &Sharded, range: Range<usize>) -> Sharded {
    chip.apply_one(ops::SliceAxis { axis: 0, range }, &[x])
}
