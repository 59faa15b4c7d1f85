//! What lives where and what moves when: the table of a training's plan, read off a ghost.

use super::trainer::Training;
use crate::dtype::{DType, TensorType};
use crate::error::Result;
use crate::mesh::Mesh;
use crate::placement::{Placement, Placements, local_shape};
use crate::spmd::{Chip, Ghost};
use crate::trace::{Phase, Trace};
use serde::Serialize;
use std::cell::RefCell;
use std::fmt;

/// Where each parameter of a model lies on a mesh, and what one training step moves.
#[derive(Clone, Debug, Serialize)]
pub struct Layout {
    /// The mesh.
    pub mesh: Mesh,
    /// Parameters in order of first use; those of alike layers in one row.
    pub parameters: Vec<Row>,
    /// What the chip of rank 0 sends in a step, by phase, collective and axis.
    pub moves: Vec<Move>,
}

/// Parameters that lie alike: equal names but for the layer's number, equal shapes and placements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
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
    /// Bytes of one of these parameters on the chip of rank 0, in f32.
    pub bytes: u64,
    /// Bytes of one's state on the chip of rank 0: two tensors in f32.
    pub state_bytes: u64,
}

/// All calls of a collective over an axis in one phase of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
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
        let rows = RefCell::new(Vec::new());
        let trace = self.trace_and(ghost, |chip| {
            if chip.is_first() {
                rows.replace(list(chip));
            }
        })?;
        Ok(Layout {
            mesh: ghost.mesh().clone(),
            parameters: rows.into_inner(),
            moves: moves(&trace),
        })
    }
}

fn list(chip: &Chip) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let at = chip.mesh().coordinates(0);
    for p in chip.parameters().iter() {
        let bytes = |placed: &Placements| {
            let shape = local_shape(&p.padded, placed, chip.mesh(), &at);
            TensorType::new(shape, DType::F32).bytes()
        };
        let row = Row {
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

fn moves(trace: &Trace) -> Vec<Move> {
    let mut all: Vec<Move> = Vec::new();
    for event in trace.chip(0).events() {
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
    /// Bytes of parameters and of optimizer state that the chip of rank 0 keeps between steps.
    pub fn kept_bytes(&self) -> (u64, u64) {
        let sum = |bytes: fn(&Row) -> u64| {
            let each = self.parameters.iter().map(|r| r.count as u64 * bytes(r));
            each.sum()
        };
        (sum(|r| r.bytes), sum(|r| r.state_bytes))
    }

    /// Placements by the mesh's names, those that cut alone: `tp cuts 1`.
    fn words(&self, placements: &Placements) -> String {
        let one = |(axis, p): (&crate::mesh::Axis, &Placement)| match p {
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
        writeln!(
            f,
            "what lives where on {} (chip 0; bytes of one)",
            self.mesh
        )?;
        let head = [
            "parameter",
            "count",
            "shape",
            "lies",
            "gradient and state",
            "bytes",
            "state",
        ];
        let line = |f: &mut fmt::Formatter<'_>, c: [&str; 7]| {
            writeln!(
                f,
                "{:<26}{:>6}  {:<16}{:<26}{:<26}{:>12}{:>12}",
                c[0], c[1], c[2], c[3], c[4], c[5], c[6]
            )
        };
        line(f, head)?;
        for r in &self.parameters {
            let (count, shape) = (r.count.to_string(), format!("{:?}", r.shape));
            let (lies, kept) = (self.words(&r.placements), self.words(&r.kept));
            let (bytes, state) = (r.bytes.to_string(), r.state_bytes.to_string());
            line(f, [&r.name, &count, &shape, &lies, &kept, &bytes, &state])?;
        }
        let (bytes, state) = self.kept_bytes();
        line(
            f,
            [
                "in all",
                "",
                "",
                "",
                "",
                &bytes.to_string(),
                &state.to_string(),
            ],
        )?;
        writeln!(f, "\nwhat moves when, in one step (chip 0)")?;
        writeln!(
            f,
            "{:<12}{:<18}{:<8}{:>8}{:>16}{:>16}",
            "phase", "collective", "axis", "calls", "bytes sent", "floor"
        )?;
        for m in &self.moves {
            let phase = format!("{:?}", m.phase).to_lowercase();
            writeln!(
                f,
                "{phase:<12}{:<18}{:<8}{:>8}{:>16}{:>16}",
                m.op, m.axis, m.calls, m.bytes, m.floor_bytes
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
