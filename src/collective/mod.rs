//! Collectives as data: what one chip of a group does, as a list of steps.
//!
//! [`schedule`] is a pure function from (kind, algorithm, element counts, group size, own index) to a [`Schedule`].
//! One executor runs the list, one pricer walks it, and [`prove`] runs all lists of a group on symbols. Choosing an
//! algorithm is choosing a list; a list knows nothing of threads, devices or element types.
//!
//! # Meaning of a list
//!
//! A chip has three buffers of elements: `Input` (never written), `Output`, and `Scratch`. Steps run in order. In a
//! [`Step::Round`] every send and receive is posted at once and the round ends when all have completed; a send
//! completes only when it was received. Transfers from one chip to another match in order, and no list relies on a
//! round of one chip meeting "the same" round of another. Transfers of no elements are left out, on both sides,
//! except in a barrier, where the message is all there is.
//!
//! # What the buffers hold
//!
//! | kind | counts | `Input` | `Output` |
//! |---|---|---|---|
//! | all-reduce | `Len(len)` | `len` | `len`: the reduction |
//! | reduce-scatter | per chip `c` | all chunks in order | chunk `index` of the reduction |
//! | all-gather | per chip `c` | chunk `index` | all chunks in order |
//! | all-to-all | `c[source][destination]` | a block for each destination, in order | one from each source |
//! | broadcast | `Len(len)` | `len` on the root, nothing elsewhere | `len` |
//! | shift | per chip `c` | `c[index]` | `c[index - 1]`, cyclic: what the chip before brought |
//! | barrier | any | | |
//!
//! # Orders of sums
//!
//! Every algorithm adds in an order that depends only on the group's size, and [`order`] states it. A
//! [`Step::Reduce`] computes in f32 and rounds once into the element type. [`Algorithm::Tree`], the default, has
//! all summands of an element in one place before it adds any, so a narrow type is rounded once in all; the other
//! algorithms round at every hop.

mod order;
mod proof;
mod recursive;
mod ring;
mod tree;
mod volume;

pub use order::{Expression, order, tree, tree_sum};
pub use proof::prove;
pub use recursive::{
    recursive_all_gather, recursive_all_reduce, recursive_all_to_all, recursive_broadcast,
    recursive_reduce_scatter,
};
pub use ring::{
    ring_all_gather, ring_all_reduce, ring_all_to_all, ring_broadcast, ring_reduce_scatter, shift,
};
pub use tree::{
    barrier, tree_all_gather, tree_all_reduce, tree_all_to_all, tree_broadcast, tree_reduce_scatter,
};
pub use volume::{floor_elements, rounds, scratch_elements, sent_elements};

use crate::placement::split;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// What a collective leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Everyone gets the reduction of all inputs.
    AllReduce,
    /// Everyone gets its chunk of the reduction of all inputs.
    ReduceScatter,
    /// Everyone gets all inputs, one after another.
    AllGather,
    /// Everyone gets its block of every input.
    AllToAll,
    /// Everyone gets the input of one chip.
    Broadcast {
        /// Index of that chip in the group.
        root: usize,
    },
    /// Everyone gets the input of the chip before it; the first that of the last.
    Shift,
    /// No one goes on before all have arrived.
    Barrier,
}

impl Kind {
    /// True if elements are added up (or compared) on the way.
    pub fn reduces(self) -> bool {
        matches!(self, Kind::AllReduce | Kind::ReduceScatter)
    }

    /// True if chip `index` of the group sends, adds or copies its input, where it has one.
    pub fn reads_input(self, index: usize) -> bool {
        match self {
            Kind::Broadcast { root } => index == root,
            Kind::Barrier => false,
            _ => true,
        }
    }

    /// The name in traces: `all-reduce`, `reduce-scatter`, `all-gather`, `all-to-all`, `broadcast`, `shift`,
    /// `barrier`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::AllReduce => "all-reduce",
            Kind::ReduceScatter => "reduce-scatter",
            Kind::AllGather => "all-gather",
            Kind::AllToAll => "all-to-all",
            Kind::Broadcast { .. } => "broadcast",
            Kind::Shift => "shift",
            Kind::Barrier => "barrier",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a collective is done.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Pairwise exchange; sums are local, by the fixed binary tree over the chips ([`tree()`]). Broadcast is a
    /// binomial tree. Few rounds, and as many bytes as a ring.
    #[default]
    Tree,
    /// Neighbour to neighbour around a ring: `n - 1` rounds, bandwidth-optimal (Patarasuk and Yuan, 2009).
    Ring,
    /// Halving and doubling: about `log2 n` rounds (Rabenseifner, 2004; Bruck et al., 1997).
    Recursive,
}

impl Algorithm {
    /// The name in traces and flags: `tree`, `ring`, `recursive`.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Tree => "tree",
            Algorithm::Ring => "ring",
            Algorithm::Recursive => "recursive",
        }
    }
}

impl std::str::FromStr for Algorithm {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Algorithm::Tree, Algorithm::Ring, Algorithm::Recursive]
            .into_iter()
            .find(|a| a.name() == s)
            .ok_or_else(|| format!("'{s}' is no algorithm; choose tree, ring or recursive"))
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How two elements become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// `a + b`.
    Sum,
    /// The larger of the two; NaN if either is.
    Max,
}

/// Which of a chip's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Buffer {
    /// What the chip brings; never written.
    Input,
    /// What the chip takes away.
    Output,
    /// Working space of [`Schedule::scratch`] elements, contents undefined at the start.
    Scratch,
}

/// A run of elements in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// Which buffer.
    pub buffer: Buffer,
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl Place {
    fn new(buffer: Buffer, range: Range<usize>) -> Self {
        Place {
            buffer,
            start: range.start,
            len: range.len(),
        }
    }

    /// The elements as an index range into the buffer.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.len
    }
}

/// One side of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Transfer {
    /// The other chip, by its index in the group.
    pub peer: usize,
    /// What is read (by a send) or written (by a receive).
    pub place: Place,
}

/// One thing that a chip does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Post everything, then wait for everything. Receives overlap neither each other nor the sends. Where there
    /// are several peers they are listed by distance (`index + 1`, `index + 2`, ...), so that a wire that works
    /// through the list in order keeps every chip busy with a different peer: the classical pairwise exchange.
    Round {
        /// What goes out.
        sends: Vec<Transfer>,
        /// What comes in.
        receives: Vec<Transfer>,
    },
    /// `into[e] = reduction over the sources s of s[e]`, by the fixed binary tree ([`tree()`]) over the sources in the
    /// order listed, in f32, rounded once. At least two sources, all as long as `into`, none overlapping it.
    Reduce {
        /// The summands, in the order of the sum.
        sources: Vec<Place>,
        /// The result.
        into: Place,
    },
    /// `into = from`, equally long and apart.
    Copy {
        /// What is read.
        from: Place,
        /// What is written.
        into: Place,
    },
}

/// What one chip of a group does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// Elements of [`Buffer::Scratch`] that the steps need.
    pub scratch: usize,
}

impl Schedule {
    /// Elements that this chip sends.
    pub fn sent_elements(&self) -> u64 {
        self.sends().map(|send| send.place.len as u64).sum()
    }

    /// Elements that this chip receives.
    pub fn received_elements(&self) -> u64 {
        let receives = self.steps.iter().flat_map(|step| match step {
            Step::Round { receives, .. } => receives.as_slice(),
            _ => &[],
        });
        receives.map(|receive| receive.place.len as u64).sum()
    }

    /// Messages that this chip sends.
    pub fn messages(&self) -> usize {
        self.sends().count()
    }

    /// Rounds that this chip takes part in.
    pub fn rounds(&self) -> usize {
        let rounds = self.steps.iter();
        rounds.filter(|s| matches!(s, Step::Round { .. })).count()
    }

    fn sends(&self) -> impl Iterator<Item = &Transfer> {
        self.steps.iter().flat_map(|step| match step {
            Step::Round { sends, .. } => sends.as_slice(),
            _ => &[],
        })
    }

    /// Appends a round without its empty transfers; nothing if none is left.
    fn round(&mut self, mut sends: Vec<Transfer>, mut receives: Vec<Transfer>) {
        sends.retain(|send| send.place.len > 0);
        receives.retain(|receive| receive.place.len > 0);
        if !sends.is_empty() || !receives.is_empty() {
            self.steps.push(Step::Round { sends, receives });
        }
    }

    /// Appends a reduction: a copy if there is one source, nothing if there are no elements.
    fn reduce(&mut self, sources: Vec<Place>, into: Place) {
        if let [from] = sources[..] {
            self.copy(from, into);
        } else if into.len > 0 {
            self.steps.push(Step::Reduce { sources, into });
        }
    }

    /// Appends a copy, unless there is nothing to copy.
    fn copy(&mut self, from: Place, into: Place) {
        if into.len > 0 {
            self.steps.push(Step::Copy { from, into });
        }
    }

    /// `len` more elements of scratch.
    fn claim(&mut self, len: usize) -> Place {
        let place = Place::new(Buffer::Scratch, self.scratch..self.scratch + len);
        self.scratch += len;
        place
    }
}

/// How many elements each chip, or pair of chips, has to do with.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Counts {
    /// A vector of this many elements, cut by [`split`] where it is cut: chunk `c` is `split(len, n, c)`; in an
    /// all-to-all every chip's input is cut so.
    Len(usize),
    /// Chunk `c` has the `c`-th of these lengths. For reduce-scatter, all-gather and shift.
    Each(Vec<usize>),
    /// The block from chip `s` to chip `d` has `rows[s] * columns[d]` elements: what moving a cut from one dimension
    /// to another gives. For all-to-all.
    Product {
        /// One per source.
        rows: Vec<usize>,
        /// One per destination.
        columns: Vec<usize>,
    },
    /// The block from chip `s` to chip `d` has `matrix[s][d]` elements. For all-to-all.
    Matrix(Vec<Vec<usize>>),
}

impl Counts {
    /// Elements in chunk `chunk` of `n`. Panics for all-to-all counts or the wrong `n`.
    #[track_caller]
    pub fn chunk(&self, n: usize, chunk: usize) -> usize {
        self.check_size(n);
        match self {
            Counts::Len(len) => split(*len, n, chunk).len(),
            Counts::Each(counts) => counts[chunk],
            other => panic!("{other:?} has blocks for pairs of chips, not chunks"),
        }
    }

    /// Elements that chip `source` of `n` has for chip `destination`. Panics for per-chunk counts, or if there is no
    /// such chip.
    #[track_caller]
    pub fn block(&self, n: usize, source: usize, destination: usize) -> usize {
        match self {
            Counts::Len(len) => split(*len, n, destination).len(),
            Counts::Product { rows, columns } => rows[source] * columns[destination],
            Counts::Matrix(matrix) => matrix[source][destination],
            Counts::Each(_) => panic!("{self:?} has chunks, not blocks for pairs of chips"),
        }
    }

    /// All chunks' lengths, or a vector's.
    #[track_caller]
    fn total(&self, n: usize) -> usize {
        match self {
            Counts::Len(len) => *len,
            _ => (0..n).map(|chunk| self.chunk(n, chunk)).sum(),
        }
    }

    /// Elements that chip `index` of `n` brings to a collective of `kind`. Panics if the counts do not fit.
    #[track_caller]
    pub fn input_len(&self, kind: Kind, n: usize, index: usize) -> usize {
        self.check(kind, n);
        match kind {
            Kind::AllReduce | Kind::ReduceScatter => self.total(n),
            Kind::AllGather | Kind::Shift => self.chunk(n, index),
            Kind::AllToAll => (0..n).map(|d| self.block(n, index, d)).sum(),
            Kind::Broadcast { root } if root == index => self.total(n),
            Kind::Broadcast { .. } | Kind::Barrier => 0,
        }
    }

    /// Elements that chip `index` of `n` takes from a collective of `kind`. Panics if the counts do not fit.
    #[track_caller]
    pub fn output_len(&self, kind: Kind, n: usize, index: usize) -> usize {
        self.check(kind, n);
        match kind {
            Kind::AllReduce | Kind::AllGather | Kind::Broadcast { .. } => self.total(n),
            Kind::ReduceScatter => self.chunk(n, index),
            Kind::Shift => self.chunk(n, (index + n - 1) % n),
            Kind::AllToAll => (0..n).map(|s| self.block(n, s, index)).sum(),
            Kind::Barrier => 0,
        }
    }

    /// Panics unless there is one count per chip.
    #[track_caller]
    fn check_size(&self, n: usize) {
        let fits = match self {
            Counts::Len(_) => true,
            Counts::Each(counts) => counts.len() == n,
            Counts::Product { rows, columns } => rows.len() == n && columns.len() == n,
            Counts::Matrix(matrix) => matrix.len() == n && matrix.iter().all(|row| row.len() == n),
        };
        assert!(fits, "{self:?} in a group of {n} chips: one count per chip");
    }

    /// Panics unless the counts are of the form that `kind` takes, for a group of `n`.
    #[track_caller]
    fn check(&self, kind: Kind, n: usize) {
        assert!(n > 0, "a {kind} in a group without chips");
        if let Kind::Broadcast { root } = kind {
            assert!(root < n, "a broadcast from chip {root} in a group of {n}");
        }
        let fits = match kind {
            Kind::AllReduce | Kind::Broadcast { .. } => matches!(self, Counts::Len(_)),
            Kind::ReduceScatter | Kind::AllGather | Kind::Shift => {
                matches!(self, Counts::Len(_) | Counts::Each(_))
            }
            Kind::AllToAll => !matches!(self, Counts::Each(_)),
            Kind::Barrier => true,
        };
        assert!(fits, "{self:?} are no counts for {kind}");
        if kind != Kind::Barrier {
            self.check_size(n);
        }
    }
}

/// What chip `index` of `n` does in a collective of `kind`, done by `algorithm`.
///
/// Works for any `n >= 1` and any counts, zeros included. Panics if `index >= n` or the counts do not fit the kind.
#[track_caller]
pub fn schedule(
    kind: Kind,
    algorithm: Algorithm,
    counts: &Counts,
    n: usize,
    index: usize,
) -> Schedule {
    use Algorithm::{Recursive, Ring, Tree};
    counts.check(kind, n);
    assert!(index < n, "chip {index} of a group of {n}");
    let chunks = || -> Vec<usize> { (0..n).map(|chunk| counts.chunk(n, chunk)).collect() };
    let sent = || -> Vec<usize> { (0..n).map(|d| counts.block(n, index, d)).collect() };
    let received = || -> Vec<usize> { (0..n).map(|s| counts.block(n, s, index)).collect() };
    match (kind, algorithm) {
        (Kind::AllReduce, Tree) => tree_all_reduce(n, index, counts.total(n)),
        (Kind::AllReduce, Ring) => ring_all_reduce(n, index, counts.total(n)),
        (Kind::AllReduce, Recursive) => recursive_all_reduce(n, index, counts.total(n)),
        (Kind::ReduceScatter, Tree) => tree_reduce_scatter(index, &chunks()),
        (Kind::ReduceScatter, Ring) => ring_reduce_scatter(index, &chunks()),
        (Kind::ReduceScatter, Recursive) => recursive_reduce_scatter(index, &chunks()),
        (Kind::AllGather, Tree) => tree_all_gather(index, &chunks()),
        (Kind::AllGather, Ring) => ring_all_gather(index, &chunks()),
        (Kind::AllGather, Recursive) => recursive_all_gather(index, &chunks()),
        (Kind::AllToAll, Tree) => tree_all_to_all(index, &sent(), &received()),
        (Kind::AllToAll, Ring) => ring_all_to_all(index, &sent(), &received()),
        (Kind::AllToAll, Recursive) => recursive_all_to_all(n, index, |s, d| counts.block(n, s, d)),
        (Kind::Broadcast { root }, Tree) => tree_broadcast(n, index, counts.total(n), root),
        (Kind::Broadcast { root }, Ring) => ring_broadcast(n, index, counts.total(n), root),
        (Kind::Broadcast { root }, Recursive) => {
            recursive_broadcast(n, index, counts.total(n), root)
        }
        (Kind::Shift, _) => shift(index, &chunks()),
        (Kind::Barrier, _) => barrier(n, index),
    }
}

/// Where each of consecutive chunks begins, and last where they end.
fn bounds(counts: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut bounds = vec![0];
    let ends = counts.into_iter().scan(0, |end, count| {
        *end += count;
        Some(*end)
    });
    bounds.extend(ends);
    bounds
}

/// [`bounds`] of `len` elements cut into `n` chunks.
fn even_bounds(len: usize, n: usize) -> Vec<usize> {
    bounds((0..n).map(|chunk| split(len, n, chunk).len()))
}

fn input(range: Range<usize>) -> Place {
    Place::new(Buffer::Input, range)
}

fn output(range: Range<usize>) -> Place {
    Place::new(Buffer::Output, range)
}

fn to(peer: usize, place: Place) -> Transfer {
    Transfer { peer, place }
}

#[cfg(test)]
mod tests;
