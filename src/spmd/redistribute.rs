//! Moving data between chips: placements change, collectives run, and every call is one event of the trace.
//!
//! A tensor is cut along any dimension, but messages are consecutive elements: pieces are packed in rank order before a
//! collective and unpacked behind it, unless the dimension is the outermost, where nothing has to move.
//!
//! Backward needs no rule of its own here: the contributions to the moved tensor's gradient are those to the original's,
//! with the placements they have. Where they are settled (see `apply`), `placement::plan` finds the transpose: an
//! all-gather whose consumers differ is answered by a reduce-scatter, one whose consumers agree by a slice.

use super::apply::Told;
use super::exchange::{Channel, Header, Payload, Stopped};
use super::execute::Call;
use super::{Chip, Sharded};
use crate::collective::{self, Algorithm, Counts, Kind, Reduce};
use crate::dtype::TensorType;
use crate::ops::Cost;
use crate::placement::{Placement, Placements, Transition, plan, split};
use crate::tensor::Tensor;
use crate::trace::{EventKind, Stream, Time, Traffic, Value};
use std::ops::Range;
use std::panic::Location;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};

type Site = &'static Location<'static>;

/// A collective as one event: what is called, over which axis, with what.
#[derive(Clone)]
pub(super) struct Request {
    pub kind: Kind,
    pub algorithm: Algorithm,
    pub reduce: Reduce,
    pub axis: usize,
    pub counts: Counts,
    pub result: TensorType,
    pub before: Placements,
    pub after: Placements,
    /// Bytes packed and unpacked on the chip.
    pub packed: u64,
    pub site: Site,
}

/// Where a transfer that was started delivers: the result, and when it ran.
type Slot = Arc<Mutex<Option<(Tensor, Time)>>>;

type Job = Box<dyn FnOnce() + Send>;

/// The thread that runs a chip's started transfers, in order.
pub(super) struct Beside {
    jobs: mpsc::Sender<Job>,
}

/// A transfer that was started and not yet waited for.
#[must_use = "a started transfer has to be waited for"]
pub struct Pending {
    value: Sharded,
    request: Request,
    ticket: u64,
    transition: Transition,
    input: Tensor,
    running: Running,
}

struct Running {
    done: Arc<AtomicBool>,
    slot: Slot,
    header: Arc<Header>,
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
        let group = self.group(axis);
        let range = split(x.shape()[dim], group.size(), group.index());
        let mut piece = self.allocate(&local.ty);
        if !self.is_ghost() {
            let cut = Cut::of(x.ty(), dim);
            cut.take(x.bytes(), range, piece.bytes_mut());
        }
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
    fn prepare(
        &self,
        x: &Tensor,
        global: &[usize],
        axis: usize,
        transition: Transition,
        before: &Placements,
        after: &Placements,
        site: Site,
    ) -> (Tensor, Request) {
        let n = self.mesh().axes()[axis].size();
        let ty = self.local(global, x.dtype(), after, site).ty;
        let lengths =
            |whole: usize| -> Vec<usize> { (0..n).map(|i| split(whole, n, i).len()).collect() };
        let (kind, counts, cut) = match transition {
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
                let rest = x.elements() / (x.shape()[from] * x.shape()[to]).max(1);
                let (rows, columns) = (lengths(ty.shape[from]), lengths(x.shape()[to]));
                let rows = rows.iter().map(|r| r * rest).collect();
                (Kind::AllToAll, Counts::Product { rows, columns }, Some(to))
            }
            Transition::Slice { .. } => unreachable!("a slice sends nothing"),
        };
        let (input, packed) = match cut {
            Some(dim) => self.pack(x, dim, n),
            None => (x.clone(), 0),
        };
        let unpacked = match transition {
            Transition::AllGather { dim } | Transition::AllToAll { from: dim, .. }
                if Cut::of(&ty, dim).outer > 1 =>
            {
                2 * ty.bytes()
            }
            _ => 0,
        };
        let request = Request {
            kind,
            algorithm: Algorithm::Tree,
            reduce: Reduce::Sum,
            axis,
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
    fn pack(&self, x: &Tensor, dim: usize, n: usize) -> (Tensor, u64) {
        let cut = Cut::of(x.ty(), dim);
        if cut.outer == 1 {
            return (x.clone(), 0);
        }
        let mut packed = self.allocate(x.ty());
        if !self.is_ghost() {
            let mut rest = packed.bytes_mut();
            for i in 0..n {
                let range = split(cut.len, n, i);
                let (piece, behind) = rest.split_at_mut(cut.outer * range.len() * cut.inner);
                cut.take(x.bytes(), range, piece);
                rest = behind;
            }
        }
        (packed, 2 * x.ty().bytes())
    }

    /// The gathered pieces, in rank order, as the tensor that they are.
    fn unpack(
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
        let cut = Cut::of(&ty, dim);
        if cut.outer == 1 {
            return gathered.reshape(ty.shape);
        }
        let n = self.mesh().axes()[axis].size();
        let mut tensor = self.allocate(&ty);
        if !self.is_ghost() {
            let mut rest = gathered.bytes();
            for i in 0..n {
                let range = split(cut.len, n, i);
                let (piece, behind) = rest.split_at(cut.outer * range.len() * cut.inner);
                cut.put(piece, range, tensor.bytes_mut());
                rest = behind;
            }
        }
        tensor
    }

    /// Runs a collective and writes its event.
    pub(super) fn collective(&self, input: &Tensor, request: &Request) -> Tensor {
        let mut output = self.allocate(&request.result);
        let began = self.now();
        if let Some(call) = self.call(input, request) {
            call.run(input, &mut output)
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        self.tell_collective(input, request, Stream::Compute, None, began);
        output
    }

    /// This chip's side of a collective call; none in a ghost, which only counts it.
    fn call(&self, input: &Tensor, request: &Request) -> Option<Call> {
        let number = {
            let mut sequence = self.inner().sequence.borrow_mut();
            sequence[request.axis] += 1;
            sequence[request.axis]
        };
        assert!(
            !request.kind.reduces() || input.dtype().is_float(),
            "{} of {} at {}: indices cannot be added up",
            request.kind,
            input.ty(),
            request.site
        );
        let lane = self.inner().lane.clone()?;
        let group = self.group(request.axis);
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
            dtype: input.dtype(),
            staging: self.inner().staging.clone(),
        })
    }

    fn header(&self, request: &Request, input: &Tensor) -> Header {
        let axis = self.mesh().axes()[request.axis].name();
        Header {
            // Shares may differ from chip to chip; their counts, which all chips know, may not.
            signature: format!(
                "{} over {axis} of {} {:?}",
                request.kind,
                input.dtype(),
                request.counts
            ),
            scope: self.recorder().scope_name(),
            site: request.site,
        }
    }

    fn tell_collective(
        &self,
        input: &Tensor,
        request: &Request,
        stream: Stream,
        ticket: Option<u64>,
        began: Option<u64>,
    ) {
        let axis = &self.mesh().axes()[request.axis];
        let (n, size) = (axis.size(), input.dtype().size() as u64);
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
                ty: input.ty().clone(),
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
            algorithm: Algorithm::Tree,
            reduce: Reduce::Max,
            axis: number,
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
    #[track_caller]
    pub fn barrier(&self, axis: &str) {
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

    fn whole_group(&self, x: &Tensor, axis: &str, kind: Kind, site: Site) -> Tensor {
        if self.size_of(axis) == 1 {
            return x.clone();
        }
        self.arrive(&kind.to_string(), site);
        let p = self.replicated();
        let request = Request {
            kind,
            algorithm: Algorithm::Tree,
            reduce: Reduce::Sum,
            axis: self.mesh().axis_index(axis),
            counts: Counts::Len(x.elements()),
            result: x.ty().clone(),
            before: p.clone(),
            after: p,
            packed: 0,
            site,
        };
        self.collective(x, &request)
    }

    /// Sends this chip's share to the chip `offset` further along `axis` (cyclic), and returns when it was received.
    #[track_caller]
    pub fn send(&self, x: &Sharded, axis: &str, offset: isize) {
        let site = Location::caller();
        self.arrive("send", site);
        let began = self.now();
        if let Some(lane) = &self.inner().lane {
            let to = self.mesh().peer(self.rank(), axis, offset);
            let channel = Channel {
                from: self.rank(),
                to,
                call: (self.mesh().axes().len(), 0),
            };
            let header = Arc::new(self.message_header(axis, x.tensor.ty(), site));
            let bytes = 0..x.tensor.ty().bytes() as usize;
            let sent = lane.start_send(channel, &header, Payload::Shared(x.tensor.clone(), bytes));
            sent.and_then(|s| lane.wait_sent(s))
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        self.tell_message(EventKind::Send, &x.traced(), axis, offset, site, began);
    }

    /// Receives a share of known type from the chip `offset` further along `axis` (cyclic).
    #[track_caller]
    pub fn receive(&self, ty: &TensorType, axis: &str, offset: isize) -> Sharded {
        let site = Location::caller();
        self.arrive("receive", site);
        let mut tensor = self.allocate(ty);
        let began = self.now();
        if let Some(lane) = &self.inner().lane {
            let from = self.mesh().peer(self.rank(), axis, offset);
            let channel = Channel {
                from,
                to: self.rank(),
                call: (self.mesh().axes().len(), 0),
            };
            let header = Arc::new(self.message_header(axis, ty, site));
            lane.receive(channel, &header, |bytes| {
                tensor.bytes_mut().copy_from_slice(bytes);
                Ok(())
            })
            .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        let value = Sharded::unrecorded(self, tensor, ty.shape.clone(), self.replicated());
        self.tell_message(
            EventKind::Receive,
            &value.traced(),
            axis,
            offset,
            site,
            began,
        );
        value
    }

    fn message_header(&self, axis: &str, ty: &TensorType, site: Site) -> Header {
        Header {
            signature: format!("message over {axis} of {ty}"),
            scope: self.recorder().scope_name(),
            site,
        }
    }

    fn tell_message(
        &self,
        kind: EventKind,
        value: &Value,
        axis: &str,
        offset: isize,
        site: Site,
        began: Option<u64>,
    ) {
        let bytes = if kind == EventKind::Send {
            value.ty.bytes()
        } else {
            0
        };
        let values = vec![value.clone()];
        let (inputs, outputs) = if kind == EventKind::Send {
            (values, vec![])
        } else {
            (vec![], values)
        };
        self.tell(Told {
            kind,
            op: if kind == EventKind::Send {
                "send"
            } else {
                "receive"
            }
            .into(),
            site,
            inputs,
            outputs,
            cost: Cost::default(),
            traffic: Some(Traffic {
                axis: axis.to_string(),
                chips: self.size_of(axis),
                collective: None,
                offset: Some(offset),
                bytes,
                floor_bytes: bytes,
            }),
            stream: Stream::Compute,
            ticket: None,
            began,
        });
    }

    #[track_caller]
    pub(super) fn start_redistribute(&self, x: &Sharded, to: &Placements) -> Pending {
        let site = Location::caller();
        let to = self.normalize(to);
        self.arrive("redistribute", site);
        let steps = plan(&x.placements, &to, &x.global, self.mesh())
            .unwrap_or_else(|why| panic!("start_redistribute of {x:?}: {why} (called at {site})"));
        let [(axis, transition)] = steps[..] else {
            panic!(
                "start_redistribute of {x:?} to {to} takes {} transitions; start one at a time (called at {site})",
                steps.len()
            )
        };
        assert!(
            transition.communicates(),
            "{transition} of {x:?} sends nothing; use redistribute (called at {site})"
        );
        let (input, request) = self.prepare(
            &x.tensor,
            &x.global,
            axis,
            transition,
            &x.placements,
            &to,
            site,
        );
        let output = self.allocate(&request.result);
        let ticket = self.inner().tickets.get();
        self.inner().tickets.set(ticket + 1);
        self.inner().open_tickets.borrow_mut().insert(ticket);
        let running = match self.call(&input, &request) {
            Some(call) => self.start(call, input.clone(), output),
            // A ghost's result is allocated and waits for nothing.
            None => Running::finished(output),
        };
        self.tell_collective(
            &input,
            &request,
            Stream::Communication,
            Some(ticket),
            self.now(),
        );
        Pending {
            value: x.clone(),
            request,
            ticket,
            transition,
            input,
            running,
        }
    }

    fn start(&self, call: Call, input: Tensor, output: Tensor) -> Running {
        let done = Arc::new(AtomicBool::new(false));
        let slot: Slot = Arc::default();
        let header = call.header.clone();
        let began = self.now().unwrap_or(0);
        let clock = std::time::Instant::now();
        let (flag, delivery) = (done.clone(), slot.clone());
        let lane = call.lane.beside();
        lane.begin_job();
        let call = Call {
            lane: lane.clone(),
            ..call
        };
        let job = move || {
            let start_ns = began + clock.elapsed().as_nanos() as u64;
            let mut output = output;
            let finished = call.run(&input, &mut output);
            let end = began + clock.elapsed().as_nanos() as u64;
            // The program's handle must be the last one, so that memory is freed in program order.
            drop(input);
            if finished.is_ok() {
                let time = Time {
                    start_ns,
                    duration_ns: end - start_ns,
                };
                *delivery.lock().unwrap_or_else(|broken| broken.into_inner()) =
                    Some((output, time));
                lane.set_done(&flag);
            }
            lane.end_job();
        };
        self.beside(Box::new(job));
        Running { done, slot, header }
    }

    /// Hands a job to the thread for started transfers, which lives as long as the chip.
    fn beside(&self, job: Job) {
        let mut beside = self.inner().beside.borrow_mut();
        let beside = beside.get_or_insert_with(|| {
            let (jobs, queue) = mpsc::channel::<Job>();
            let name = format!("transfers of rank {}", self.rank());
            let work = move || queue.into_iter().for_each(|job| job());
            let started = std::thread::Builder::new().name(name).spawn(work);
            started.unwrap_or_else(|e| {
                let what = format!("cannot start a thread for transfers: {e}");
                self.fail(crate::Error::new(crate::ErrorKind::Io, what))
            });
            Beside { jobs }
        });
        beside
            .jobs
            .send(job)
            .expect("the thread ends only when this sender is dropped");
    }
}

impl Running {
    /// What a ghost waits for.
    fn finished(output: Tensor) -> Self {
        let time = Time {
            start_ns: 0,
            duration_ns: 0,
        };
        let header = Header {
            signature: String::new(),
            scope: "".into(),
            site: Location::caller(),
        };
        Running {
            done: Arc::new(AtomicBool::new(true)),
            slot: Arc::new(Mutex::new(Some((output, time)))),
            header: Arc::new(header),
        }
    }
}

impl Pending {
    /// Waits for the transfer and returns the moved tensor.
    #[track_caller]
    pub fn wait(self) -> Sharded {
        let site = Location::caller();
        let chip = self.value.chip.clone();
        chip.arrive("wait", site);
        let began = chip.now();
        let running = self.running;
        if let Some(lane) = &chip.inner().lane {
            lane.wait_done(&running.done, &running.header)
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        let delivered = running
            .slot
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
            .take();
        let (result, time) = delivered.expect("a transfer that is done has delivered");
        chip.inner().open_tickets.borrow_mut().remove(&self.ticket);
        if !chip.is_ghost() {
            chip.recorder().complete(self.ticket, time);
        }
        drop(self.input);
        let (axis, after) = (self.request.axis, self.request.after);
        let tensor = chip.unpack(
            result,
            &self.value.global,
            axis,
            self.transition,
            &after,
            site,
        );
        let value = Value {
            ty: tensor.ty().clone(),
            placement: after.clone(),
        };
        chip.tell(Told {
            kind: EventKind::Wait,
            op: "wait".into(),
            site,
            inputs: vec![],
            outputs: vec![value],
            cost: Cost::default(),
            traffic: None,
            stream: Stream::Compute,
            ticket: Some(self.ticket),
            began,
        });
        let mut moved = Sharded::unrecorded(&chip, tensor, self.value.global.clone(), after);
        chip.record_passage(&self.value, &mut moved, |p, t| (p, t), site);
        moved
    }
}

/// A tensor seen as [outer, len, inner]: what is before a dimension, the dimension, and the bytes behind it.
struct Cut {
    outer: usize,
    len: usize,
    /// Bytes of one index of the dimension.
    inner: usize,
    size: usize,
}

impl Cut {
    fn of(ty: &TensorType, dim: usize) -> Self {
        let size = ty.dtype.size();
        let inner: usize = ty.shape[dim + 1..].iter().product();
        Cut {
            outer: ty.shape[..dim].iter().product(),
            len: ty.shape[dim],
            inner: inner * size,
            size,
        }
    }

    /// Elements per index of the dimension.
    fn rest(&self) -> usize {
        self.outer * (self.inner / self.size)
    }

    fn take(&self, from: &[u8], range: Range<usize>, to: &mut [u8]) {
        let run = range.len() * self.inner;
        for (o, piece) in to.chunks_exact_mut(run.max(1)).enumerate() {
            let at = (o * self.len + range.start) * self.inner;
            piece.copy_from_slice(&from[at..at + run]);
        }
    }

    fn put(&self, from: &[u8], range: Range<usize>, to: &mut [u8]) {
        let run = range.len() * self.inner;
        for (o, piece) in from.chunks_exact(run.max(1)).enumerate() {
            let at = (o * self.len + range.start) * self.inner;
            to[at..at + run].copy_from_slice(piece);
        }
    }
}
