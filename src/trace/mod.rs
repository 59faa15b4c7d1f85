//! What a program did, chip by chip: the contract between running and pricing.
//!
//! Every op and every transfer appends an [`Event`] to its chip's trace, inside named scopes. Threads and ghost give the
//! same events in the same program order; only real runs have times. Chips that do the same form a class, of which one
//! trace is kept. A long run keeps its first and its latest step whole and folds the rest into counters.
//!
//! Memory is read off the trace: each event says how many bytes of tensors were allocated and freed since the one before
//! it and how high the sum of live bytes rose in between.

mod chrome;
mod file;
mod host;
mod products;
mod recorder;
mod summary;

pub use host::{HostCopy, HostTotal};
pub use products::{Product, Shape, Tiles};
pub use recorder::Recorder;
pub use summary::{CollectiveTotal, OpTotal};

use crate::collective::{Algorithm, Kind, Reduce};
use crate::dtype::TensorType;
use crate::mesh::Mesh;
use crate::placement::Placements;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// A computation on this chip.
    Op,
    /// A collective over one mesh axis.
    Collective,
    /// A message to one peer.
    Send,
    /// A message from one peer.
    Receive,
    /// The wait for something that was started earlier.
    Wait,
}

/// Which part of a step an event belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Computing values.
    #[default]
    Forward,
    /// Computing values again for a backward that did not keep them.
    Recompute,
    /// Gradients (of inputs, or of inputs and weights together).
    Backward,
    /// Gradients of weights alone, when separated.
    Weight,
    /// Everything after the gradients: reduction, clipping, optimizer.
    Update,
}

/// On which of a chip's two streams an event runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// In order with computation; the chip waits for it.
    #[default]
    Compute,
    /// Beside computation; ends with a [`EventKind::Wait`].
    Communication,
}

/// An operand or result: this chip's share and its placement on the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    /// The share's shape and type.
    #[serde(flatten)]
    pub ty: TensorType,
    /// The placement, an entry per mesh axis.
    pub placement: Placements,
}

/// What an event moved between chips.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// The mesh axis along which it went.
    pub axis: String,
    /// Chips that meet: all along that axis, or a part of them.
    pub chips: usize,
    /// Where a part of the axis meets, places along it from one of these chips to the next; none where all chips of the axis meet.
    pub stride: Option<usize>,
    /// The collective and its list of steps; none for a single message.
    pub collective: Option<(Kind, Algorithm, Reduce)>,
    /// For a message: the peer's distance along the axis, cyclic.
    pub offset: Option<isize>,
    /// Bytes that this chip sends: the mean over the group where shares are uneven, rounded up.
    pub bytes: u64,
    /// The least that any algorithm over point-to-point links could send, in bytes, likewise.
    pub floor_bytes: u64,
}

/// Bytes of tensors around an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryChange {
    /// Bytes allocated since the event before.
    pub allocated: u64,
    /// Bytes freed since the event before.
    pub freed: u64,
    /// Highest number of live bytes since the event before.
    pub peak: u64,
}

/// When an event ran, in nanoseconds since its run began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Time {
    /// Start.
    pub start_ns: u64,
    /// Length.
    pub duration_ns: u64,
}

/// One thing that a chip did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// What it is.
    pub kind: EventKind,
    /// The op's name, with `.backward` behind it for its gradients.
    pub op: Arc<str>,
    /// Index into [`ChipTrace::scopes`].
    pub scope: u32,
    /// Index into [`ChipTrace::sites`]: where in the program's source it was called.
    pub site: u32,
    /// Part of the step.
    pub phase: Phase,
    /// The stream.
    pub stream: Stream,
    /// Operands.
    pub inputs: Vec<Value>,
    /// Results.
    pub outputs: Vec<Value>,
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read and written on the chip.
    pub bytes: u64,
    /// Bytes of working memory, not counted in `memory`.
    pub scratch: u64,
    /// What moved between chips.
    pub traffic: Option<Traffic>,
    /// Tensor memory.
    pub memory: MemoryChange,
    /// For a started transfer and its wait: the number that joins them.
    pub ticket: Option<u64>,
    /// When it ran; none in a ghost.
    pub time: Option<Time>,
    /// Indices into [`ChipTrace::products`]: its products, in order, where the chip's device chooses how they are cut up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub products: Vec<u32>,
    /// Copies through host memory that transfers between chips took, begun since the event before. To the host goes what a transfer
    /// sends, when it begins; back goes what arrived, when an op first takes it as an operand, a bucket's gradients when they are
    /// waited for. Empty on a processor, and in a ghost that stands for no graphics processor.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host: Vec<HostCopy>,
}

impl Event {
    /// True if both did the same, whenever they did it, however its products were cut up, and whatever went through host memory: a
    /// ghost may stand for any device.
    pub fn same(&self, other: &Event) -> bool {
        let key = |e: &Event| {
            (
                (e.kind, e.op.clone(), e.scope, e.site, e.phase, e.stream),
                (e.flops, e.bytes, e.scratch, e.memory, e.ticket),
            )
        };
        key(self) == key(other)
            && self.inputs == other.inputs
            && self.outputs == other.outputs
            && self.traffic == other.traffic
    }
}

/// A step of a loop, kept whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// The step's number, as the program counts.
    pub number: u64,
    /// Its events.
    pub events: Vec<Event>,
}

/// What one chip did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ChipTrace {
    /// Names of scopes, such as `layer3.attention`; events hold indices.
    pub scopes: Vec<Arc<str>>,
    /// Places in the program's source, `file:line`.
    pub sites: Vec<Arc<str>>,
    /// Events outside of any step: before the first, between steps, after the last.
    pub outside: Vec<Event>,
    /// The first step.
    pub first: Option<Step>,
    /// The latest step, if there were two.
    pub latest: Option<Step>,
    /// How many steps ran.
    pub steps: u64,
    /// Events that were not kept, and are in the totals only.
    pub folded: u64,
    /// Totals over the whole run, kept events included, by op.
    pub ops: Vec<OpTotal>,
    /// Totals over the whole run, kept events included, by collective and axis.
    pub collectives: Vec<CollectiveTotal>,
    /// Highest number of live bytes of tensors.
    pub peak_bytes: u64,
    /// Largest scratch of any op, in bytes.
    pub peak_scratch_bytes: u64,
    /// Copies through host memory over the whole run, on a graphics processor and in a ghost of one; none elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostTotal>,
    /// What products are cut up by on a graphics processor; none on a processor and in a ghost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiles: Option<Tiles>,
    /// The products of the whole run by their sizes, with the tile that each took; empty where `tiles` is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub products: Vec<Product>,
}

impl ChipTrace {
    /// The kept events in program order: those outside of steps first, then the first step, then the latest.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        let steps = self.first.iter().chain(self.latest.iter());
        self.outside.iter().chain(steps.flat_map(|s| &s.events))
    }

    /// The scope's name of an event.
    pub fn scope(&self, event: &Event) -> &str {
        &self.scopes[event.scope as usize]
    }

    /// The source position of an event.
    pub fn site(&self, event: &Event) -> &str {
        &self.sites[event.site as usize]
    }

    /// The first place where two chips' kept events differ, as a sentence. How products were cut up is compared where both
    /// chips have a table of tiles: a ghost has none. What went through host memory is compared where both count it.
    pub fn difference(&self, other: &ChipTrace) -> Option<String> {
        let (a, b) = (self.events().count(), other.events().count());
        for (i, (x, y)) in self.events().zip(other.events()).enumerate() {
            let named =
                |t: &ChipTrace, e: &Event| format!("{} at {}: {e:?}", t.scope(e), t.site(e));
            let same_names = self.scope(x) == other.scope(y) && self.site(x) == other.site(y);
            let mut y_here = y.clone();
            (y_here.scope, y_here.site) = (x.scope, x.site);
            if !same_names || !x.same(&y_here) {
                return Some(format!(
                    "event {i} differs:\n  {}\n  {}",
                    named(self, x),
                    named(other, y)
                ));
            }
            if let Some(tiles) = self.difference_of_tiles(x, other, y) {
                return Some(format!("event {i} differs: {tiles}"));
            }
            if let Some(copies) = self.difference_of_copies(x, other, y) {
                return Some(format!("event {i} differs: {copies}"));
            }
        }
        if a != b {
            return Some(format!("one has {a} events, the other {b}"));
        }
        (self.peak_bytes != other.peak_bytes).then(|| {
            format!(
                "peaks differ: {} and {} bytes",
                self.peak_bytes, other.peak_bytes
            )
        })
    }
}

/// Chips that did the same, and what that was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Class {
    /// One entry per mesh axis: the coordinate that the chips of this class have, or none if it does not matter.
    pub pattern: Vec<Option<usize>>,
    /// The trace of one of them.
    pub chip: ChipTrace,
}

/// What a run did: one trace per class of chips.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trace {
    /// `threads` or `ghost`.
    pub world: String,
    /// The mesh.
    pub mesh: Mesh,
    /// Classes; together they hold every chip once.
    pub classes: Vec<Class>,
}

impl Trace {
    /// The trace of the chip of this rank.
    ///
    /// # Panics
    /// If the mesh has no such rank.
    pub fn chip(&self, rank: usize) -> &ChipTrace {
        let at = self.mesh.coordinates(rank);
        let holds = |class: &&Class| {
            let mut pairs = class.pattern.iter().zip(at.iter());
            pairs.all(|(want, have)| want.is_none_or(|w| w == *have))
        };
        &self
            .classes
            .iter()
            .find(holds)
            .unwrap_or_else(|| panic!("no class of the trace holds rank {rank} ({at})"))
            .chip
    }

    /// The first chip and event in which two runs of one mesh differ, as a sentence; times do not count.
    pub fn difference(&self, other: &Trace) -> Option<String> {
        if self.mesh != other.mesh {
            return Some(format!("meshes differ: {} and {}", self.mesh, other.mesh));
        }
        (0..self.mesh.chips()).find_map(|rank| {
            let difference = self.chip(rank).difference(other.chip(rank))?;
            Some(format!(
                "rank {rank} ({}): {difference}",
                self.mesh.coordinates(rank)
            ))
        })
    }

    /// Highest number of live tensor bytes of each chip, by rank.
    pub fn peak_bytes(&self) -> Vec<u64> {
        (0..self.mesh.chips())
            .map(|rank| self.chip(rank).peak_bytes)
            .collect()
    }
}
