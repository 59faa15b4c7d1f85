//! Uneven shares of the batch over mesh axis dp: named, measured, or those of the run that a checkpoint is of.
//!
//! Chips of unlike speed that have equal work wait for the slowest in every step. Along dp each may take its own share of the
//! sequences instead; losses and gradients are sums over all sequences divided by the labels of the whole batch, so they do not
//! depend on who computed which. Measured shares are a choice of the moment: a checkpoint records them, and a run that goes on from
//! it takes those, or its sums would be in another order.

use super::check::replicas;
use super::checkpoint;
use super::trainer::{Options, Training, number_of};
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::spmd::{Chip, Threads};
use serde_json::{Value, json};
use std::time::Instant;

/// The mesh axis whose chips may have uneven shares.
const AXIS: &str = "dp";

/// The mesh with these shares of the batch over dp, one for each of its chips along it: see [`Mesh::with_shares`].
///
/// # Errors
/// [`ErrorKind::Mesh`] if the mesh has no axis dp, or not so many chips along it, or a share is 0.
pub fn with_shares(mesh: &Mesh, shares: &[usize]) -> Result<Mesh> {
    let shared = mesh.shared(AXIS, shares);
    shared.map_err(|why| Error::new(ErrorKind::Mesh, why))
}

/// How fast the chips along dp are, and the shares of the batch that follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Speeds {
    /// Seconds for the forward and backward of one sequence by each chip along dp. Where other axes split the model too, the chips
    /// along these work together and are one.
    pub seconds: Vec<f64>,
    /// The share of each, in lowest terms.
    pub shares: Vec<usize>,
}

impl Training {
    /// Measures how long the chips along dp take for a forward and backward of this model, all of them at once as in a step but
    /// each for itself, and chooses shares of the batch. Parameters begin as they do in a run; nothing is updated.
    ///
    /// Of all shares that give whole sequences (and micro-batches) it takes those with the smallest sum whose step is at most 5 %
    /// longer than the best one's. A step is taken to last as long as the slowest chip computes, which is its seconds a sequence
    /// times its sequences, and in a pipeline of p stages and m micro-batches (m + p - 1) / m times that.
    ///
    /// # Errors
    /// [`ErrorKind::Mesh`] if dp has one chip, or cannot be uneven, or the batch has fewer sequences than chips; any chip's failure.
    pub fn measure_shares(&self, world: &Threads) -> Result<Speeds> {
        let mesh = world.mesh();
        let chips = mesh.size_of(AXIS);
        if chips == 1 {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "shares are of the batch, over the chips of dp, and the mesh {mesh} has none to share with; dp=2 has"
                ),
            ));
        }
        let wholes = self.wholes(mesh)?;
        let (alone, rows) = self.alone(mesh);
        let world = world.seen_as(mesh.renamed(AXIS, ALONE));
        let axis = mesh.axis_index(AXIS);
        let run = world.run(|chip| alone.timings(chip))?;
        let mut seconds = vec![[0f64; TIMED]; chips];
        for (rank, timed) in run.outputs().iter().enumerate() {
            let slowest = &mut seconds[mesh.coordinates(rank)[axis]];
            slowest
                .iter_mut()
                .zip(timed)
                .for_each(|(s, t)| *s = s.max(*t));
        }
        let least = |all: [f64; TIMED]| all.into_iter().fold(f64::INFINITY, f64::min);
        let seconds: Vec<f64> = seconds
            .into_iter()
            .map(|s| least(s) / rows as f64)
            .collect();
        let shares = choose(&seconds, wholes, mesh.size_of("pp"));
        Ok(Speeds { seconds, shares })
    }

    /// The shares over dp of the run whose checkpoint [`Options::checkpoint`](super::Options) names, one for each chip along it;
    /// none if there is no checkpoint yet, or its run had one chip along dp.
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub fn recorded_shares(&self) -> Result<Option<Vec<usize>>> {
        let Some(dir) = &self.options.checkpoint else {
            return Ok(None);
        };
        let Some(state) = checkpoint::peek(dir)? else {
            return Ok(None);
        };
        match state.other.get(KEY) {
            None => Ok(None),
            Some(shares) => serde_json::from_value(shares.clone())
                .map(Some)
                .map_err(|e| {
                    let why = format!(
                        "the checkpoint in {} has no shares that can be read: {e}",
                        dir.display()
                    );
                    Error::new(ErrorKind::Checkpoint, why)
                }),
        }
    }

    /// How many parts of the batch there are to be shared out over dp: its sequences, or as many as each chip along the other axes
    /// takes at a time.
    fn wholes(&self, mesh: &Mesh) -> Result<usize> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        self.model.check(mesh)?;
        self.check_zero(mesh, true)?;
        let batch = self.batches.rows();
        let others = replicas(&mesh.renamed(AXIS, ALONE));
        let pipeline = mesh.size_of("pp") > 1;
        let micro = self.options.micro_batch.unwrap_or(1).max(1);
        let each = others * micro;
        if !batch.is_multiple_of(each) || batch / each < mesh.size_of(AXIS) {
            let of = match (pipeline || micro > 1, others) {
                (true, _) => format!(", {each} at a time by each,"),
                (_, 1) => String::new(),
                _ => format!(", {each} for each with the chips of fsdp and ep,"),
            };
            let least = each * mesh.size_of(AXIS);
            return refuse(format!(
                "a batch of {batch} sequences cannot be shared out{of} over the {} chips of dp; a batch of {} can",
                mesh.size_of(AXIS),
                batch.next_multiple_of(each).max(least)
            ));
        }
        Ok(batch / each)
    }

    /// The training that each chip along dp runs by itself to be timed, a step of about its even share, and its sequences.
    fn alone(&self, mesh: &Mesh) -> (Training, usize) {
        let others = replicas(&mesh.renamed(AXIS, ALONE));
        let even = (self.batches.rows() / others / mesh.size_of(AXIS)).max(1);
        let usual = if mesh.size_of("pp") > 1 { 1 } else { even };
        let micro = self.options.micro_batch.unwrap_or(usual);
        let rows = micro * others;
        let alone = Training {
            model: self.model.clone(),
            batches: self.batches.with_rows(rows),
            options: Options {
                micro_batch: Some(micro),
                checkpoint: None,
                ..self.options.clone()
            },
        };
        (alone, rows)
    }

    /// Seconds of forwards and backwards on this chip, after one that nobody counts: it makes parameters and compiles kernels.
    fn timings(&self, chip: &Chip) -> [f64; TIMED] {
        self.split_parameters(chip);
        let stages = self.stages(chip);
        let one = |number: u64| {
            let began = Instant::now();
            let loss = chip.step(number, || stages.run(self, chip, number));
            // What was recorded before is done when the loss can be read: a graphics processor works in order.
            number_of(&loss);
            began.elapsed().as_secs_f64()
        };
        one(1);
        std::array::from_fn(|i| one(2 + i as u64))
    }
}

/// The name of dp while its chips are measured: a model does not know it, so nothing is split over it, and nothing sent.
const ALONE: &str = "alone";

/// Timed forwards and backwards, of which the fastest counts.
const TIMED: usize = 3;

/// How much longer than the best a step may be to get simpler shares.
const SIMPLER: f64 = 1.05;

/// Shares for chips that take so many seconds for a part, of which there are `wholes`. The sum of shares divides these.
fn choose(seconds: &[f64], wholes: usize, stages: usize) -> Vec<usize> {
    let sums = (seconds.len()..=wholes).filter(|sum| wholes.is_multiple_of(*sum));
    let all: Vec<(Vec<usize>, f64)> = sums
        .map(|sum| {
            let shares = balanced(seconds, sum);
            let each = seconds.iter().zip(&shares).map(|(t, s)| t * *s as f64);
            let slowest = each.fold(0.0, f64::max) / sum as f64;
            let micros = (wholes / sum) as f64;
            let bubble = (micros + stages as f64 - 1.0) / micros;
            (shares, slowest * bubble)
        })
        .collect();
    let best = all
        .iter()
        .map(|(_, step)| *step)
        .fold(f64::INFINITY, f64::min);
    let simplest = all.into_iter().find(|(_, step)| *step <= best * SIMPLER);
    let shares = simplest.expect("there are as many parts as chips").0;
    lowest(shares)
}

/// `sum` parts, at least one for each chip, the next always to the one that is then done first.
fn balanced(seconds: &[f64], sum: usize) -> Vec<usize> {
    let mut shares = vec![1; seconds.len()];
    for _ in seconds.len()..sum {
        let done = |i: &usize| seconds[*i] * (shares[*i] + 1) as f64;
        let next = (0..shares.len()).min_by(|a, b| done(a).total_cmp(&done(b)));
        shares[next.expect("a chip")] += 1;
    }
    shares
}

/// As a mesh keeps them, with equal ones as 1 each.
fn lowest(shares: Vec<usize>) -> Vec<usize> {
    shares_of(&Mesh::new([(AXIS, shares.len())]).with_shares(AXIS, &shares))
        .unwrap_or_else(|| vec![1; shares.len()])
}

/// The shares over dp, equal ones too; none if it has one chip.
fn shares_of(mesh: &Mesh) -> Option<Vec<usize>> {
    let axis = mesh.axis(AXIS).filter(|a| a.size() > 1)?;
    let equal = || vec![1; axis.size()];
    Some(axis.shares().map_or_else(equal, <[usize]>::to_vec))
}

/// Where a checkpoint keeps the shares.
const KEY: &str = "shares over dp";

/// Notes the shares of a run in what its checkpoint says.
pub(super) fn record(mesh: &Mesh, other: &mut Value) {
    if let Some(shares) = shares_of(mesh) {
        other[KEY] = json!(shares);
    }
}

/// What a checkpoint says without the shares: it belongs to no mesh.
pub(super) fn without(other: &Value) -> Value {
    let mut other = other.clone();
    if let Some(entries) = other.as_object_mut() {
        entries.remove(KEY);
    }
    other
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_speeds() {
        for (seconds, wholes, stages, want) in [
            (vec![1.0, 3.0], 8, 1, vec![3, 1]),
            (vec![3.0, 1.0], 8, 1, vec![1, 3]),
            (vec![1.0, 1.0], 8, 1, vec![1, 1]),
            // 3 % apart: equal shares are within 5 % of the best.
            (vec![1.0, 1.03], 64, 1, vec![1, 1]),
            (vec![1.0, 2.0, 2.0], 12, 1, vec![2, 1, 1]),
            // Nine parts over two equal chips: five and four are the best there is.
            (vec![1.0, 1.0], 9, 1, vec![5, 4]),
            // However slow, a chip of the mesh takes a part.
            (vec![1.0, 1000.0], 4, 1, vec![3, 1]),
            // One micro-batch of all would leave the stages idle.
            (vec![1.0, 3.0], 8, 2, vec![3, 1]),
            (vec![1.0, 1.0], 8, 4, vec![1, 1]),
        ] {
            assert_eq!(
                choose(&seconds, wholes, stages),
                want,
                "{seconds:?} {wholes}"
            );
        }
    }

    #[test]
    fn no_other_shares_of_a_sum_are_faster() {
        let mut state = 7u64;
        let mut draw = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            0.5 + (state >> 40) as f64 / (1u64 << 24) as f64 * 4.0
        };
        for _ in 0..50 {
            let seconds = [draw(), draw(), draw()];
            for sum in 3..12 {
                let slowest = |s: &[usize]| {
                    let all = seconds.iter().zip(s).map(|(t, s)| t * *s as f64);
                    all.fold(0.0, f64::max)
                };
                let got = slowest(&balanced(&seconds, sum));
                for a in 1..sum - 1 {
                    for b in 1..sum - a {
                        let other = slowest(&[a, b, sum - a - b]);
                        assert!(got <= other, "{seconds:?} {sum} {a} {b}");
                    }
                }
            }
        }
    }
}
