//! Moving data between chips: placements change, collectives run, and every call is one event of the trace.
//!
//! A tensor is cut along any dimension, but messages are consecutive elements: pieces are packed in rank order before a
//! collective and unpacked behind it, unless the dimension is the outermost, where nothing has to move.
//!
//! Backward needs no rule of its own here: the contributions to the moved tensor's gradient are those to the original's,
//! with the placements they have. Where they are settled (see `apply`), `placement::plan` finds the transpose: an
//! all-gather whose consumers differ is answered by a reduce-scatter, one whose consumers agree by a slice.

use super::apply::Told;
use super::cut::Cut;
use super::exchange::{Header, Stopped};
use super::execute::Call;
use super::payload::Piece;
use super::{Chip, Sharded};
use crate::collective::{self, Algorithm, Counts, Kind, Reduce};
use crate::dtype::TensorType;
use crate::mesh::{Axis, Group};
use crate::ops::Cost;
use crate::placement::{Placement, Placements, Transition, cut, plan};
use crate::tensor::Tensor;
use crate::trace::{EventKind, Stream, Traffic, Value};
use std::ops::Range;
use std::panic::Location;
use std::slice;
use std::sync::Arc;

pub(super) type Site = &'static Location<'static>;

/// A collective as one event: what is called, over which axis, with what.
#[derive(Clone)]
pub(super) struct Request {
    pub kind: Kind,
    pub algorithm: Algorithm,
    pub reduce: Reduce,
    pub axis: usize,
    /// The members that take part, if not all along the axis.
    pub group: Option<Group>,
    pub counts: Counts,
    pub result: TensorType,
    pub before: Placements,
    pub after: Placements,
    /// Bytes packed and unpacked on the chip.
    pub packed: u64,
    pub site: Site,
}

impl Chip {
    #[track_caller]
    pub(super) fn redistribute(&self, x: &Sharded, to: &Placements) -> Sharded {
        let site = Location::caller();
        let to = self.normalize(to);
        if to == x.placements {
            return x.clone();
        }
        let tensor = self.move_tensor(
            x.tensor.clone(),
            &x.global,
            &x.placements,
            &to,
            "redistribute",
            site,
        );
        let mut moved = Sharded::unrecorded(self, tensor, x.global.clone(), to);
        self.record_passage(x, &mut moved, |p, t| (p, t), site);
        moved
    }

    /// A tensor with other placements, outside of the tape.
    pub(super) fn move_tensor(
        &self,
        tensor: Tensor,
        global: &[usize],
        from: &Placements,
        to: &Placements,
        what: &str,
        site: Site,
    ) -> Tensor {
        if from == to {
            return tensor;
        }
        self.arrive(what, site);
        let steps = plan(from, to, global, self.mesh())
            .unwrap_or_else(|why| panic!("{what} of {global:?}: {why} (called at {site})"));
        let mut placed = from.clone();
        let mut tensor = tensor;
        for (axis, transition) in steps {
            let next = placed.with(axis, transition.target());
            tensor = match transition {
                Transition::Slice { dim } => {
                    self.slice(&tensor, global, axis, dim, &placed, &next, site)
                }
                _ => {
                    let (input, request) =
                        self.prepare(&tensor, global, axis, transition, &placed, &next, site);
                    drop(tensor);
                    let result = self.collective(&input, &request);
                    drop(input);
                    self.unpack(result, global, axis, transition, &next, site)
                }
            };
            placed = next;
        }
        tensor
    }

    /// Keeps this chip's piece of dimension `dim`: nothing is sent.
    #[allow(clippy::too_many_arguments)]
    fn slice(
        &self,
        x: &Tensor,
        global: &[usize],
        axis: usize,
        dim: usize,
        before: &Placements,
        after: &Placements,
        site: Site,
    ) -> Tensor {
        let began = self.now();
        let local = self.local(global, x.dtype(), after, site);
        let range = cut(
            x.shape()[dim],
            &self.mesh().axes()[axis],
            self.coordinates()[axis],
        );
        let mut piece = self.allocate(&local.ty);
        Cut::of(x.ty(), dim).piece(x, range, &mut piece);
        self.tell(Told {
            kind: EventKind::Op,
            op: "slice".into(),
            site,
            inputs: vec![Value {
                ty: x.ty().clone(),
                placement: before.clone(),
            }],
            outputs: vec![Value {
                ty: local.ty.clone(),
                placement: after.clone(),
            }],
            cost: Cost {
                flops: 0,
                bytes: 2 * local.ty.bytes(),
                scratch: 0,
            },
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
        piece
    }

    /// The collective behind a transition, and its input with pieces in rank order.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn prepare(
        &self,
        x: &Tensor,
        global: &[usize],
        axis: usize,
        transition: Transition,
        before: &Placements,
        after: &Placements,
        site: Site,
    ) -> (Tensor, Request) {
        let along = &self.mesh().axes()[axis];
        let ty = self.local(global, x.dtype(), after, site).ty;
        let lengths = |whole: usize| -> Vec<usize> {
            let piece = |i| cut(whole, along, i).len();
            (0..along.size()).map(piece).collect()
        };
        let (kind, counts, packs) = match transition {
            Transition::AllReduce => (Kind::AllReduce, Counts::Len(x.elements()), None),
            Transition::ReduceScatter { dim } => {
                let rest = Cut::of(x.ty(), dim).rest();
                let each = lengths(x.shape()[dim]).iter().map(|l| l * rest).collect();
                (Kind::ReduceScatter, Counts::Each(each), Some(dim))
            }
            Transition::AllGather { dim } => {
                let rest = Cut::of(&ty, dim).rest();
                let each = lengths(ty.shape[dim]).iter().map(|l| l * rest).collect();
                (Kind::AllGather, Counts::Each(each), None)
            }
            Transition::AllToAll { from, to } => {
                // Not elements over lengths: a chip whose piece is empty has to count as the others do.
                let others = x
                    .shape()
                    .iter()
                    .enumerate()
                    .filter(|&(dim, _)| dim != from && dim != to);
                let rest: usize = others.map(|(_, len)| len).product();
                let (rows, columns) = (lengths(ty.shape[from]), lengths(x.shape()[to]));
                let rows = rows.iter().map(|r| r * rest).collect();
                (Kind::AllToAll, Counts::Product { rows, columns }, Some(to))
            }
            Transition::Slice { .. } => unreachable!("a slice sends nothing"),
        };
        let (input, packed) = match packs {
            Some(dim) => self.pack(x, dim, along),
            None => (x.clone(), 0),
        };
        let unpacked = match transition {
            Transition::AllGather { dim } | Transition::AllToAll { from: dim, .. }
                if Cut::of(&ty, dim).outer() > 1 =>
            {
                2 * ty.bytes()
            }
            _ => 0,
        };
        let request = Request {
            kind,
            algorithm: self.algorithm(),
            reduce: Reduce::Sum,
            axis,
            group: None,
            counts,
            result: ty,
            before: before.clone(),
            after: after.clone(),
            packed: packed + unpacked,
            site,
        };
        (input, request)
    }

    /// Pieces of dimension `dim` one behind the other, in rank order.
    fn pack(&self, x: &Tensor, dim: usize, axis: &Axis) -> (Tensor, u64) {
        let whole = Cut::of(x.ty(), dim);
        if whole.outer() == 1 {
            return (x.clone(), 0);
        }
        let mut packed = self.allocate(x.ty());
        whole.pack(x, &pieces(x.shape()[dim], axis), &mut packed);
        (packed, 2 * x.ty().bytes())
    }

    /// The gathered pieces, in rank order, as the tensor that they are.
    pub(super) fn unpack(
        &self,
        gathered: Tensor,
        global: &[usize],
        axis: usize,
        transition: Transition,
        after: &Placements,
        site: Site,
    ) -> Tensor {
        let (Transition::AllGather { dim } | Transition::AllToAll { from: dim, .. }) = transition
        else {
            return gathered;
        };
        let ty = self.local(global, gathered.dtype(), after, site).ty;
        let whole = Cut::of(&ty, dim);
        if whole.outer() == 1 {
            return gathered.reshape(ty.shape);
        }
        let axis = &self.mesh().axes()[axis];
        let mut tensor = self.allocate(&ty);
        whole.unpack(&gathered, &pieces(ty.shape[dim], axis), &mut tensor);
        tensor
    }

    /// Runs a collective and writes its event.
    pub(super) fn collective(&self, input: &Tensor, request: &Request) -> Tensor {
        let mut output = self.allocate(&request.result);
        let began = self.now();
        self.start_downloads([input], request);
        if let Some(call) = self.call(input.ty(), request) {
            let input = [Piece::whole(input)];
            self.submit_recorded();
            call.run(&input, slice::from_mut(&mut output))
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        output.has_arrived();
        self.tell_collective(input.ty(), request, Stream::Compute, None, began);
        output
    }

    /// This chip's side of a collective call over a share of type `input`; none in a ghost, which only counts it.
    pub(super) fn call(&self, input: &TensorType, request: &Request) -> Option<Call> {
        let number = {
            let mut sequence = self.inner().sequence.borrow_mut();
            sequence[request.axis] += 1;
            sequence[request.axis]
        };
        assert!(
            !request.kind.reduces() || input.dtype.is_float(),
            "{} of {input} at {}: indices cannot be added up",
            request.kind,
            request.site
        );
        let lane = self.inner().lane.clone()?;
        let group = request.group.unwrap_or_else(|| self.group(request.axis));
        let schedule = collective::schedule(
            request.kind,
            request.algorithm,
            &request.counts,
            group.size(),
            group.index(),
        );
        Some(Call {
            lane,
            group,
            call: (request.axis, number),
            header: Arc::new(self.header(request, input)),
            schedule,
            reduce: request.reduce,
            dtype: input.dtype,
            staging: self.inner().staging.clone(),
        })
    }

    fn header(&self, request: &Request, input: &TensorType) -> Header {
        let axis = self.mesh().axes()[request.axis].name();
        Header {
            // Shares may differ from chip to chip; their counts, which all chips know, may not.
            signature: format!(
                "{} over {axis} of {} {:?}",
                request.kind, input.dtype, request.counts
            ),
            scope: self.recorder().scope_name(),
            site: request.site,
        }
    }

    pub(super) fn tell_collective(
        &self,
        input: &TensorType,
        request: &Request,
        stream: Stream,
        ticket: Option<u64>,
        began: Option<u64>,
    ) {
        let axis = &self.mesh().axes()[request.axis];
        let n = request.group.map_or(axis.size(), |g| g.size());
        let part = request.group.filter(|g| g.size() < axis.size());
        let size = input.dtype.size() as u64;
        // The mean over the group: shares may be uneven, the class of chips is one.
        let per_chip = |elements: u64| (elements * size).div_ceil(n as u64);
        let sent = collective::sent_elements(request.kind, request.algorithm, &request.counts, n);
        let floor = collective::floor_elements(request.kind, &request.counts, n);
        let scratch =
            collective::scratch_elements(request.kind, request.algorithm, &request.counts, n);
        self.tell(Told {
            kind: EventKind::Collective,
            op: request.kind.to_string().into(),
            site: request.site,
            inputs: vec![Value {
                ty: input.clone(),
                placement: request.before.clone(),
            }],
            outputs: vec![Value {
                ty: request.result.clone(),
                placement: request.after.clone(),
            }],
            cost: Cost {
                flops: 0,
                bytes: request.packed,
                scratch: scratch * size,
            },
            traffic: Some(Traffic {
                axis: axis.name().to_string(),
                chips: n,
                stride: part.map(|group| group.stride() / self.group(request.axis).stride()),
                collective: Some((request.kind, request.algorithm, request.reduce)),
                offset: None,
                bytes: per_chip(sent),
                floor_bytes: per_chip(floor),
            }),
            stream,
            ticket,
            began,
        });
    }

    /// The maximum over a mesh axis, elementwise, outside of the tape. A chip whose axis has one chip keeps its own.
    #[track_caller]
    pub fn all_reduce_max(&self, x: &Sharded, axis: &str) -> Sharded {
        let site = Location::caller();
        if self.size_of(axis) == 1 {
            return x.detach();
        }
        let number = self.mesh().axis_index(axis);
        self.arrive("all-reduce", site);
        let after = x.placements.with(number, Placement::Replicate);
        let request = Request {
            kind: Kind::AllReduce,
            algorithm: self.algorithm(),
            reduce: Reduce::Max,
            axis: number,
            group: None,
            counts: Counts::Len(x.tensor.elements()),
            result: x.tensor.ty().clone(),
            before: x.placements.clone(),
            after: after.clone(),
            packed: 0,
            site,
        };
        let tensor = self.collective(&x.tensor, &request);
        Sharded::unrecorded(self, tensor, x.global.clone(), after)
    }

    /// Waits until every chip along `axis` is here.
    ///
    /// # Panics
    /// If the mesh has no such axis: nobody would be waited for.
    #[track_caller]
    pub fn barrier(&self, axis: &str) {
        let mesh = self.mesh();
        assert!(
            mesh.axis(axis).is_some(),
            "barrier over '{axis}', which is no axis of the mesh {mesh} (called at {})",
            Location::caller()
        );
        let empty = self.allocate(&TensorType::new([0], crate::DType::F32));
        self.whole_group(&empty, axis, Kind::Barrier, Location::caller());
    }

    /// The chip at index `root` along `axis` gives its share to the others along it.
    #[track_caller]
    pub fn broadcast(&self, x: &Sharded, axis: &str, root: usize) -> Sharded {
        let site = Location::caller();
        let size = self.size_of(axis);
        assert!(
            root < size,
            "broadcast from chip {root} of '{axis}', which has {size} (called at {site})"
        );
        let tensor = self.whole_group(&x.tensor, axis, Kind::Broadcast { root }, site);
        Sharded::unrecorded(self, tensor, x.global.clone(), x.placements.clone())
    }

    pub(super) fn whole_group(&self, x: &Tensor, axis: &str, kind: Kind, site: Site) -> Tensor {
        if self.size_of(axis) == 1 {
            return x.clone();
        }
        self.arrive(&kind.to_string(), site);
        let p = self.replicated();
        let request = Request {
            kind,
            algorithm: self.algorithm(),
            reduce: Reduce::Sum,
            axis: self.mesh().axis_index(axis),
            group: None,
            counts: Counts::Len(x.elements()),
            result: x.ty().clone(),
            before: p.clone(),
            after: p,
            packed: 0,
            site,
        };
        self.collective(x, &request)
    }
}

/// The piece of each chip of an axis, of a dimension of length `len`.
fn pieces(len: usize, axis: &Axis) -> Vec<Range<usize>> {
    (0..axis.size()).map(|i| cut(len, axis, i)).collect()
}
