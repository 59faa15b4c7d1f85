//! Bytes on the fullest chip, by cause.

use super::program::Recompute;
use super::step::Setting;
use crate::cluster::Machine;
use crate::error::Result;
use crate::pipeline::Plan;

/// Bytes of a chip by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Weights in the type of matmuls' operands.
    pub parameters: f64,
    /// Gradients.
    pub gradients: f64,
    /// Master weights and two moments in f32.
    pub optimizer: f64,
    /// What forwards keep for backwards.
    pub activations: f64,
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
            + self.logits
            + self.allocator
    }

    /// Names and bytes.
    pub fn causes(&self) -> [(&'static str, f64); 6] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("logits", self.logits),
            ("allocator", self.allocator),
        ]
    }
}

/// The memory of the stage that needs most.
pub(super) fn of(setting: &Setting, machine: &Machine, layers: &[Vec<usize>]) -> Result<Memory> {
    let lost = machine.stack.value("stack.allocator")?;
    let plan = setting.plan()?;
    let held = plan.held().into_iter().enumerate();
    let memories =
        held.map(|(stage, held)| one(setting, machine, (&plan, layers), (stage, held), lost));
    Ok(memories.fold(
        Memory::default(),
        |a, b| if b.total() > a.total() { b } else { a },
    ))
}

fn one(
    setting: &Setting,
    machine: &Machine,
    (plan, layers): (&Plan, &[Vec<usize>]),
    (stage, held): (usize, usize),
    lost: f64,
) -> Memory {
    let dp = setting.mesh.size_of("dp") as f64;
    let count = layers[stage].iter().sum::<usize>() as f64;
    let first = stage == 0;
    let last = stage == plan.last_stage();
    let ends = first as usize + (last && !(first && setting.config.tied)) as usize;
    let parameters =
        count * setting.layer_parameters() + ends as f64 * setting.embedding_parameters();
    let split = |from: u8| if setting.zero >= from { dp } else { 1.0 };
    let gradient = if machine.stack.word("stack.gradient") == Some("f32") {
        4.0
    } else {
        2.0
    };
    let shape = setting.shape(machine);
    let layer = shape.activation_bytes(setting.recompute);
    let live = held as f64;
    let kept = live * layer * count / plan.chunks() as f64;
    // A recomputed layer is there whole while its backward runs.
    let open = match setting.recompute {
        Recompute::None => 0.0,
        _ => shape.activation_bytes(Recompute::None) - layer,
    };
    let vocab = setting.config.vocab.div_ceil(setting.mesh.size_of("tp"));
    let logits = if last {
        4.0 * (shape.tokens() * vocab) as f64
    } else {
        0.0
    };
    // Of split parameters two layers are there whole: the one that computes and the one that arrives.
    let whole = if setting.zero == 3 && dp > 1.0 {
        4.0 * setting.layer_parameters()
    } else {
        0.0
    };
    let mut memory = Memory {
        parameters: 2.0 * parameters / split(3) + whole,
        gradients: gradient * parameters / split(2),
        optimizer: 12.0 * parameters / split(1),
        activations: kept + open,
        logits,
        allocator: 0.0,
    };
    memory.allocator = lost * (memory.activations + memory.logits);
    memory
}
