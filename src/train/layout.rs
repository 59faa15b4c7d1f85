//! What lives where and what moves when: the table of a training's plan, read off a ghost.

use super::trainer::Training;
use crate::dtype::{DType, TensorType};
use crate::error::Result;
use crate::mesh::{Axis, Mesh};
use crate::placement::{Placement, Placements, local_shape};
use crate::spmd::{Chip, Ghost};
use crate::trace::{Phase, Trace};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

/// Where each parameter of a model lies on a mesh, and what one training step moves.
#[derive(Clone, Debug, Serialize)]
pub struct Layout {
    /// The mesh.
    pub mesh: Mesh,
    /// Parameters stage by stage in order of first use; those of alike layers in one row.
    pub parameters: Vec<Row>,
    /// What the first chip of each stage sends in a step, by phase, collective and axis.
    pub moves: Vec<Move>,
}

/// Parameters that lie alike: equal names but for the layer's number, equal shapes and placements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The stage that holds it: the index along mesh axis pp.
    pub stage: usize,
    /// The name, with `*` for the number of a layer.
    pub name: String,
    /// How many there are.
    pub count: usize,
    /// Shape of the whole, padding included.
    pub shape: Vec<usize>,
    /// Where the parameter lies, one placement per mesh axis.
    pub placements: Placements,
    /// Where its reduced gradient and its optimizer state lie.
    pub kept: Placements,
    /// Bytes of one of these parameters on the first chip of the stage, in f32.
    pub bytes: u64,
    /// Bytes of one's state there: two tensors in f32.
    pub state_bytes: u64,
}

/// All calls of a collective over an axis in one phase of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
    /// The stage: the index along mesh axis pp.
    pub stage: usize,
    /// The phase.
    pub phase: Phase,
    /// The collective.
    pub op: String,
    /// The mesh axis.
    pub axis: String,
    /// Calls.
    pub calls: u64,
    /// Bytes that the chip sends.
    pub bytes: u64,
    /// The least that any point-to-point algorithm could send.
    pub floor_bytes: u64,
}

impl Training {
    /// The plan of this training on a ghost's mesh, of whatever size.
    ///
    /// # Errors
    /// What [`Training::check`] finds.
    pub fn layout(&self, ghost: &Ghost) -> Result<Layout> {
        // A ghost traces a chip before it knows which others do the same: the last trace of a stage is the one that counts.
        let rows = RefCell::new(BTreeMap::new());
        let trace = self.trace_and(ghost, |chip| {
            let stage = chip.coordinate("pp");
            rows.borrow_mut().insert(stage, list(chip, stage));
        })?;
        let mesh = ghost.mesh().clone();
        let moves = (0..mesh.size_of("pp")).flat_map(|stage| moves(&trace, stage));
        Ok(Layout {
            parameters: rows.into_inner().into_values().flatten().collect(),
            moves: moves.collect(),
            mesh,
        })
    }
}

fn list(chip: &Chip, stage: usize) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let at = chip.mesh().coordinates(0);
    for p in chip.parameters().iter() {
        let bytes = |placed: &Placements| {
            let shape = local_shape(&p.padded, placed, chip.mesh(), &at);
            TensorType::new(shape, DType::F32).bytes()
        };
        let row = Row {
            stage,
            name: without_number(&p.name),
            count: 1,
            shape: p.padded.clone(),
            placements: p.placements.clone(),
            kept: p.kept.clone(),
            bytes: bytes(&p.placements),
            state_bytes: 2 * bytes(&p.kept),
        };
        let alike = |other: &&mut Row| {
            Row {
                count: 1,
                ..(*other).clone()
            } == row
        };
        match rows.iter_mut().find(alike) {
            Some(found) => found.count += 1,
            None => rows.push(row),
        }
    }
    rows
}

/// `layers.3.mlp.up` as `layers.*.mlp.up`.
fn without_number(name: &str) -> String {
    let part = |p: &str| match p.parse::<usize>() {
        Ok(_) => "*".to_string(),
        Err(_) => p.to_string(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn moves(trace: &Trace, stage: usize) -> Vec<Move> {
    let mut all: Vec<Move> = Vec::new();
    let at = |axis: &Axis| if axis.name() == "pp" { stage } else { 0 };
    let at: Vec<usize> = trace.mesh.axes().iter().map(at).collect();
    for event in trace.chip(trace.mesh.rank_at(&at)).events() {
        let Some(traffic) = &event.traffic else {
            continue;
        };
        let same = |m: &&mut Move| {
            (m.phase, &*m.op, &*m.axis) == (event.phase, &*event.op, &*traffic.axis)
        };
        if let Some(found) = all.iter_mut().find(same) {
            found.calls += 1;
            found.bytes += traffic.bytes;
            found.floor_bytes += traffic.floor_bytes;
        } else {
            all.push(Move {
                stage,
                phase: event.phase,
                op: event.op.to_string(),
                axis: traffic.axis.clone(),
                calls: 1,
                bytes: traffic.bytes,
                floor_bytes: traffic.floor_bytes,
            });
        }
    }
    all
}

impl Layout {
    /// Bytes of parameters and of optimizer state that the first chip of a stage keeps between steps.
    pub fn kept_bytes(&self, stage: usize) -> (u64, u64) {
        let sum = |bytes: fn(&Row) -> u64| {
            let held = self.parameters.iter().filter(|r| r.stage == stage);
            let each = held.map(|r| r.count as u64 * bytes(r));
            each.sum()
        };
        (sum(|r| r.bytes), sum(|r| r.state_bytes))
    }

    /// Placements by the mesh's names, those that cut alone: `tp cuts 1`.
    fn words(&self, placements: &Placements) -> String {
        let one = |(axis, p): (&Axis, &Placement)| match p {
            Placement::Shard(dim) => Some(format!("{} cuts {dim}", axis.name())),
            Placement::Replicate => None,
            Placement::Partial => Some(format!("{} owes a sum", axis.name())),
        };
        let axes = self.mesh.axes().iter().zip(placements.iter());
        let words: Vec<String> = axes.filter_map(one).collect();
        match words.is_empty() {
            true => "whole".into(),
            false => words.join(", "),
        }
    }
}

/// Two tables: what lives where, and what moves when.
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages = self.mesh.size_of("pp");
        // One stage needs no word.
        let of = |stage: usize| match stages {
            1 => String::new(),
            _ => format!("{stage:>5}  "),
        };
        let head = if stages > 1 { "stage  " } else { "" };
        writeln!(
            f,
            "what lives where on {} (the first chip{}; bytes of one)",
            self.mesh,
            if stages > 1 { " of each stage" } else { "" },
        )?;
        let line = |f: &mut fmt::Formatter<'_>, stage: &str, c: [&str; 7]| {
            writeln!(
                f,
                "{stage}{:<26}{:>6}  {:<16}{:<26}{:<26}{:>12}{:>12}",
                c[0], c[1], c[2], c[3], c[4], c[5], c[6]
            )
        };
        let words = [
            "parameter",
            "count",
            "shape",
            "lies",
            "gradient and state",
            "bytes",
            "state",
        ];
        line(f, head, words)?;
        for stage in 0..stages {
            for r in self.parameters.iter().filter(|r| r.stage == stage) {
                let (count, shape) = (r.count.to_string(), format!("{:?}", r.shape));
                let (lies, kept) = (self.words(&r.placements), self.words(&r.kept));
                let (bytes, state) = (r.bytes.to_string(), r.state_bytes.to_string());
                let cells = [&r.name, &count, &shape, &lies, &kept, &bytes, &state];
                line(f, &of(stage), cells.map(String::as_str))?;
            }
            let (bytes, state) = self.kept_bytes(stage);
            let (bytes, state) = (bytes.to_string(), state.to_string());
            line(f, &of(stage), ["in all", "", "", "", "", &bytes, &state])?;
        }
        writeln!(f, "\nwhat moves when, in one step")?;
        writeln!(
            f,
            "{head}{:<12}{:<18}{:<8}{:>8}{:>16}{:>16}",
            "phase", "collective", "axis", "calls", "bytes sent", "floor"
        )?;
        for m in &self.moves {
            let phase = format!("{:?}", m.phase).to_lowercase();
            writeln!(
                f,
                "{}{phase:<12}{:<18}{:<8}{:>8}{:>16}{:>16}",
                of(m.stage),
                m.op,
                m.axis,
                m.calls,
                m.bytes,
                m.floor_bytes
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_number_is_left_out_of_its_name() {
        assert_eq!(without_number("layers.11.mlp.w1"), "layers.*.mlp.w1");
        assert_eq!(without_number("wte"), "wte");
    }
}
