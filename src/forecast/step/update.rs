//! What follows the pipeline: gradients are summed over the chips that saw other sequences, and the optimizer changes weights.

use super::{Counts, Prices, Setting, Span};
use crate::cluster::Machine;
use crate::collective::Kind;
use crate::error::Result;
use crate::forecast::architecture::Block;
use crate::forecast::work::{Rows, Work};
use crate::pipeline::Times;

/// Parameters of a chip that are summed over the same axes.
struct Sum {
    parameters: f64,
    /// Axes over which state is split.
    shards: &'static str,
    /// Axes over which it is repeated.
    copies: &'static str,
}

/// Seconds of a step's transfers of parameters and gradients.
#[derive(Clone, Copy, Default)]
struct Moves {
    gather: f64,
    reduce: f64,
}

impl Setting {
    /// What is split over the chips that see other sequences: over `fsdp` everything, if nothing else is said.
    pub(in super::super) fn stage(&self) -> u8 {
        match self.zero {
            0 if self.along("fsdp") > 1 => 3,
            zero => zero,
        }
    }

    /// Axes over which state is split: `fsdp`, or without it all that see other tokens.
    fn sums(&self, layers: &[Vec<Counts>]) -> [Sum; 2] {
        let (dense, experts) = self.most_parameters(layers);
        let [dense_axes, expert_axes] = match (self.along("fsdp") > 1, self.stage()) {
            (true, _) => [("fsdp", "cp+ep+dp"), ("fsdp", "cp+dp")],
            (false, 0) => [("", "cp+ep+dp"), ("", "cp+dp")],
            (false, _) => [("cp+ep+dp", ""), ("cp+dp", "")],
        };
        let sum = |parameters, (shards, copies)| Sum {
            parameters,
            shards,
            copies,
        };
        [sum(dense, dense_axes), sum(experts, expert_axes)]
    }

    /// Chips over which the state of dense parameters and of experts is split.
    pub(in super::super) fn shards(&self) -> (f64, f64) {
        let of = |axes: &[&str]| axes.iter().map(|a| self.along(a)).product::<usize>() as f64;
        match (self.along("fsdp") > 1, self.stage()) {
            (true, _) => (of(&["fsdp"]), of(&["fsdp"])),
            (false, 0) => (1.0, 1.0),
            (false, _) => (of(&["cp", "ep", "dp"]), of(&["cp", "dp"])),
        }
    }

    /// Whether parameters are split again after each use: with a pipeline every micro-batch would gather them anew, so they stay.
    pub(in super::super) fn reshards(&self, machine: &Machine) -> bool {
        match machine.stack.word("stack.reshard") {
            Some("yes") => true,
            Some("no") => false,
            _ => self.along("pp") == 1,
        }
    }

    fn moves(&self, prices: &Prices<'_>, sum: &Sum, gradient: f64) -> Result<Moves> {
        let over = |kind, axes: &str, bytes| -> Result<f64> {
            let work = Work::Collective {
                kind,
                axis: axes.into(),
                bytes,
            };
            prices.network.seconds(&self.mesh, &work)
        };
        let shards: usize = sum.shards.split('+').map(|a| self.along(a)).product();
        let mut moves = Moves::default();
        if self.stage() > 0 {
            moves.gather = over(Kind::AllGather, sum.shards, 2.0 * sum.parameters)?;
            moves.reduce = over(Kind::ReduceScatter, sum.shards, gradient * sum.parameters)?;
        }
        let part = gradient * sum.parameters / shards as f64;
        moves.reduce += over(Kind::AllReduce, sum.copies, part)?;
        Ok(moves)
    }

    /// Gradients over the chips with other sequences, and the optimizer, on the stage with most parameters.
    pub(super) fn update(
        &self,
        machine: &Machine,
        prices: &Prices<'_>,
        times: &Times,
        layers: &[Vec<Counts>],
        span: &mut Span,
    ) -> Result<()> {
        let gradient = self.gradient_bytes(machine);
        let sums = self.sums(layers);
        let mut all = Moves::default();
        for sum in &sums {
            let moves = self.moves(prices, sum, gradient)?;
            all.gather += moves.gather;
            all.reduce += moves.reduce;
        }
        // Parameters that are split are gathered for every forward and backward, gradients that are split reduced for each.
        let micros = self.micros() as f64;
        let each_micro = self.stage() == 3 && self.reshards(machine);
        let gathers = if each_micro { micros } else { 1.0 };
        let again = if each_micro { micros * all.gather } else { 0.0 };
        let reduces = match self.stage() {
            3 if !each_micro => 1.0,
            0 | 1 => 1.0,
            _ => micros,
        };
        // Beside the backward of a micro-batch, or the forward of one; the last layer's gradients and the first one's parameters
        // have nothing to hide behind.
        let count = layers[0].iter().map(Counts::sum).sum::<usize>().max(1) as f64;
        let hidden =
            |moves: f64, window: f64| (moves - window * (count - 1.0) / count).max(moves / count);
        let sum = |table: &[Vec<f64>]| table[0].iter().sum::<f64>();
        let (forward, backward) = (sum(&times.forward), sum(&times.backward));
        let exposed = match machine.stack.word("stack.dp_overlap") {
            Some("yes") => {
                let both = all.reduce + again / micros;
                hidden(all.gather, forward) * gathers + hidden(both, backward) * reduces
            }
            _ => all.reduce * reduces + all.gather * gathers + again,
        };
        let axis = if self.along("fsdp") > 1 { "fsdp" } else { "dp" };
        span.wait(axis, exposed);
        if self.model.tied && self.along("pp") > 1 {
            // First and last stage add up the gradients of the embedding that they share.
            let bytes = gradient * self.embedding_parameters();
            let stride = self.mesh.group(0, "pp").stride();
            let distance = stride * self.last_stage();
            let moves = match distance {
                0 => 0.0,
                _ => prices.network.message(distance, bytes)?,
            };
            span.wait("pp", moves);
        }
        let state = self.state_bytes(machine);
        self.optimize(prices, layers, (gradient, state), span);
        Ok(())
    }

    /// Passes over the state, each a kernel over all of it: the norm reads gradients; clipping reads and writes them; AdamW reads
    /// them, and reads and writes master weights in f32 and two moments; weights are narrowed to 2 bytes; all gradients are set to
    /// zero.
    fn optimize(
        &self,
        prices: &Prices<'_>,
        layers: &[Vec<Counts>],
        (gradient, state): (f64, f64),
        span: &mut Span,
    ) {
        let (dense, experts) = self.most_parameters(layers);
        let (dense_shards, expert_shards) = self.shards();
        let share = dense / dense_shards + experts / expert_shards;
        let passes = gradient + 2.0 * gradient + (gradient + 2.0 * state) + 6.0;
        let bytes = share * passes + (dense + experts) * gradient;
        let step = prices.rates.seconds(&Work::Stream {
            rows: Rows::Optimizer,
            bytes,
        });
        span.seconds += step;
        *span.kernels.entry("optimizer").or_default() += step;
    }

    /// Dense parameters and experts' of the chip that has most.
    pub(in super::super) fn most_parameters(&self, layers: &[Vec<Counts>]) -> (f64, f64) {
        let stages = (0..layers.len()).map(|s| self.stage_parameters(layers, s));
        stages.fold((0.0, 0.0), |a, b| if b.0 + b.1 > a.0 + a.1 { b } else { a })
    }

    /// Parameters of a stage's chip that belong to the ends of the model: embedding, head, layers that predict further tokens.
    pub(in super::super) fn end_parameters(&self, layers: &[Vec<Counts>], stage: usize) -> f64 {
        let predict: usize = layers[stage].iter().map(|c| c.predict).sum();
        let (dense, experts) = match predict {
            0 => (0.0, 0.0),
            _ => self.block_parameters(Block::Predict),
        };
        self.ends(stage) * self.embedding_parameters() + predict as f64 * (dense + experts)
    }

    /// Embeddings and heads of a stage's chip.
    fn ends(&self, stage: usize) -> f64 {
        let ends = (stage == 0) as usize + (stage == self.last_stage()) as usize;
        (if self.model.tied { ends.min(1) } else { ends }) as f64
    }

    /// Dense parameters and experts' of a stage's chip.
    pub(in super::super) fn stage_parameters(
        &self,
        layers: &[Vec<Counts>],
        stage: usize,
    ) -> (f64, f64) {
        let mut sum = (self.ends(stage) * self.embedding_parameters(), 0.0);
        for (block, count) in layers[stage].iter().flat_map(Counts::each) {
            let (dense, experts) = self.block_parameters(block);
            sum.0 += count as f64 * dense;
            sum.1 += count as f64 * experts;
        }
        sum
    }
}
