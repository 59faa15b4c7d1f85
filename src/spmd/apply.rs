//! One op on placed operands: shapes and placements are checked, results allocated, the op run (unless this is a ghost),
//! an event written, and a node put on the tape (see `gradient`).

use super::resolve::{Resolved, resolve};
use super::sharded::Tracked;
use super::{Chip, Sharded, products};
use crate::dtype::TensorType;
use crate::ops::{self, Cost, Local, Op, Site};
use crate::placement::Placements;
use crate::tensor::Tensor;
use crate::trace::{Event, EventKind, MemoryChange, Stream, Time, Traffic, Value};
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;

/// What an event says, beside what every event has.
pub(super) struct Told {
    pub kind: EventKind,
    pub op: Arc<str>,
    pub site: &'static Location<'static>,
    pub inputs: Vec<Value>,
    pub outputs: Vec<Value>,
    pub cost: Cost,
    pub traffic: Option<Traffic>,
    pub stream: Stream,
    pub ticket: Option<u64>,
    pub began: Option<u64>,
}

impl Chip {
    /// Runs an op and returns all its results.
    ///
    /// # Panics
    /// If the operands' shapes or placements do not fit the op; the message has both sides, the mesh axis, and the
    /// placement that would do.
    #[track_caller]
    pub fn apply(&self, op: impl Op, inputs: &[&Sharded]) -> Vec<Sharded> {
        self.apply_at(Rc::new(op), inputs, Location::caller())
    }

    /// [`apply`](Self::apply) of any op: compiled once, not once for each op type.
    fn apply_at(
        &self,
        op: Rc<dyn Op>,
        inputs: &[&Sharded],
        site: &'static Location<'static>,
    ) -> Vec<Sharded> {
        self.arrive(op.name(), site);
        let refuse = |why: String| -> ! { panic!("{}: {why} (called at {site})", op.name()) };
        let global_in: Vec<TensorType> = inputs.iter().map(|x| x.global_type()).collect();
        let global_out = op.infer(&global_in).unwrap_or_else(|why| refuse(why));
        let local_in: Vec<TensorType> = inputs.iter().map(|x| x.tensor.ty().clone()).collect();
        let placed: Vec<&Placements> = inputs.iter().map(|x| &x.placements).collect();
        let resolved =
            resolve(&op.axes(&global_in), &placed, self.mesh()).unwrap_or_else(|why| refuse(why));
        let locals: Vec<Local> = global_out
            .iter()
            .zip(&resolved.outputs)
            .map(|(ty, p)| self.local(&ty.shape, ty.dtype, p, site))
            .collect();
        let local_out: Vec<TensorType> = locals.iter().map(|l| l.ty.clone()).collect();
        let mut outputs: Vec<Tensor> = local_out.iter().map(|ty| self.allocate(ty)).collect();
        let began = self.now();
        let tensors: Vec<&Tensor> = inputs.iter().map(|x| &x.tensor).collect();
        if self.is_ghost() {
            ops::device::only_traced(tensors, &outputs);
        } else {
            let shares = self.locals(inputs, site);
            let at = Site {
                inputs: &shares,
                outputs: &locals,
                seed: self.seed(),
            };
            ops::device::forward(&*op, &at, &tensors, &mut outputs);
        }
        self.refuse_lost(inputs, op.name(), site);
        let outputs = self.results(outputs, &global_out, &resolved, inputs);
        self.tell(Told {
            kind: EventKind::Op,
            op: op.name().into(),
            site,
            inputs: inputs.iter().map(|x| x.traced()).collect(),
            outputs: outputs.iter().map(Sharded::traced).collect(),
            cost: op.cost(&local_in, &local_out),
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
        if outputs.iter().any(|o| o.tracked.value.is_some()) {
            self.push_op(op, site, inputs, &outputs, resolved);
        }
        outputs
    }

    /// Runs an op and returns its first result.
    #[track_caller]
    pub fn apply_one(&self, op: impl Op, inputs: &[&Sharded]) -> Sharded {
        self.apply(op, inputs).swap_remove(0)
    }

    /// Refuses a parameter that was gathered before recording began: no gradient would reach it.
    fn refuse_lost(&self, inputs: &[&Sharded], op: &str, site: &'static Location<'static>) {
        let recording = self.inner().tape.borrow().is_some();
        let mut gathered = inputs.iter().filter_map(|x| x.gathered.as_ref());
        if let Some(lost) = gathered.find(|g| recording && !g.recorded) {
            panic!(
                "{op} at {site}: the parameter of {} was gathered outside of Chip::record and would get no gradient; \
                 ask for it inside",
                lost.site
            );
        }
    }

    fn locals(&self, values: &[&Sharded], site: &'static Location<'static>) -> Vec<Local> {
        let local = |x: &&Sharded| self.local(&x.global, x.dtype(), &x.placements, site);
        values.iter().map(local).collect()
    }

    fn results(
        &self,
        tensors: Vec<Tensor>,
        types: &[TensorType],
        resolved: &Resolved,
        inputs: &[&Sharded],
    ) -> Vec<Sharded> {
        let recording = self.inner().tape.borrow().is_some();
        let tracked = recording && inputs.iter().any(|x| x.tracked.value.is_some());
        // Data make a result an activation, though no gradient flows to them: an embedding is no weight.
        let weight = tracked && inputs.iter().all(|x| x.tracked.weight);
        let parts = tensors.into_iter().zip(types).zip(&resolved.outputs);
        parts
            .map(|((tensor, ty), placements)| {
                let mut result =
                    Sharded::unrecorded(self, tensor, ty.shape.clone(), placements.clone());
                if tracked && ty.dtype.is_float() {
                    let value = Some(self.new_value());
                    result.tracked = Tracked {
                        value,
                        leaf: None,
                        weight,
                        gradient: ty.dtype,
                    };
                }
                result
            })
            .collect()
    }

    /// Writes an event, with the memory that changed since the one before it.
    pub(super) fn tell(&self, told: Told) {
        let count = self.memory().count();
        let (allocated, freed) = self.inner().counted.replace((count.allocated, count.freed));
        let memory = MemoryChange {
            allocated: count.allocated - allocated,
            freed: count.freed - freed,
            peak: self.memory().take_recent_peak(),
        };
        let time = told.began.zip(self.now()).map(|(start_ns, end)| Time {
            start_ns,
            duration_ns: end - start_ns,
        });
        let mut recorder = self.recorder();
        let products = products::since_the_event_before(self.memory(), &mut recorder);
        let host = self.copies_since_the_event_before();
        let event = Event {
            kind: told.kind,
            op: told.op,
            scope: recorder.scope(),
            site: recorder.site(told.site),
            phase: self.current_phase(),
            stream: told.stream,
            inputs: told.inputs,
            outputs: told.outputs,
            flops: told.cost.flops,
            bytes: told.cost.bytes,
            scratch: told.cost.scratch,
            traffic: told.traffic,
            memory,
            ticket: told.ticket,
            time,
            products,
            host,
        };
        recorder.push(event);
        drop(recorder);
        self.note_times_of_copies();
    }
}
