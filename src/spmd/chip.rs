//! What a program sees of the chip that it runs on.

use super::exchange::{Lane, Stopped};
use super::overlap::Overlap;
use super::parameter::{Parameter, Source};
use super::started::Beside;
use super::{Sharded, exchange};
use crate::collective::Algorithm;
use crate::cpu::memory::Pool;
use crate::dtype::{DType, Element, TensorType};
use crate::error::{Error, ErrorKind};
use crate::mesh::{Coordinates, Group, Mesh};
use crate::ops::Local;
use crate::placement::{Placement, Placements, local_range, local_shape, splits_evenly};
use crate::tape::{Gradients, Tape, ValueId};
use crate::tensor::{Memory, Tensor};
use crate::trace::{ChipTrace, Phase, Recorder};
use std::cell::{Cell, Ref, RefCell, RefMut};
use std::collections::{BTreeSet, HashMap};
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// One chip of a mesh, as the program running on it sees it. Clones are the same chip.
///
/// A program is the same on every chip; it tells them apart only through [`Chip::coordinate`], which the trace records.
/// It does not branch on the contents of tensors, so that a ghost can run it.
#[derive(Clone)]
pub struct Chip(Rc<Inner>);

pub(super) struct Inner {
    mesh: Arc<Mesh>,
    rank: usize,
    coordinates: Coordinates,
    memory: Memory,
    seed: u64,
    algorithm: Algorithm,
    /// The kind of every chip, by rank, as a number; empty where all are alike.
    pub(super) kinds: Arc<[usize]>,
    pub(super) began: Instant,
    pub(super) lane: Option<Lane>,
    pub(super) staging: Pool,
    pub(super) read_axes: RefCell<BTreeSet<usize>>,
    recorder: RefCell<Recorder>,
    pub(super) counted: Cell<(u64, u64)>,
    phase: Cell<Phase>,
    pub(super) tape: RefCell<Option<Tape<Chip>>>,
    pub(super) gradients: RefCell<Gradients>,
    pub(super) beside: RefCell<Option<Beside>>,
    next_value: Cell<ValueId>,
    parameters: RefCell<Vec<Parameter>>,
    pub(super) counts: RefCell<Vec<super::count::Counted>>,
    source: RefCell<Option<Source>>,
    pub(super) state_names: RefCell<Vec<&'static str>>,
    pub(super) sequence: RefCell<Vec<u64>>,
    pub(super) tickets: Cell<u64>,
    pub(super) open_tickets: RefCell<BTreeSet<u64>>,
    pub(super) zero: Cell<Option<(super::Zero, usize)>>,
    pub(super) caches: RefCell<HashMap<String, super::cache::Cache>>,
    pub(super) made: RefCell<HashMap<String, super::cache::Cache>>,
    overlap: RefCell<Overlap>,
}

/// What a chip is made from.
pub(super) struct Setup {
    pub mesh: Arc<Mesh>,
    pub rank: usize,
    pub memory: Memory,
    pub seed: u64,
    pub algorithm: Algorithm,
    pub kinds: Arc<[usize]>,
    pub began: Instant,
    pub lane: Option<Lane>,
}

/// What remains of a chip when its program has ended.
pub(super) struct Remains {
    pub trace: ChipTrace,
    pub read_axes: BTreeSet<usize>,
}

impl Chip {
    pub(super) fn new(setup: Setup) -> Self {
        let axes = setup.mesh.axes().len();
        let chip = Chip(Rc::new(Inner {
            coordinates: setup.mesh.coordinates(setup.rank),
            mesh: setup.mesh,
            rank: setup.rank,
            recorder: RefCell::new(super::products::recorder(&setup.memory)),
            memory: setup.memory,
            seed: setup.seed,
            algorithm: setup.algorithm,
            kinds: setup.kinds,
            began: setup.began,
            lane: setup.lane,
            staging: Pool::new(None),
            read_axes: RefCell::default(),
            counted: Cell::new((0, 0)),
            phase: Cell::new(Phase::Forward),
            tape: RefCell::new(None),
            gradients: RefCell::default(),
            beside: RefCell::new(None),
            next_value: Cell::new(0),
            parameters: RefCell::default(),
            counts: RefCell::default(),
            source: RefCell::new(None),
            state_names: RefCell::default(),
            sequence: RefCell::new(vec![0; axes + 1]),
            tickets: Cell::new(0),
            open_tickets: RefCell::default(),
            zero: Cell::new(None),
            caches: RefCell::default(),
            made: RefCell::default(),
            overlap: RefCell::default(),
        }));
        chip.begin_to_count_copies();
        chip
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.0
    }

    /// Ends the chip: its trace, and the axes it asked about.
    pub(super) fn finish(&self) -> Remains {
        let open = self.0.open_tickets.borrow().len();
        if open > 0 {
            self.fail(Error::new(
                ErrorKind::Chip,
                format!("the program ended with {open} started transfer(s) that nobody waited for; call Pending::wait"),
            ));
        }
        self.end_of_copies();
        let recorder = self.0.recorder.replace(Recorder::new());
        Remains {
            trace: recorder.finish(self.0.memory.count().peak),
            read_axes: self.0.read_axes.take(),
        }
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.0.mesh
    }

    /// This chip's index along a mesh axis; 0 if the mesh lacks the axis. The trace records that the program asked:
    /// chips that differ along this axis are traced apart.
    pub fn coordinate(&self, axis: &str) -> usize {
        if !self.0.mesh.has(axis) {
            return 0;
        }
        let index = self.0.mesh.axis_index(axis);
        self.0.read_axes.borrow_mut().insert(index);
        self.0.coordinates[index]
    }

    /// Number of chips along a mesh axis; 1 if the mesh lacks it.
    pub fn size_of(&self, axis: &str) -> usize {
        self.0.mesh.size_of(axis)
    }

    /// True on the chip that talks to the world outside: it prints and writes files for all. What a program computes must
    /// not depend on it.
    pub fn is_first(&self) -> bool {
        self.0.rank == 0
    }

    /// True on chips without contents: [`Sharded::read`] gives nothing there.
    pub fn is_ghost(&self) -> bool {
        self.0.memory.is_ghost()
    }

    /// How collectives are done in this run.
    pub fn algorithm(&self) -> Algorithm {
        self.0.algorithm
    }

    /// The run's seed.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// The chip's memory and its count.
    pub fn memory(&self) -> &Memory {
        &self.0.memory
    }

    pub(super) fn rank(&self) -> usize {
        self.0.rank
    }

    pub(super) fn coordinates(&self) -> &Coordinates {
        &self.0.coordinates
    }

    pub(super) fn group(&self, axis: usize) -> Group {
        self.0.mesh.group_along(self.0.rank, axis)
    }

    /// One placement per mesh axis from those named; axes that are not named are replicated, names that the mesh lacks
    /// are left out. So one model runs on every mesh.
    pub fn placed(&self, named: &[(&str, Placement)]) -> Placements {
        let on = |axis: &crate::mesh::Axis| {
            let found = named.iter().find(|(name, _)| *name == axis.name());
            found.map_or(Placement::Replicate, |(_, p)| *p)
        };
        self.0.mesh.axes().iter().map(on).collect()
    }

    /// Placement on every chip alike.
    pub fn replicated(&self) -> Placements {
        self.placed(&[])
    }

    /// Checks the number of placements; over axes of one chip all mean the same and become `Replicate`.
    #[track_caller]
    pub(super) fn normalize(&self, placements: &Placements) -> Placements {
        let axes = self.0.mesh.axes();
        assert_eq!(
            placements.len(),
            axes.len(),
            "{placements} has {} placements, the mesh {} has {} axes: one for each",
            placements.len(),
            self.0.mesh,
            axes.len()
        );
        let one = |(axis, p): (&crate::mesh::Axis, &Placement)| match axis.size() {
            1 => Placement::Replicate,
            _ => *p,
        };
        axes.iter().zip(placements.iter()).map(one).collect()
    }

    /// Panics if the chips along an axis have uneven shares, which `what` is not made for.
    pub(super) fn equal_shares(&self, axis: &str, what: &str, site: &'static Location<'static>) {
        let why = format!("{what} wants equal pieces along it");
        let refused = self.mesh().refuse_shares(axis, &why);
        refused.unwrap_or_else(|e| panic!("{e} (called at {site})"));
    }

    /// This chip's share of a tensor, and where it lies.
    pub(super) fn local(
        &self,
        global: &[usize],
        dtype: DType,
        placements: &Placements,
        site: &'static Location<'static>,
    ) -> Local {
        let (mesh, at) = (&*self.0.mesh, &self.0.coordinates);
        for (axis, p) in mesh.axes().iter().zip(placements.iter()) {
            if let Placement::Shard(dim) = *p {
                assert!(
                    dim < global.len(),
                    "{placements} splits dimension {dim} over '{}', but the shape {global:?} has {} (at {site})",
                    axis.name(),
                    global.len()
                );
            }
        }
        if !splits_evenly(global, placements, mesh) {
            // The share's size depends on where the chip is along the axes that cut unevenly, and on those alone.
            let axis = |number: usize| &mesh.axes()[number];
            let rest = |dim: usize| {
                let units = placements.axes_of(dim).map(|number| axis(number).units());
                !global[dim].is_multiple_of(units.product())
            };
            let uneven = |dim: usize| {
                let axes = placements.axes_of(dim);
                axes.filter(move |number| rest(dim) || axis(*number).shares().is_some())
            };
            let axes = (0..global.len()).flat_map(uneven);
            self.0.read_axes.borrow_mut().extend(axes);
        }
        let start =
            (0..global.len()).map(|dim| local_range(global, dim, placements, mesh, at).start);
        Local {
            ty: TensorType::new(local_shape(global, placements, mesh, at), dtype),
            start: start.collect(),
            global: global.to_vec(),
        }
    }

    /// A tensor on this chip; the run ends with the budget's error if there is no room.
    pub(super) fn allocate(&self, ty: &TensorType) -> Tensor {
        self.0.memory.allocate(ty).unwrap_or_else(|e| self.fail(e))
    }

    /// A tensor from outside the program. Every chip takes its share of `contents`, which has the whole `shape`; a
    /// ghost takes the shape and never asks for the contents.
    ///
    /// # Panics
    /// If the contents have another number of elements, or the placements do not fit.
    #[track_caller]
    pub fn input<C: Contents + ?Sized>(
        &self,
        name: &str,
        shape: impl Into<Vec<usize>>,
        placements: impl Into<Placements>,
        contents: &C,
    ) -> Sharded {
        let (shape, site) = (shape.into(), Location::caller());
        let placements = self.normalize(&placements.into());
        let local = self.local(&shape, contents.dtype(), &placements, site);
        let mut tensor = self.allocate(&local.ty);
        if !tensor.is_ghost() {
            contents
                .copy_share(&local, &mut tensor)
                .unwrap_or_else(|why| panic!("input '{name}' at {site}: {why}"));
        }
        Sharded::unrecorded(self, tensor, shape, placements)
    }

    /// Runs `body` inside the scope `name`: its events carry the name.
    pub fn scope<T>(&self, name: &str, body: impl FnOnce() -> T) -> T {
        self.recorder().enter(name);
        let result = body();
        self.recorder().leave();
        result
    }

    /// Runs `body` as step `number` of a loop. A trace keeps the first and the latest step whole.
    pub fn step<T>(&self, number: u64, body: impl FnOnce() -> T) -> T {
        self.recorder().begin_step(number);
        let result = body();
        self.recorder().end_step();
        result
    }

    /// Runs `body` with its events marked as `phase`.
    pub(crate) fn phase<T>(&self, phase: Phase, body: impl FnOnce() -> T) -> T {
        let before = self.0.phase.replace(phase);
        let result = body();
        self.0.phase.set(before);
        result
    }

    pub(super) fn current_phase(&self) -> Phase {
        self.0.phase.get()
    }

    /// Ends the whole run with `error`; every chip stops, and the run returns the error with this chip's place in it.
    pub fn fail(&self, error: Error) -> ! {
        std::panic::resume_unwind(Box::new(error))
    }

    /// A decision that all chips share: the first chip to ask under this key decides, the others are told. For what
    /// no tensor says, such as a user's wish to stop. A ghost decides by itself.
    pub fn agree(&self, key: u64, decide: impl FnOnce() -> bool) -> bool {
        match &self.0.lane {
            Some(lane) => lane.agree(key, decide),
            None => decide(),
        }
    }

    /// Takes parameters and optimizer state from `source` instead of their initial values, as they are first used.
    /// Given a name and a shape, it returns the whole tensor's elements, or nothing if it does not know the name.
    pub fn restore_from(
        &self,
        source: impl Fn(&str, &[usize]) -> Result<Option<Vec<f32>>, Error> + 'static,
    ) {
        *self.0.source.borrow_mut() = Some(Rc::new(source));
    }

    pub(super) fn source(&self) -> Option<Source> {
        self.0.source.borrow().clone()
    }

    /// The parameters that the program has used so far, in order of first use.
    pub fn parameters(&self) -> Ref<'_, Vec<Parameter>> {
        self.0.parameters.borrow()
    }

    /// The parameters, to be changed.
    pub fn parameters_mut(&self) -> RefMut<'_, Vec<Parameter>> {
        self.0.parameters.borrow_mut()
    }

    pub(super) fn overlap(&self) -> RefMut<'_, Overlap> {
        self.0.overlap.borrow_mut()
    }

    pub(super) fn recorder(&self) -> RefMut<'_, Recorder> {
        self.0.recorder.borrow_mut()
    }

    pub(super) fn new_value(&self) -> ValueId {
        let id = self.0.next_value.get();
        self.0.next_value.set(id + 1);
        id
    }

    /// Lets a graphics processor begin with what was recorded for it, since the program is about to wait for another chip.
    pub(super) fn submit_recorded(&self) {
        #[cfg(feature = "gpu")]
        if let Some(chip) = self.memory().gpu_chip() {
            chip.submit_recorded();
        }
    }

    /// Nanoseconds since the run began; none in a ghost.
    pub(super) fn now(&self) -> Option<u64> {
        (!self.is_ghost()).then(|| self.0.began.elapsed().as_nanos() as u64)
    }

    /// Time between the run's beginning and a moment in it.
    pub(super) fn since_began(&self, at: Instant) -> std::time::Duration {
        at.saturating_duration_since(self.0.began)
    }

    /// The number of a transfer that was started; the program must not end before it is closed.
    pub(super) fn open_ticket(&self) -> u64 {
        let ticket = self.0.tickets.get();
        self.0.tickets.set(ticket + 1);
        self.0.open_tickets.borrow_mut().insert(ticket);
        ticket
    }

    pub(super) fn close_ticket(&self, ticket: u64) {
        self.0.open_tickets.borrow_mut().remove(&ticket);
    }

    /// Leaves the program if another chip has failed, and notes where this one is, for errors.
    pub(super) fn arrive(&self, op: &str, site: &'static Location<'static>) {
        if let Some(lane) = &self.0.lane {
            let scope = self.recorder().scope_name();
            lane.arrive(exchange::Whereabouts {
                op: op.into(),
                scope,
                site,
            })
            .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
    }
}

impl std::fmt::Debug for Chip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Chip(rank {} of {}, {})",
            self.0.rank, self.0.mesh, self.0.coordinates
        )
    }
}

/// Contents for [`Chip::input`]: ndarray's arrays and views, slices, and closures from an element's index in the whole
/// tensor (row-major) to its value.
pub trait Contents {
    /// Element type.
    fn dtype(&self) -> DType;
    /// Copies a share; the error says why it does not fit.
    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String>;
}

fn copy_runs<T: Element>(from: &[T], local: &Local, to: &mut Tensor) -> Result<(), String> {
    let whole: usize = local.global.iter().product();
    if from.len() != whole {
        return Err(format!(
            "{} elements were given, the shape {:?} has {whole}",
            from.len(),
            local.global
        ));
    }
    let (run, start) = local.runs();
    for (r, piece) in to.slice_mut().typed::<T>().chunks_mut(run).enumerate() {
        let begin = start(r) as usize;
        piece.copy_from_slice(&from[begin..begin + piece.len()]);
    }
    Ok(())
}

impl<T: Element> Contents for [T] {
    fn dtype(&self) -> DType {
        T::DTYPE
    }
    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String> {
        copy_runs(self, local, to)
    }
}

impl<T: Element> Contents for Vec<T> {
    fn dtype(&self) -> DType {
        T::DTYPE
    }
    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String> {
        copy_runs(self, local, to)
    }
}

impl<T: Element, S: ndarray::Data<Elem = T>, D: ndarray::Dimension> Contents
    for ndarray::ArrayBase<S, D>
{
    fn dtype(&self) -> DType {
        T::DTYPE
    }
    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String> {
        if self.shape() != local.global {
            return Err(format!(
                "the array is {:?}, the input was declared {:?}",
                self.shape(),
                local.global
            ));
        }
        match self.as_slice() {
            Some(slice) => copy_runs(slice, local, to),
            None => copy_runs(&self.iter().copied().collect::<Vec<T>>(), local, to),
        }
    }
}

/// Contents computed element by element, by a closure from the index in the whole tensor.
pub struct FromIndex<F>(pub F);

impl<T: Element, F: Fn(u64) -> T> Contents for FromIndex<F> {
    fn dtype(&self) -> DType {
        T::DTYPE
    }
    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String> {
        let (run, start) = local.runs();
        for (r, piece) in to.slice_mut().typed::<T>().chunks_mut(run).enumerate() {
            let begin = start(r);
            piece
                .iter_mut()
                .zip(begin..)
                .for_each(|(x, i)| *x = (self.0)(i));
        }
        Ok(())
    }
}
