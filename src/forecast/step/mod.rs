//! A training step: stages priced from their work, replayed through the pipeline, then gradients and optimizer.

mod layers;
mod price;
mod span;
mod update;

use super::architecture::{Architecture, Block};
use super::memory::{self, Memory};
use super::program::{Again, ContextParallel, Recompute, Shape};
use super::schedule::Pipeline;
use crate::cluster::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::nearest_divisor;
use crate::pipeline::{Plan, Ran};
pub(super) use layers::Counts;
pub(super) use span::{Prices, Span};
use std::collections::BTreeMap;

/// Axes that a training step is split over, outermost first as they are placed if nothing else is said: neighbours lie along `tp`.
pub const AXES: [&str; 6] = ["pp", "dp", "fsdp", "ep", "cp", "tp"];

/// What is trained, and how it is split.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The model.
    pub model: Architecture,
    /// Some of [`AXES`], outermost first; chips next to each other along the last one are neighbours. `dp`, `fsdp` and `ep` split the
    /// sequences, `ep` the experts too.
    pub mesh: Mesh,
    /// Sequences in a step.
    pub global_batch: usize,
    /// Sequences that a chip computes at a time.
    pub micro_batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// The order of forwards and backwards.
    pub pipeline: Pipeline,
    /// Chunks of layers on a stage.
    pub virtual_stages: usize,
    /// What is computed again.
    pub recompute: Recompute,
    /// What is split over the chips that see different sequences: 1 the optimizer's state, 2 gradients too, 3 parameters too
    /// (Rajbhandari et al. 2020). Over `fsdp` 0 means 3.
    pub zero: u8,
    /// Whether norms and dropout are split over `tp`.
    pub sequence_parallel: bool,
    /// Whether products of dense blocks run beside the transfers of sequence parallelism, chunk by chunk.
    pub collective_matmul: bool,
    /// How attention meets the tokens of other chips of `cp`.
    pub context_parallel: ContextParallel,
    /// Type of matmuls: `bf16`, `fp8`, ...
    pub dtype: String,
}

/// What a step costs.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// Seconds of a step.
    pub step_seconds: f64,
    /// Seconds of the busiest stage's kernels, by kernel.
    pub compute_seconds: BTreeMap<&'static str, f64>,
    /// Seconds in which the busiest stage waits for the network, by axis.
    pub exposed: BTreeMap<String, f64>,
    /// Seconds in which the busiest stage waits for other stages.
    pub bubble_seconds: f64,
    /// Seconds in which all wait for slow chips.
    pub straggler_seconds: f64,
    /// Operations of the model for a step, without what is computed again: `6` for each parameter of a matmul and token, and
    /// `12 L s c` for the scores of a token, causal or not (Megatron's rule).
    pub model_flops: f64,
    /// The same with the half of the scores that a causal mask leaves.
    pub causal_flops: f64,
    /// Operations a second of all chips' matrix units, for matmuls of the type in use.
    pub peak: f64,
    /// Share of the matmul peak.
    pub mfu: f64,
    /// Tokens of a step.
    pub tokens: f64,
    /// Bytes on the fullest chip.
    pub memory: Memory,
    /// What the stages did, for a timeline.
    pub timeline: Vec<Vec<Ran>>,
}

impl Setting {
    /// The setting with the defaults of the command line: 1F1B, nothing recomputed or split over dp.
    pub fn new(model: Architecture, mesh: Mesh, global_batch: usize) -> Setting {
        Setting {
            context: model.context,
            model,
            mesh,
            global_batch,
            micro_batch: 1,
            pipeline: Pipeline::ONE_F_ONE_B,
            virtual_stages: 1,
            recompute: Recompute::None,
            zero: 0,
            sequence_parallel: false,
            collective_matmul: false,
            context_parallel: ContextParallel::Ring,
            dtype: "bf16".into(),
        }
    }

    pub(super) fn along(&self, axis: &str) -> usize {
        self.mesh.size_of(axis)
    }

    /// Chips that see different sequences.
    pub fn data(&self) -> usize {
        self.along("dp") * self.along("fsdp") * self.along("ep")
    }

    /// Micro-batches of a step.
    pub fn micros(&self) -> usize {
        self.global_batch / (self.data() * self.micro_batch)
    }

    /// Bytes on the fullest chip.
    ///
    /// # Errors
    /// As [`Setting::check`].
    pub fn memory(&self, machine: &Machine) -> Result<Memory> {
        self.check()?;
        memory::of(self, machine, &self.layers()?)
    }

    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// What does not divide, with both numbers.
    pub fn check(&self) -> Result<()> {
        self.model.check()?;
        let wrong = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        if let Some(axis) = self
            .mesh
            .axes()
            .iter()
            .find(|a| !AXES.contains(&a.name()) && a.size() > 1)
        {
            return wrong(format!(
                "axis '{}' is not priced; {} are",
                axis.name(),
                AXES.join(", ")
            ));
        }
        for axis in AXES {
            let why = "a forecast prices a mesh whose chips do the same";
            self.mesh.refuse_shares(axis, why)?;
        }
        if self.micro_batch == 0 || self.context == 0 || self.virtual_stages == 0 {
            return wrong("micro-batch, context and virtual stages are at least 1".into());
        }
        if self.context > 1 << 32 {
            let tokens = self.context;
            return wrong(format!(
                "a context of {tokens} tokens; at most 2^32 are priced"
            ));
        }
        if self.global_batch > 1 << 32 {
            let sequences = self.global_batch;
            return wrong(format!(
                "a global batch of {sequences} sequences; at most 2^32 are priced"
            ));
        }
        self.check_division()?;
        let each = self.data() * self.micro_batch;
        if self.global_batch == 0 || !self.global_batch.is_multiple_of(each) {
            return wrong(format!(
                "a global batch of {} is not divisible by dp={} x fsdp={} x ep={} times micro-batches of {}; {} is",
                self.global_batch,
                self.along("dp"),
                self.along("fsdp"),
                self.along("ep"),
                self.micro_batch,
                self.global_batch.next_multiple_of(each).max(each)
            ));
        }
        self.plan()?;
        if self.zero > 3 {
            return wrong(format!(
                "there is no ZeRO stage {}; there are 0 to 3",
                self.zero
            ));
        }
        self.layers().map(|_| ())
    }

    fn check_division(&self) -> Result<()> {
        let wrong = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        let (tp, cp, ep) = (self.along("tp"), self.along("cp"), self.along("ep"));
        let m = &self.model;
        if !m.heads.is_multiple_of(tp) {
            return wrong(format!(
                "tp={tp} does not divide {} heads; tp={} does",
                m.heads,
                nearest_divisor(m.heads, tp)
            ));
        }
        if m.latent.is_none() && !m.kv_heads.is_multiple_of(tp) && !tp.is_multiple_of(m.kv_heads) {
            return wrong(format!(
                "tp={tp} neither divides {} kv-heads nor is a multiple of them",
                m.kv_heads
            ));
        }
        self.exchange()?;
        self.check_widths(tp, ep)?;
        if self.sequence_parallel && !self.context.is_multiple_of(tp) {
            return wrong(format!(
                "sequence parallelism splits {} tokens, which are not divisible by tp={tp}; {} are",
                self.context,
                self.context.next_multiple_of(tp)
            ));
        }
        if self.collective_matmul && !self.sequence_parallel {
            return wrong(
                "a collective matmul runs beside the transfers of sequence parallelism; give --sequence-parallel too".into(),
            );
        }
        if self.collective_matmul && cp > 1 {
            return wrong(format!(
                "a collective matmul cuts a chip's tokens into one chunk for each chip of tp, and cp={cp} cuts them too; leave one \
                 of the two out"
            ));
        }
        if cp > self.context {
            return wrong(format!(
                "cp={cp} is more than {} tokens; each chip needs one",
                self.context
            ));
        }
        match m.mixture {
            None if ep > 1 => wrong(format!(
                "ep={ep} splits experts, but the model has none; split sequences over dp instead"
            )),
            Some(e) if !e.experts.is_multiple_of(ep) => wrong(format!(
                "ep={ep} does not divide {} experts; ep={} does",
                e.experts,
                nearest_divisor(e.experts, ep)
            )),
            _ => Ok(()),
        }
    }

    /// Columns and rows of feed-forward parts over `tp`; the vocabulary is padded instead.
    fn check_widths(&self, tp: usize, ep: usize) -> Result<()> {
        let m = &self.model;
        let dense = m.mixture.is_none_or(|x| x.dense_layers > 0 || x.every > 1);
        let experts = m.mixture.filter(|x| !x.experts.is_multiple_of(tp * ep));
        let widths = [
            ("ffn", dense.then_some(m.ffn)),
            ("width of an expert", experts.map(|x| x.ffn)),
            ("width of shared experts", m.mixture.map(|x| x.shared_ffn)),
        ];
        let split = |n: &Option<usize>| n.is_some_and(|n| !n.is_multiple_of(tp));
        match widths.into_iter().find(|(_, n)| split(n)) {
            Some((name, n)) => Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "tp={tp} does not divide {} {name}; tp={} does",
                    n.unwrap_or(0),
                    nearest_divisor(n.unwrap_or(0), tp)
                ),
            )),
            None => Ok(()),
        }
    }

    /// Neighbours of `cp` that exchange tokens for heads. Latent attention has as many keys as heads.
    fn exchange(&self) -> Result<usize> {
        let m = &self.model;
        let keys = m.latent.map_or(m.kv_heads, |_| m.heads);
        let (tp, cp) = (self.along("tp"), self.along("cp"));
        self.context_parallel.exchange(cp, tp, m.heads, keys)
    }

    /// The lists of the stages.
    ///
    /// # Errors
    /// If the schedule does not go with so many chunks a stage.
    pub fn plan(&self) -> Result<Plan> {
        self.pipeline
            .plan(self.along("pp"), self.virtual_stages, self.micros())
    }

    pub(super) fn shape(&self, machine: &Machine) -> Shape<'_> {
        let is = |field: &str, word: &str| machine.stack.word(field) == Some(word);
        Shape {
            model: &self.model,
            batch: self.micro_batch,
            context: self.context,
            tp: self.along("tp"),
            cp: self.along("cp"),
            ep: self.along("ep"),
            context_parallel: self.context_parallel,
            // What was checked.
            exchange: self.exchange().unwrap_or(1),
            sequence_parallel: self.sequence_parallel && self.along("tp") > 1,
            collective_matmul: self.collective_matmul && self.along("tp") > 1,
            fused: is("stack.attention", "fused"),
            dropout: is("stack.dropout", "yes"),
            gradient: self.gradient_bytes(machine),
            accumulates: is("stack.accumulation", "apart"),
            size: super::kernel::element_bytes(&self.dtype),
            imbalance: machine
                .stack
                .find("stack.imbalance")
                .unwrap_or(1.0)
                .max(1.0),
            again: Again::of(machine, self.model.latent.is_some()),
        }
    }

    /// Parameters of a layer on a chip: those that all chips with other sequences share, and experts', of which the chips of `ep`
    /// have others.
    pub(super) fn block_parameters(&self, block: Block) -> (f64, f64) {
        let tp = self.along("tp") as f64;
        let [split, experts, whole] = self.model.block_parameters(block);
        (split / tp + whole, experts / (tp * self.along("ep") as f64))
    }

    /// Parameters of embedding or head on a chip.
    pub(super) fn embedding_parameters(&self) -> f64 {
        self.model.embedding_parameters() / self.along("tp") as f64
    }

    /// Bytes of the optimizer's state for a parameter: master weights in f32, and two moments.
    pub(super) fn state_bytes(&self, machine: &Machine) -> f64 {
        match machine.stack.word("stack.moments") {
            Some("bf16") => 8.0,
            _ => 12.0,
        }
    }

    /// Bytes of an element of a gradient.
    pub(super) fn gradient_bytes(&self, machine: &Machine) -> f64 {
        match machine.stack.word("stack.gradient") {
            Some("f32") => 4.0,
            _ => 2.0,
        }
    }
}
