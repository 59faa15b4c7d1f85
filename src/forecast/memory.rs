//! Bytes on the fullest chip, by cause.

use super::program::Recompute;
use super::schedule::Pipeline;
use super::step::{Counts, Setting};
use crate::cluster::Machine;
use crate::error::Result;

/// Bytes of a chip by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Weights in the type of matmuls' operands.
    pub parameters: f64,
    /// Gradients.
    pub gradients: f64,
    /// Master weights in f32 and two moments.
    pub optimizer: f64,
    /// What forwards keep for backwards.
    pub activations: f64,
    /// Keys and values of tokens that were read.
    pub cache: f64,
    /// The logits of a micro-batch, in f32.
    pub logits: f64,
    /// What the allocator loses.
    pub allocator: f64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.cache
            + self.logits
            + self.allocator
    }

    /// Names and bytes.
    pub fn causes(&self) -> [(&'static str, f64); 7] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("cache", self.cache),
            ("logits", self.logits),
            ("allocator", self.allocator),
        ]
    }
}

/// The memory of the stage that needs most.
pub(super) fn of(setting: &Setting, machine: &Machine, layers: &[Vec<Counts>]) -> Result<Memory> {
    let lost = machine.stack.value("stack.allocator")?;
    let held = setting
        .pipeline
        .held(layers.len(), setting.virtual_stages, setting.micros())?;
    let stages = held.into_iter().enumerate();
    let memories = stages.map(|stage| one(setting, machine, layers, stage, lost));
    Ok(memories.fold(
        Memory::default(),
        |a, b| if b.total() > a.total() { b } else { a },
    ))
}

fn one(
    setting: &Setting,
    machine: &Machine,
    layers: &[Vec<Counts>],
    (stage, live): (usize, usize),
    lost: f64,
) -> Memory {
    let chunks = setting.virtual_stages;
    let (dense, experts) = setting.stage_parameters(layers, stage);
    let zero = setting.stage();
    let (dense_shards, expert_shards) = setting.shards();
    let split = |from: u8| match zero >= from {
        true => dense / dense_shards + experts / expert_shards,
        false => dense + experts,
    };
    let gradient = setting.gradient_bytes(machine);
    let shape = setting.shape(machine);
    let blocks = || {
        layers[stage]
            .iter()
            .flat_map(Counts::each)
            .filter(|(_, n)| *n > 0)
    };
    let bytes = |recompute, block| shape.activation_bytes(recompute, block);
    let kept: f64 = blocks()
        .map(|(block, count)| count as f64 * bytes(setting.recompute, block))
        .sum();
    // A recomputed layer is there whole while its backward runs.
    let whole_again = |block| bytes(Recompute::None, block) - bytes(setting.recompute, block);
    let open = match setting.recompute {
        Recompute::None => 0.0,
        _ => blocks().map(|(b, _)| whole_again(b)).fold(0.0, f64::max),
    };
    let vocab = setting.model.vocab.div_ceil(setting.along("tp"));
    let logits = match stage == setting.last_stage() {
        true => 4.0 * (shape.tokens() * vocab) as f64,
        false => 0.0,
    };
    // Of split parameters two layers are there whole: the one that computes and the one that arrives. Those that are not split
    // again after their use are all there.
    let shards = dense_shards.max(expert_shards) > 1.0;
    let largest = || {
        let sizes = blocks().map(|(b, _)| setting.block_parameters(b));
        sizes.map(|(d, e)| d + e).fold(0.0, f64::max)
    };
    let parameters = match zero == 3 && shards {
        true if setting.reshards(machine) => 2.0 * split(3) + 4.0 * largest(),
        true => 2.0 * split(3) + 2.0 * (dense + experts),
        false => 2.0 * (dense + experts),
    };
    // Two directions need two copies of a layer (DeepSeek-V3, arXiv:2412.19437, table 2), and gradients of both add up before they meet; first
    // and last stage share a chip at either end, so of embedding, head and what predicts each such chip has one.
    let copies = match setting.pipeline {
        Pipeline::DualPipe => 2.0 - setting.end_parameters(layers, stage) / (dense + experts),
        _ => 1.0,
    };
    let gradients_split = if zero == 3 && !setting.reshards(machine) {
        split(4)
    } else {
        split(2)
    };
    let mut memory = Memory {
        parameters: copies * parameters,
        gradients: copies * gradient * gradients_split,
        optimizer: setting.state_bytes(machine) * split(1),
        activations: live as f64 * kept / chunks as f64 + open,
        logits,
        cache: 0.0,
        allocator: 0.0,
    };
    memory.allocator = lost * (memory.activations + memory.logits);
    memory
}
