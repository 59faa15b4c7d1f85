//! The best split of a model over a machine's chips, by pricing those that fit.

use super::program::Recompute;
use super::step::{Forecast, Setting};
use crate::cluster::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::Config;
use crate::pipeline::Schedule;
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is searched.
#[derive(Clone, Debug)]
pub struct Search {
    /// The model.
    pub config: Config,
    /// Chips to use.
    pub chips: usize,
    /// Sequences of a step.
    pub global_batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Type of matmuls.
    pub dtype: String,
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Candidates whose sizes divide.
    pub candidates: usize,
    /// Of these, those that do not fit in memory.
    pub too_large: usize,
    /// The best, fastest first.
    pub best: Vec<(Setting, Forecast)>,
}

impl Search {
    /// All settings whose sizes divide: tp and pp, micro-batch, chunks, recomputation, ZeRO stage; sequence parallelism wherever
    /// tp > 1, as it costs nothing. The order pp, dp, tp puts tp on the fastest links; with dp and pp exchanged is tried too.
    pub fn candidates(&self) -> Vec<Setting> {
        let mut all = Vec::new();
        let c = &self.config;
        for tp in (1..=c.kv_heads.min(64))
            .filter(|t| t.is_power_of_two() && self.chips.is_multiple_of(*t))
        {
            for pp in (1..=c.layers.min(128)).filter(|p| (self.chips / tp).is_multiple_of(*p)) {
                let dp = self.chips / tp / pp;
                for order in [["pp", "dp", "tp"], ["dp", "pp", "tp"]] {
                    if (pp == 1 || dp == 1) && order[0] == "dp" {
                        continue;
                    }
                    let size = |axis| match axis {
                        "pp" => pp,
                        "dp" => dp,
                        _ => tp,
                    };
                    let mesh = Mesh::new(order.map(|axis| (axis, size(axis))));
                    self.of_mesh(&mesh, &mut all);
                }
            }
        }
        all
    }

    fn of_mesh(&self, mesh: &Mesh, all: &mut Vec<Setting>) {
        let pp = mesh.size_of("pp");
        for micro_batch in [1, 2, 4, 8] {
            for virtual_stages in [1, 2, 4, 8] {
                for recompute in [Recompute::None, Recompute::Full] {
                    for zero in [1, 3] {
                        let setting = Setting {
                            config: self.config.clone(),
                            mesh: mesh.clone(),
                            global_batch: self.global_batch,
                            micro_batch,
                            context: self.context,
                            schedule: Schedule::OneForwardOneBackward,
                            virtual_stages,
                            recompute,
                            zero,
                            sequence_parallel: mesh.size_of("tp") > 1,
                            dtype: self.dtype.clone(),
                        };
                        let sense = virtual_stages == 1 || pp > 1;
                        if sense && setting.check().is_ok() {
                            all.push(setting);
                        }
                    }
                }
            }
        }
    }

    /// Prices all candidates that fit in memory, on all cores, and keeps the `keep` fastest. `done` counts while it runs.
    ///
    /// # Errors
    /// If nothing divides or nothing fits, with the least memory that was found; if the machine lacks a number.
    pub fn run(&self, machine: &Machine, keep: usize, done: &AtomicUsize) -> Result<Found> {
        let capacity = machine.chip.value("memory.capacity")?;
        let candidates = self.candidates();
        let count = candidates.len();
        if count == 0 {
            let why = format!(
                "no split of {} chips divides {} sequences, {} layers and {} heads",
                self.chips, self.global_batch, self.config.layers, self.config.heads
            );
            return Err(Error::new(ErrorKind::Mesh, why));
        }
        let price = |setting: Setting| -> Result<std::result::Result<(Setting, Forecast), f64>> {
            let bytes = setting.memory(machine)?.total();
            let out = match bytes <= capacity {
                true => {
                    Ok((setting.price(machine)?.without_timeline(), setting)).map(|(f, s)| (s, f))
                }
                false => Err(bytes),
            };
            done.fetch_add(1, Ordering::Relaxed);
            Ok(out)
        };
        let priced: Vec<_> = candidates
            .into_par_iter()
            .map(price)
            .collect::<Result<_>>()?;
        let least = priced
            .iter()
            .filter_map(|p| p.as_ref().err())
            .fold(f64::INFINITY, |a, b| a.min(*b));
        let mut best: Vec<_> = priced.into_iter().filter_map(|p| p.ok()).collect();
        let too_large = count - best.len();
        if best.is_empty() {
            let why = format!(
                "none of {count} splits fits: the smallest needs {:.1} GB a chip of {:.1} GB; use more chips or a smaller context",
                least / 1e9,
                capacity / 1e9
            );
            return Err(Error::new(ErrorKind::Memory, why));
        }
        best.sort_by(|a, b| a.1.step_seconds.total_cmp(&b.1.step_seconds));
        best.truncate(keep);
        Ok(Found {
            candidates: count,
            too_large,
            best,
        })
    }
}
