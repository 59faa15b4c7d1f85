//! Prices held against what was published and measured. The published tables are the development set: they were looked at while
//! this was written. Constants come from curves and data sheets, none is fitted to a table.

mod agreement;
mod breadth;
mod calibration;
mod inference;
mod laws;
mod memory;
mod published;
mod single_node;
mod tables;
mod traced;

use super::*;
use crate::cluster::Machine;
use crate::mesh::Mesh;

/// A run of Megatron-LM on A100s: model, pp, dp, batch, micro-batch, chunks, and whether it is the new way (selective recomputation
/// with sequence parallelism) or the old one (everything computed again).
fn megatron(model: &str, [pp, dp, batch, micro, chunks]: [usize; 5], new: bool) -> Setting {
    let mesh = Mesh::new([("pp", pp), ("dp", dp), ("tp", 8)]);
    Setting {
        micro_batch: micro,
        context: 2048,
        virtual_stages: chunks,
        recompute: if new {
            Recompute::Selective
        } else {
            Recompute::Full
        },
        sequence_parallel: new,
        ..Setting::new(model_named(model).unwrap(), mesh, batch)
    }
}

fn a100() -> Machine {
    Machine::named("dgx-a100").unwrap()
}
