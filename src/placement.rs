//! Where the parts of a tensor lie on a mesh, and what must be sent to move them.
//!
//! Three words, one per mesh axis: along an axis a tensor is cut (`Shard`), copied (`Replicate`), or still to be
//! added up (`Partial`). One table says what turns one word into another ([`transition`]), one says what the
//! backward pass does ([`transpose`]), and [`plan`] strings transitions of single axes together. No layer of a
//! model invents communication of its own: all of it is read off these tables.
//!
//! # Several axes on one dimension
//!
//! When several mesh axes shard one dimension, it is cut in mesh-axis order: the outer axis cuts the whole, the next
//! one cuts each piece. There is no other order, so a placement never needs to remember one. The price: the pieces
//! that inner axes made must be joined before an outer axis can cut or join the same dimension. [`plan`] knows this.
//!
//! # Uneven lengths
//!
//! `len` elements over `parts` chips are cut at `floor(len * i / parts)`, so that sizes differ by at most 1 and some
//! are 0 when `len < parts`. Cutting by 2 and then by 3 is thus not always the same as cutting by 6.
//!
//! # Uneven shares
//!
//! Where the chips along an axis have shares `s_0, s_1, ...` of a sum `S` ([`Mesh::with_shares`]), everything that the axis cuts is
//! cut at `floor(len (s_0 + .. + s_(i-1)) / S)`, by [`cut`]. [`plan`] and [`plan_volume`] count an all-to-all along such an axis
//! as one of equal pieces, which sends as much or more.

mod order;

pub use order::{TokenOrder, TokenRun};

use crate::mesh::{Axis, Mesh};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::fmt;
use std::ops::Range;

/// How a tensor lies along one axis of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Placement {
    /// The chips hold consecutive pieces of this dimension, cut by [`cut`].
    Shard(usize),
    /// Every chip holds the same contents.
    Replicate,
    /// Every chip holds a tensor of the whole shape; the value is their sum.
    Partial,
}

use Placement::{Partial, Replicate, Shard};

impl Placement {
    /// How the settled gradient of a value lies: as the value does, except that every summand of a `Partial` value
    /// has the whole gradient.
    ///
    /// `Partial -> gradient()` is what accumulated contributions need once they are complete: an all-reduce for a
    /// replicated value (the transpose of using one value for different work on each chip), a reduce-scatter for a
    /// sharded one.
    pub fn gradient(self) -> Placement {
        match self {
            Partial => Replicate,
            other => other,
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shard(dim) => f.pad(&format!("Shard({dim})")),
            Replicate => f.pad("Replicate"),
            Partial => f.pad("Partial"),
        }
    }
}

/// One [`Placement`] per mesh axis, outermost first; it reads as a slice and prints as `[Shard(0), Replicate]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Placements(Vec<Placement>);

impl Placements {
    /// `placement` on each of `axes` axes.
    pub fn all(placement: Placement, axes: usize) -> Self {
        Placements(vec![placement; axes])
    }

    /// The same placements with that of axis number `axis` replaced. Panics if there is no such axis.
    #[track_caller]
    pub fn with(&self, axis: usize, placement: Placement) -> Self {
        let mut placements = self.clone();
        placements.0[axis] = placement;
        placements
    }

    /// The placements of the settled gradient: [`Placement::gradient`] on every axis.
    pub fn gradient(&self) -> Self {
        self.iter().map(|placement| placement.gradient()).collect()
    }

    /// True if a sum over chips is still owed on some axis.
    pub fn is_partial(&self) -> bool {
        self.contains(&Partial)
    }

    /// The axes that shard dimension `dim`, outermost first.
    pub fn axes_of(&self, dim: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.len()).filter(move |&axis| self[axis] == Shard(dim))
    }
}

impl<const N: usize> From<[Placement; N]> for Placements {
    fn from(placements: [Placement; N]) -> Self {
        Placements(placements.into())
    }
}

impl From<&[Placement]> for Placements {
    fn from(placements: &[Placement]) -> Self {
        Placements(placements.into())
    }
}

impl From<Vec<Placement>> for Placements {
    fn from(placements: Vec<Placement>) -> Self {
        Placements(placements)
    }
}

impl From<&Placements> for Placements {
    fn from(placements: &Placements) -> Self {
        placements.clone()
    }
}

impl FromIterator<Placement> for Placements {
    fn from_iter<I: IntoIterator<Item = Placement>>(placements: I) -> Self {
        Placements(placements.into_iter().collect())
    }
}

impl std::ops::Deref for Placements {
    type Target = [Placement];

    fn deref(&self) -> &[Placement] {
        &self.0
    }
}

impl fmt::Display for Placements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.iter().map(Placement::to_string).collect();
        f.pad(&format!("[{}]", words.join(", ")))
    }
}

/// Piece `index` of `len` elements cut into `parts`: `floor(len index / parts) .. floor(len (index+1) / parts)`.
///
/// Sizes differ by at most 1; pieces are empty when `len < parts`. Panics if `index >= parts`.
#[track_caller]
pub fn split(len: usize, parts: usize, index: usize) -> Range<usize> {
    assert!(index < parts, "piece {index} of {parts}");
    // u128: a tensor of 2^45 elements over 2^19 chips reaches the end of u64.
    let bound = |i: usize| (len as u128 * i as u128 / parts as u128) as usize;
    bound(index)..bound(index + 1)
}

/// Piece `index` of `len` elements cut along `axis`: by [`split`], or where its chips have shares `s_0, s_1, ...` of a sum `S`,
/// `floor(len (s_0 + .. + s_(index-1)) / S) .. floor(len (s_0 + .. + s_index) / S)`.
///
/// Panics if the axis has no chip `index`.
#[track_caller]
pub fn cut(len: usize, axis: &Axis, index: usize) -> Range<usize> {
    let Some(shares) = axis.shares() else {
        return split(len, axis.size(), index);
    };
    assert!(index < shares.len(), "piece {index} of {}", shares.len());
    let before: usize = shares[..index].iter().sum();
    let bound = |share: usize| (len as u128 * share as u128 / axis.units() as u128) as usize;
    bound(before)..bound(before + shares[index])
}

/// The global indices of dimension `dim` that the chip at `coordinates` holds.
///
/// Each axis that shards `dim` cuts what the axes before it left. Panics as [`local_shape`] does.
#[track_caller]
pub fn local_range(
    global: &[usize],
    dim: usize,
    placements: &Placements,
    mesh: &Mesh,
    coordinates: &[usize],
) -> Range<usize> {
    check(global, placements, mesh).unwrap_or_else(|sentence| panic!("{sentence}"));
    assert_eq!(
        coordinates.len(),
        mesh.axes().len(),
        "coordinates {coordinates:?} on the mesh {mesh}"
    );
    placements.axes_of(dim).fold(0..global[dim], |held, axis| {
        let piece = cut(held.len(), &mesh.axes()[axis], coordinates[axis]);
        held.start + piece.start..held.start + piece.end
    })
}

/// The shape of what the chip at `coordinates` holds of a tensor of shape `global`.
///
/// `Replicate` and `Partial` leave the shape as it is. Panics if there is not one placement and one coordinate per
/// mesh axis, or a placement shards a dimension that the shape lacks.
#[track_caller]
pub fn local_shape(
    global: &[usize],
    placements: &Placements,
    mesh: &Mesh,
    coordinates: &[usize],
) -> Vec<usize> {
    (0..global.len())
        .map(|dim| local_range(global, dim, placements, mesh, coordinates).len())
        .collect()
}

/// True if every chip holds a piece of the same shape: each dimension divides by the sizes of all axes that shard it, whose chips
/// have equal shares.
///
/// Panics as [`local_shape`] does.
#[track_caller]
pub fn splits_evenly(global: &[usize], placements: &Placements, mesh: &Mesh) -> bool {
    check(global, placements, mesh).unwrap_or_else(|sentence| panic!("{sentence}"));
    (0..global.len()).all(|dim| {
        let axes = || placements.axes_of(dim).map(|axis| &mesh.axes()[axis]);
        let equal = axes().all(|axis| axis.shares().is_none());
        equal && global[dim].is_multiple_of(axes().map(Axis::size).product())
    })
}

/// One placement per axis, and no sharded dimension beyond the shape.
fn check(global: &[usize], placements: &Placements, mesh: &Mesh) -> Result<(), String> {
    if placements.len() != mesh.axes().len() {
        return Err(format!(
            "placements {placements} on the mesh {mesh}: {} placements for {} axes; give one per axis",
            placements.len(),
            mesh.axes().len()
        ));
    }
    for (axis, placement) in mesh.axes().iter().zip(placements.iter()) {
        if let Shard(dim) = *placement
            && dim >= global.len()
        {
            return Err(format!(
                "{placement} on axis '{}' of a tensor of shape {global:?}, which has {} dimensions",
                axis.name(),
                global.len()
            ));
        }
    }
    Ok(())
}

/// What the chips along one axis do to turn one placement into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Transition {
    /// `Partial -> Replicate`: everyone gets the sum.
    AllReduce,
    /// `Partial -> Shard(dim)`: everyone gets its piece of the sum.
    ReduceScatter {
        /// The dimension that is cut.
        dim: usize,
    },
    /// `Shard(dim) -> Replicate`: everyone gets all pieces.
    AllGather {
        /// The dimension that is joined.
        dim: usize,
    },
    /// `Replicate -> Shard(dim)`: everyone keeps its piece; nothing is sent.
    Slice {
        /// The dimension that is cut.
        dim: usize,
    },
    /// `Shard(from) -> Shard(to)`: everyone sends everyone a piece of its piece.
    AllToAll {
        /// The dimension that is joined.
        from: usize,
        /// The dimension that is cut.
        to: usize,
    },
}

impl Transition {
    /// The placement that it starts from.
    pub fn source(self) -> Placement {
        match self {
            Transition::AllReduce | Transition::ReduceScatter { .. } => Partial,
            Transition::AllGather { dim } => Shard(dim),
            Transition::Slice { .. } => Replicate,
            Transition::AllToAll { from, .. } => Shard(from),
        }
    }

    /// The placement that it ends in.
    pub fn target(self) -> Placement {
        match self {
            Transition::AllReduce | Transition::AllGather { .. } => Replicate,
            Transition::ReduceScatter { dim } | Transition::Slice { dim } => Shard(dim),
            Transition::AllToAll { to, .. } => Shard(to),
        }
    }

    /// False for a slice, which every chip does by itself.
    pub fn communicates(self) -> bool {
        !matches!(self, Transition::Slice { .. })
    }

    /// Bytes that a group of `n` chips sends per byte of the tensor that the group holds, times `n`: the floors of
    /// the collectives, in whole numbers.
    fn traffic(self, n: u128) -> u128 {
        match self {
            Transition::AllReduce => 2 * (n - 1) * n,
            Transition::ReduceScatter { .. } | Transition::AllGather { .. } => (n - 1) * n,
            Transition::Slice { .. } => 0,
            Transition::AllToAll { .. } => n - 1,
        }
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transition::AllReduce => f.pad("all-reduce"),
            Transition::ReduceScatter { dim } => f.pad(&format!("reduce-scatter({dim})")),
            Transition::AllGather { dim } => f.pad(&format!("all-gather({dim})")),
            Transition::Slice { dim } => f.pad(&format!("slice({dim})")),
            Transition::AllToAll { from, to } => f.pad(&format!("all-to-all({from} to {to})")),
        }
    }
}

/// What turns `from` into `to` along one axis; nothing if they are equal.
///
/// | from, to | `Replicate` | `Shard(b)` | `Partial` |
/// |---|---|---|---|
/// | `Replicate` | nothing | slice | forbidden |
/// | `Shard(a)` | all-gather | all-to-all | forbidden |
/// | `Partial` | all-reduce | reduce-scatter | nothing |
///
/// A finished value has no summands to give back, so nothing becomes `Partial`; the error says what to ask for
/// instead.
pub fn transition(from: Placement, to: Placement) -> Result<Option<Transition>, String> {
    if from == to {
        return Ok(None);
    }
    Ok(Some(match (from, to) {
        (Partial, Replicate) => Transition::AllReduce,
        (Partial, Shard(dim)) => Transition::ReduceScatter { dim },
        (Shard(dim), Replicate) => Transition::AllGather { dim },
        (Replicate, Shard(dim)) => Transition::Slice { dim },
        (Shard(from), Shard(to)) => Transition::AllToAll { from, to },
        (Replicate | Partial, _) => {
            return Err(
                "Replicate cannot become Partial: the chips' copies would be added up; Replicate as it is would \
                 do, or Shard(dim) for a piece each"
                    .into(),
            );
        }
        (Shard(dim), _) => {
            return Err(format!(
                "Shard({dim}) cannot become Partial: a piece is no summand of the whole; Shard({dim}) as it is \
                 would do, or Replicate for all pieces"
            ));
        }
    }))
}

/// What the backward pass of `forward` does along the same axis, given how the gradient of its output lies.
///
/// The input's gradient must end as [`Placement::gradient`] of the input's placement, so the table is
/// `transition(gradient, forward.source().gradient())`; written out:
///
/// | forward | output's gradient | backward | input's gradient |
/// |---|---|---|---|
/// | all-reduce (`Partial -> Replicate`) | `Replicate` | nothing: a copy | `Replicate` |
/// | | `Partial` (consumers differ by chip) | all-reduce | |
/// | reduce-scatter (`Partial -> Shard(d)`) | `Shard(d)` | all-gather | `Replicate` |
/// | all-gather (`Shard(d) -> Replicate`) | `Partial` (consumers differ by chip) | reduce-scatter | `Shard(d)` |
/// | | `Replicate` (consumers identical) | slice | |
/// | slice (`Replicate -> Shard(d)`) | `Shard(d)` | all-gather | `Replicate` |
/// | all-to-all (`Shard(a) -> Shard(b)`) | `Shard(b)` | all-to-all back | `Shard(a)` |
///
/// Other combinations follow the same rule (a gradient that arrives in another dimension is moved by an
/// all-to-all). Every gradient has an answer: a settled gradient is never `Partial`, so nothing forbidden is asked.
/// The identity behind it is `<Fx, y> = <x, F'y>` over global values; see `shard_map`'s transposes in JAX
/// (JEP 17111) for the same table.
pub fn transpose(forward: Transition, gradient: Placement) -> Option<Transition> {
    transition(gradient, forward.source().gradient())
        .expect("the target is a settled gradient's placement, never Partial")
}

/// An ordered list of single-axis transitions, `(axis, transition)`, that turns `from` into `to` on `mesh`.
///
/// Each axis passes only through its old placement, `Replicate`, and its new one. Of all orders that respect the
/// nesting of axes that shard one dimension, the list sends the fewest bytes over the whole mesh (counted at the
/// floors of the collectives), and among those takes the fewest transitions; on a tie the later axis moves first, so
/// that sums over `[Partial, Partial]` run over neighbouring ranks first. The same arguments give the same list on
/// every chip.
///
/// The error says why if the placements do not fit the mesh or `shape`, or an axis would have to become `Partial`.
pub fn plan(
    from: &Placements,
    to: &Placements,
    shape: &[usize],
    mesh: &Mesh,
) -> Result<Vec<(usize, Transition)>, String> {
    check(shape, from, mesh)?;
    check(shape, to, mesh)?;
    for (axis, (&a, &b)) in from.iter().zip(to.iter()).enumerate() {
        transition(a, b).map_err(|sentence| {
            let name = mesh.axes()[axis].name();
            format!("{from} to {to} on axis '{name}': {sentence}")
        })?;
    }
    // The states form a graph of at most 3^axes nodes, so Dijkstra's search is the shortest correct planner: rules
    // of thumb (slice early, gather late) contradict each other as soon as two axes share a dimension.
    let mut heap = BinaryHeap::from([Reverse((0u128, 0usize, Vec::new(), from.clone()))]);
    let mut settled = HashSet::new();
    while let Some(Reverse((bytes, steps, path, state))) = heap.pop() {
        if state == *to {
            let moves = path.into_iter().map(|(Reverse(axis), step)| (axis, step));
            return Ok(moves.collect());
        }
        if !settled.insert(state.clone()) {
            continue;
        }
        for axis in 0..state.len() {
            for next in [Replicate, to[axis]] {
                let Ok(Some(step)) = transition(state[axis], next) else {
                    continue;
                };
                if blocked(&state, axis, step, mesh) {
                    continue;
                }
                let mut path = path.clone();
                path.push((Reverse(axis), step));
                let bytes = bytes + traffic(&state, axis, step, mesh);
                heap.push(Reverse((bytes, steps + 1, path, state.with(axis, next))));
            }
        }
    }
    unreachable!(
        "gathering every shard from the innermost axis outwards and slicing again always leads there"
    )
}

/// Elements of a tensor of this shape that all chips of `mesh` send together to turn `from` into `to`, at the floors of the
/// collectives that [`plan`] lists.
///
/// The error is [`plan`]'s.
pub fn plan_volume(
    from: &Placements,
    to: &Placements,
    shape: &[usize],
    mesh: &Mesh,
) -> Result<u128, String> {
    let (mut state, mut sent) = (from.clone(), 0);
    for (axis, step) in plan(from, to, shape, mesh)? {
        sent += traffic(&state, axis, step, mesh);
        state = state.with(axis, step.target());
    }
    let elements: u128 = shape.iter().map(|&len| len as u128).product();
    let chips: u128 = mesh.axes().iter().map(|axis| axis.size() as u128).product();
    Ok(sent * elements / chips)
}

/// True if an inner axis cuts a dimension that `step` would cut or join on `axis`: the pieces would interleave.
fn blocked(state: &Placements, axis: usize, step: Transition, mesh: &Mesh) -> bool {
    let size = |axis: usize| mesh.axes()[axis].size();
    [step.source(), step.target()].iter().any(|placement| {
        let inner = |other: usize| size(other) > 1 && state[other] == *placement;
        matches!(placement, Shard(_)) && size(axis) > 1 && (axis + 1..state.len()).any(inner)
    })
}

/// Bytes that `step` on `axis` sends over the whole mesh, in units of (bytes of the tensor / chips).
fn traffic(state: &Placements, axis: usize, step: Transition, mesh: &Mesh) -> u128 {
    let sizes = || mesh.axes().iter().map(|axis| axis.size() as u128);
    let n = mesh.axes()[axis].size() as u128;
    // The groups along `axis` hold the tensor once for every chip of the axes that do not cut it.
    let copies: u128 = sizes()
        .enumerate()
        .filter(|&(other, _)| other != axis && !matches!(state[other], Shard(_)))
        .map(|(_, size)| size)
        .product();
    step.traffic(n) * copies * (sizes().product::<u128>() / n)
}

#[cfg(test)]
mod tests;
