//! The best split of a model over a machine's chips, by pricing those that fit.
//!
//! A candidate's busiest stage, all its micro-batches one after the other, is a lower bound of its step and costs a few microseconds;
//! the pipeline's replay costs a thousand times that. So candidates are bounded first, on all cores, and replayed in the order of
//! their bounds until no bound lies below the worst of the best.

use super::Architecture;
use super::program::{ContextParallel, Recompute};
use super::schedule::Pipeline;
use super::step::{Forecast, Setting};
use crate::cluster::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::pipeline::Schedule;
use rayon::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is searched.
#[derive(Clone, Debug)]
pub struct Search {
    /// The model.
    pub model: Architecture,
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
    /// Of these, those whose pipeline was replayed; the others cannot be among the best.
    pub replayed: usize,
    /// The best, fastest first.
    pub best: Vec<(Setting, Forecast)>,
    /// For each choice, what the best of all would lose with another: the choice, the other, and the seconds that it takes at least.
    pub against: Vec<(&'static str, String, f64)>,
}

/// The choices of a setting by name, as text.
pub fn choices(s: &Setting) -> [(&'static str, String); 10] {
    let size = |axis: &str| s.along(axis).to_string();
    let recompute = match s.recompute {
        Recompute::None => "none",
        Recompute::Selective => "selective",
        Recompute::Full => "full",
    };
    [
        ("tp", size("tp")),
        ("cp", size("cp")),
        ("pp", size("pp")),
        ("ep", size("ep")),
        ("micro-batch", s.micro_batch.to_string()),
        ("schedule", s.pipeline.name().into()),
        ("virtual-stages", s.virtual_stages.to_string()),
        ("recompute", recompute.into()),
        ("zero", s.zero.to_string()),
        (
            "collective-matmul",
            if s.collective_matmul { "yes" } else { "no" }.into(),
        ),
    ]
}

/// Powers of two up to `most`.
fn powers(most: usize) -> impl Iterator<Item = usize> {
    (0..usize::BITS)
        .map(|b| 1usize << b)
        .take_while(move |p| *p <= most)
}

impl Search {
    /// All settings whose sizes divide: tp, cp, pp and ep, micro-batch, schedule and chunks, recomputation, ZeRO stage; sequence
    /// parallelism wherever tp > 1, as it costs nothing, and there, without cp, products beside its transfers (not with latent attention,
    /// whose products stay whole). The order pp, dp, ep, cp, tp puts tp on the fastest links; with dp outside of pp is tried too.
    pub fn candidates(&self) -> Vec<Setting> {
        let m = &self.model;
        let mut meshes = Vec::new();
        for tp in powers(m.heads.min(64)) {
            for cp in powers((self.context / 1024).clamp(1, 64)) {
                for pp in (1..=m.layers.min(256)).filter(|p| self.chips.is_multiple_of(*p)) {
                    let experts = m.mixture.map_or(1, |e| e.experts);
                    for ep in (1..=experts).filter(|e| experts.is_multiple_of(*e)) {
                        let used = tp * cp * pp * ep;
                        if used > self.chips || !self.chips.is_multiple_of(used) {
                            continue;
                        }
                        let dp = self.chips / used;
                        if dp * ep > self.global_batch {
                            continue;
                        }
                        for order in [["pp", "dp"], ["dp", "pp"]] {
                            if (pp == 1 || dp == 1) && order[0] == "dp" {
                                continue;
                            }
                            let outer = order.map(|a| (a, if a == "pp" { pp } else { dp }));
                            let inner = [("ep", ep), ("cp", cp), ("tp", tp)];
                            meshes.push(Mesh::new(outer.into_iter().chain(inner)));
                        }
                    }
                }
            }
        }
        meshes
            .par_iter()
            .flat_map_iter(|mesh| self.of_mesh(mesh))
            .collect()
    }

    fn of_mesh(&self, mesh: &Mesh) -> Vec<Setting> {
        let mut all = Vec::new();
        let schedules = [
            (Pipeline::ONE_F_ONE_B, 1),
            (Pipeline::ONE_F_ONE_B, 2),
            (Pipeline::ONE_F_ONE_B, 3),
            (Pipeline::ONE_F_ONE_B, 4),
            (Pipeline::ONE_F_ONE_B, 6),
            (Pipeline::ONE_F_ONE_B, 8),
            (Pipeline::Listed(Schedule::ZbH1), 1),
            (Pipeline::Listed(Schedule::ZbV), 2),
        ];
        let alone = mesh.size_of("pp") == 1;
        let chunked = mesh.size_of("tp") > 1 && mesh.size_of("cp") == 1;
        let collective_matmuls = match chunked && self.model.latent.is_none() {
            true => &[false, true][..],
            false => &[false],
        };
        let base = Setting {
            context: self.context,
            sequence_parallel: mesh.size_of("tp") > 1,
            context_parallel: ContextParallel::Ring,
            dtype: self.dtype.clone(),
            ..Setting::new(self.model.clone(), mesh.clone(), self.global_batch)
        };
        for micro_batch in [1, 2, 4, 8] {
            for (pipeline, virtual_stages) in schedules {
                if alone && (pipeline, virtual_stages) != schedules[0] {
                    continue;
                }
                let setting = Setting {
                    micro_batch,
                    pipeline,
                    virtual_stages,
                    ..base.clone()
                };
                if setting.check().is_err() {
                    continue;
                }
                for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                    for zero in [1, 3] {
                        all.extend(collective_matmuls.iter().map(|chunks| Setting {
                            recompute,
                            zero,
                            collective_matmul: *chunks,
                            ..setting.clone()
                        }));
                    }
                }
            }
        }
        all
    }

    /// Prices all candidates that fit in memory, on all cores, and keeps the `keep` fastest. `done` counts while it runs.
    ///
    /// # Errors
    /// If nothing divides or nothing fits, with the least memory that was found; if the machine lacks a number.
    pub fn run(
        &self,
        machine: &Machine,
        candidates: Vec<Setting>,
        keep: usize,
        done: &AtomicUsize,
    ) -> Result<Found> {
        let capacity = machine.chip.value("memory.capacity")?;
        let count = candidates.len();
        if count == 0 {
            let why = format!(
                "no split of {} chips divides {} sequences, {} layers and {} heads; use chips whose factors are among theirs, such as a power of two",
                self.chips, self.global_batch, self.model.layers, self.model.heads
            );
            return Err(Error::new(ErrorKind::Mesh, why));
        }
        let bounded: Vec<(f64, std::result::Result<f64, f64>)> = candidates
            .par_iter()
            .map(|setting| {
                let bytes = setting.memory(machine)?.total();
                let bound = match bytes <= capacity {
                    true => Ok(setting.bound(machine)?),
                    false => {
                        done.fetch_add(1, Ordering::Relaxed);
                        Err(bytes)
                    }
                };
                Ok((bytes, bound))
            })
            .collect::<Result<_>>()?;
        let least = bounded.iter().map(|b| b.0).fold(f64::INFINITY, f64::min);
        let mut fitting: Vec<(f64, &Setting)> = bounded
            .iter()
            .zip(&candidates)
            .filter_map(|((_, bound), s)| Some((bound.ok()?, s)))
            .collect();
        let too_large = count - fitting.len();
        if fitting.is_empty() {
            let why = format!(
                "none of {count} splits fits: the smallest needs {:.1} GB a chip of {:.1} GB; use more chips or a smaller context",
                least / 1e9,
                capacity / 1e9
            );
            return Err(Error::new(ErrorKind::Memory, why));
        }
        fitting.sort_by(|a, b| a.0.total_cmp(&b.0));
        let best: Mutex<Vec<(Setting, Forecast)>> = Mutex::new(Vec::new());
        let replayed = AtomicUsize::new(0);
        // By pieces, so that the best are known soon and the rest is compared with them.
        let prices: Vec<f64> = fitting
            .par_iter()
            .with_max_len(8)
            .map(|(bound, setting)| {
                let worst = {
                    let best = best.lock().unwrap_or_else(|e| e.into_inner());
                    match best.len() < keep {
                        true => f64::INFINITY,
                        false => best[keep - 1].1.step_seconds,
                    }
                };
                done.fetch_add(1, Ordering::Relaxed);
                if *bound >= worst {
                    return Ok(*bound);
                }
                let forecast = setting.price_only(machine)?;
                replayed.fetch_add(1, Ordering::Relaxed);
                let seconds = forecast.step_seconds;
                let mut best = best.lock().unwrap_or_else(|e| e.into_inner());
                keep_best(&mut best, (*setting).clone(), forecast, keep);
                Ok(seconds)
            })
            .collect::<Result<_>>()?;
        let best = best.into_inner().unwrap_or_else(|e| e.into_inner());
        let against = against(&best[0].0, &fitting, &prices);
        Ok(Found {
            candidates: count,
            too_large,
            replayed: replayed.into_inner(),
            best,
            against,
        })
    }
}

/// Inserts a candidate in its place. Of two that take as long on the same mesh, such as those whose recomputation has nothing to do,
/// the one stays that came first or needs less memory.
fn keep_best(best: &mut Vec<(Setting, Forecast)>, setting: Setting, f: Forecast, keep: usize) {
    let same = |(s, g): &(Setting, Forecast)| {
        s.mesh == setting.mesh
            && s.micro_batch == setting.micro_batch
            && s.virtual_stages == setting.virtual_stages
            && s.pipeline == setting.pipeline
            && s.collective_matmul == setting.collective_matmul
            && (g.step_seconds / f.step_seconds - 1.0).abs() <= 1e-9
    };
    if let Some(twin) = best.iter_mut().find(|b| same(b)) {
        if f.memory.total() < twin.1.memory.total() {
            *twin = (setting, f);
        }
        return;
    }
    let at = best.partition_point(|(_, g)| g.step_seconds <= f.step_seconds);
    best.insert(at, (setting, f));
    best.truncate(keep.max(1));
}

/// The best candidate with another value of each choice.
fn against(
    best: &Setting,
    fitting: &[(f64, &Setting)],
    prices: &[f64],
) -> Vec<(&'static str, String, f64)> {
    let mine = choices(best);
    let all: Vec<_> = fitting.iter().map(|(_, s)| choices(s)).collect();
    let mut out = Vec::new();
    for (i, (name, value)) in mine.iter().enumerate() {
        let others = (0..all.len()).filter(|c| all[*c][i].1 != *value);
        let other = others.min_by(|a, b| prices[*a].total_cmp(&prices[*b]));
        if let Some(c) = other {
            out.push((*name, all[c][i].1.clone(), prices[c]));
        }
    }
    out
}
