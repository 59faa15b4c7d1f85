//! Gradients of ops: settled, computed, and added to what is there.
//!
//! Contributions to a value's gradient are kept by placement. Before an op's backward runs, those to each of its results
//! are settled: partial sums are reduced, once, and everything is added up. Accumulators are reused where nothing else
//! holds them, by the same rule in a ghost, so that memory is the same there.

use super::apply::Told;
use super::resolve::Resolved;
use super::sharded::Tracked;
use super::zero::Gathered;
use super::{Chip, Sharded};
use crate::dtype::{DType, TensorType};
use crate::ops::device;
use crate::ops::{Accum, Backward, Cost, Gradient, Local, Op, Site};
use crate::placement::Placements;
use crate::tape::{Gradients, Node, Pass, ValueId};
use crate::tensor::Tensor;
use crate::trace::{EventKind, Phase, Stream, Value};
use std::panic::Location;
use std::rc::Rc;

impl Chip {
    /// Puts the node of an op that ran on the tape, if a gradient can flow through it.
    pub(super) fn push_op(
        &self,
        op: Rc<dyn Op>,
        site: &'static Location<'static>,
        inputs: &[&Sharded],
        outputs: &[Sharded],
        resolved: Resolved,
    ) {
        let saves = op.saves();
        let keep = |bits: u32, i: usize| bits >> i & 1 == 1;
        let mut applied = Applied {
            site,
            scope: self.recorder().scope(),
            inputs: inputs
                .iter()
                .enumerate()
                .map(|(i, x)| Operand {
                    tracked: x.tracked,
                    differentiable: x.tracked.value.is_some() && op.differentiable(i),
                    ty: x.tensor.ty().clone(),
                    global: x.global.clone(),
                    placements: x.placements.clone(),
                    saved: (keep(saves.inputs, i) && self.regathers(x).is_none())
                        .then(|| x.tensor.clone()),
                    regather: self.regathers(x).filter(|_| keep(saves.inputs, i)),
                    gradient: resolved.gradients[i].clone(),
                })
                .collect(),
            outputs: outputs
                .iter()
                .enumerate()
                .map(|(i, x)| Outcome {
                    tracked: x.tracked,
                    ty: x.tensor.ty().clone(),
                    global: x.global.clone(),
                    placements: x.placements.clone(),
                    saved: keep(saves.outputs, i).then(|| x.tensor.clone()),
                })
                .collect(),
            settled: None,
            op,
        };
        let wanted = |weight| {
            applied
                .inputs
                .iter()
                .any(|x| x.differentiable && x.tracked.weight == weight)
        };
        let (has_inputs, has_weights) = (wanted(false), wanted(true));
        if !has_inputs && !has_weights {
            return;
        }
        applied.inputs.iter().for_each(|x| {
            if let Some(gathered) = &x.regather {
                gathered.add_user();
            }
        });
        self.push_node(Node {
            outputs: outputs.iter().filter_map(|o| o.tracked.value).collect(),
            has_inputs,
            has_weights,
            backward: Box::new(move |chip, gradients, pass| {
                applied.backward(chip, gradients, pass)
            }),
        });
    }

    /// What an operand can be gathered from again in the backward. A block that is computed again keeps it: its backward
    /// follows at once.
    fn regathers(&self, x: &Sharded) -> Option<Rc<Gathered>> {
        let again = self.current_phase() == Phase::Recompute;
        x.gathered.clone().filter(|_| !again)
    }

    pub(super) fn push_node(&self, node: Node<Chip>) {
        if let Some(tape) = self.inner().tape.borrow_mut().as_mut() {
            tape.push(node);
        }
    }

    /// Adds `more` to `sum`, in place where nothing else holds it.
    pub(super) fn accumulate(
        &self,
        sum: Tensor,
        more: Tensor,
        p: &Placements,
        site: &'static Location<'static>,
    ) -> Tensor {
        let began = self.now();
        let ty = sum.ty().clone();
        let value = Value {
            ty: ty.clone(),
            placement: p.clone(),
        };
        let inputs = vec![
            value.clone(),
            Value {
                ty: more.ty().clone(),
                placement: p.clone(),
            },
        ];
        let (mut target, other) = match (sum.is_unique(), more.is_unique() && more.ty() == sum.ty())
        {
            (false, true) => (more, sum),
            (true, _) => (sum, more),
            (false, false) => (self.copy_of(&sum), more),
        };
        device::add_assign(&mut target, &other);
        let bytes = 2 * ty.bytes() + other.ty().bytes();
        drop(other);
        self.tell(Told {
            kind: EventKind::Op,
            op: "accumulate".into(),
            site,
            inputs,
            outputs: vec![value],
            cost: Cost {
                flops: ty.elements() as u64,
                bytes,
                scratch: 0,
            },
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
        target
    }

    fn copy_of(&self, tensor: &Tensor) -> Tensor {
        let mut copy = self.allocate(tensor.ty());
        device::copy(tensor, &mut copy);
        copy
    }

    /// Brings all contributions to a value's gradient to one placement and adds them up.
    pub(super) fn settle(
        &self,
        contributions: Vec<(Placements, Tensor)>,
        target: &Placements,
        global: &[usize],
        site: &'static Location<'static>,
    ) -> Option<Tensor> {
        contributions
            .into_iter()
            .map(|(from, tensor)| self.move_tensor(tensor, global, &from, target, "gradient", site))
            .reduce(|sum, more| self.accumulate(sum, more, target, site))
    }

    /// The settled gradient of a node's result; none if nothing was contributed to it.
    pub(super) fn settle_value(
        &self,
        gradients: &mut Gradients,
        result: &Settled,
        site: &'static Location<'static>,
    ) -> Option<Tensor> {
        let contributions = gradients.take(result.value);
        let target = result.placements.gradient();
        self.settle(contributions, &target, &result.global, site)
    }

    /// Adds a contribution to the gradient of a value or parameter.
    pub(super) fn contribute(
        &self,
        gradients: &mut Gradients,
        tracked: &Tracked,
        placements: Placements,
        tensor: Tensor,
        site: &'static Location<'static>,
    ) {
        let before = self.take_accumulator(gradients, tracked, &placements);
        let total = match before {
            Some(sum) => self.accumulate(sum, tensor, &placements, site),
            None => tensor,
        };
        self.put_gradient(gradients, tracked, placements, total);
    }

    fn take_accumulator(
        &self,
        gradients: &mut Gradients,
        tracked: &Tracked,
        p: &Placements,
    ) -> Option<Tensor> {
        match (tracked.leaf, tracked.value) {
            (Some(leaf), _) => {
                let held = &mut self.parameters_mut()[leaf].gradient;
                let at = held.iter().position(|(q, _)| q == p)?;
                Some(held.swap_remove(at).1)
            }
            (None, Some(value)) => gradients.take_placed(value, p),
            (None, None) => None,
        }
    }

    fn put_gradient(
        &self,
        gradients: &mut Gradients,
        tracked: &Tracked,
        p: Placements,
        tensor: Tensor,
    ) {
        match (tracked.leaf, tracked.value) {
            (Some(leaf), _) => self.parameters_mut()[leaf].gradient.push((p, tensor)),
            (None, Some(value)) => gradients.put(value, p, tensor),
            (None, None) => {}
        }
    }
}

/// A value whose gradient is to be settled.
pub(super) struct Settled {
    pub value: ValueId,
    pub global: Vec<usize>,
    pub placements: Placements,
}

struct Operand {
    tracked: Tracked,
    differentiable: bool,
    ty: TensorType,
    global: Vec<usize>,
    placements: Placements,
    saved: Option<Tensor>,
    /// The share to gather the operand from for the backward, instead of keeping the operand.
    regather: Option<Rc<Gathered>>,
    gradient: Placements,
}

struct Outcome {
    tracked: Tracked,
    ty: TensorType,
    global: Vec<usize>,
    placements: Placements,
    saved: Option<Tensor>,
}

/// An op that ran, with what its backward needs.
struct Applied {
    op: Rc<dyn Op>,
    site: &'static Location<'static>,
    scope: u32,
    inputs: Vec<Operand>,
    outputs: Vec<Outcome>,
    settled: Option<Vec<Option<Tensor>>>,
}

impl Applied {
    fn backward(&mut self, chip: &Chip, gradients: &mut Gradients, pass: Pass) {
        chip.arrive(self.op.name(), self.site);
        chip.recorder().enter_scope(self.scope);
        let phase = if pass == Pass::Weights {
            Phase::Weight
        } else {
            Phase::Backward
        };
        chip.phase(phase, || {
            let settled = self
                .settled
                .take()
                .unwrap_or_else(|| self.settle(chip, gradients));
            if settled.first().is_some_and(Option::is_some) {
                self.run(chip, gradients, pass, &settled);
            }
            if pass == Pass::Inputs {
                self.settled = Some(settled);
            } else {
                // Saved tensors go before the node does: their bytes belong to this node's share of the trace.
                self.inputs.clear();
                self.outputs.clear();
            }
        });
        chip.recorder().leave();
    }

    fn settle(&self, chip: &Chip, gradients: &mut Gradients) -> Vec<Option<Tensor>> {
        let one = |out: &Outcome| {
            let contributions = gradients.take(out.tracked.value?);
            chip.settle(
                contributions,
                &out.placements.gradient(),
                &out.global,
                self.site,
            )
        };
        self.outputs.iter().map(one).collect()
    }

    fn run(
        &mut self,
        chip: &Chip,
        gradients: &mut Gradients,
        pass: Pass,
        settled: &[Option<Tensor>],
    ) {
        let wants = |x: &Operand| {
            x.differentiable
                && match pass {
                    Pass::Both => true,
                    Pass::Inputs => !x.tracked.weight,
                    Pass::Weights => x.tracked.weight,
                }
        };
        let wanted: Vec<bool> = self.inputs.iter().map(wants).collect();
        if self.op.passes_gradient() {
            let dy = settled[0]
                .as_ref()
                .expect("the first result has a gradient");
            for (x, _) in self.inputs.iter().zip(&wanted).filter(|(_, w)| **w) {
                let cast = chip.gradient_as(dy, x.tracked.gradient, &x.gradient, self.site);
                chip.contribute(gradients, &x.tracked, x.gradient.clone(), cast, self.site);
            }
            return;
        }
        for x in &mut self.inputs {
            x.saved = x
                .regather
                .as_ref()
                .map(|g| g.again(chip))
                .or(x.saved.take());
        }
        let (mut slots, before) = self.slots(chip, gradients, &wanted, pass);
        let began = chip.now();
        if chip.is_ghost() {
            self.trace(settled, &slots);
        } else {
            self.compute(chip, settled, &mut slots);
        }
        for x in self.inputs.iter_mut().filter(|x| x.regather.is_some()) {
            x.saved = None;
        }
        self.tell(chip, settled, &slots, &wanted, began);
        for ((x, slot), before) in self.inputs.iter().zip(slots).zip(before) {
            let Some(slot) = slot else { continue };
            let tensor = match before {
                Some(sum) => chip.accumulate(sum, slot.tensor, &x.gradient, self.site),
                None => slot.tensor,
            };
            // Not put but added: an op may have been given the same value twice.
            chip.contribute(gradients, &x.tracked, x.gradient.clone(), tensor, self.site);
        }
    }

    /// A place for each wanted gradient, and the sums that are to be added afterwards.
    #[allow(clippy::type_complexity)]
    fn slots(
        &mut self,
        chip: &Chip,
        gradients: &mut Gradients,
        wanted: &[bool],
        pass: Pass,
    ) -> (Vec<Option<Gradient>>, Vec<Option<Tensor>>) {
        let mut slots = Vec::new();
        let mut before = Vec::new();
        for (i, x) in self.inputs.iter_mut().enumerate() {
            if !wanted[i] {
                slots.push(None);
                before.push(None);
                continue;
            }
            let held = chip.take_accumulator(gradients, &x.tracked, &x.gradient);
            let ty = TensorType::new(x.ty.shape.clone(), x.tracked.gradient);
            let adds = self.op.accumulates(i) && held.as_ref().is_some_and(Tensor::is_unique);
            let reuses = self.op.reuses() == Some(i)
                && pass == Pass::Both
                && x.saved
                    .as_ref()
                    .is_some_and(|s| s.is_unique() && *s.ty() == ty);
            let (tensor, accum) = match (adds, reuses) {
                (true, _) => (
                    held.clone().expect("there is something to add to"),
                    Accum::Add,
                ),
                (false, true) => (
                    x.saved.take().expect("the operand was saved"),
                    Accum::Replace,
                ),
                (false, false) => (chip.allocate(&ty), Accum::Replace),
            };
            before.push(held.filter(|_| !adds));
            slots.push(Some(Gradient {
                tensor,
                accum,
                reused: reuses && !adds,
            }));
        }
        (slots, before)
    }

    /// Notes, in a ghost, what [`Applied::compute`] reads and writes.
    fn trace(&self, settled: &[Option<Tensor>], slots: &[Option<Gradient>]) {
        let saved_in = self.inputs.iter().filter_map(|x| x.saved.as_ref());
        let saved_out = self.outputs.iter().filter_map(|x| x.saved.as_ref());
        let reads = saved_in.chain(saved_out).chain(settled.iter().flatten());
        device::only_traced(reads, slots.iter().flatten().map(|slot| &slot.tensor));
    }

    fn compute(&self, chip: &Chip, settled: &[Option<Tensor>], slots: &mut [Option<Gradient>]) {
        let local = |global: &[usize], dtype: DType, p: &Placements| {
            chip.local(global, dtype, p, self.site)
        };
        let inputs: Vec<Local> = self
            .inputs
            .iter()
            .map(|x| local(&x.global, x.ty.dtype, &x.placements))
            .collect();
        let outputs: Vec<Local> = self
            .outputs
            .iter()
            .map(|x| local(&x.global, x.ty.dtype, &x.placements))
            .collect();
        let saved_in: Vec<Option<Tensor>> = self.inputs.iter().map(|x| x.saved.clone()).collect();
        let saved_out: Vec<Option<Tensor>> = self.outputs.iter().map(|x| x.saved.clone()).collect();
        let site = Site {
            inputs: &inputs,
            outputs: &outputs,
            seed: chip.seed(),
        };
        device::backward(
            &*self.op,
            &site,
            &mut Backward {
                inputs: &saved_in,
                outputs: &saved_out,
                gradients: settled,
                wanted: slots,
            },
        );
    }

    fn tell(
        &self,
        chip: &Chip,
        settled: &[Option<Tensor>],
        slots: &[Option<Gradient>],
        wanted: &[bool],
        began: Option<u64>,
    ) {
        let types = |ty: &TensorType| ty.clone();
        let local_in: Vec<TensorType> = self.inputs.iter().map(|x| types(&x.ty)).collect();
        let local_out: Vec<TensorType> = self.outputs.iter().map(|x| types(&x.ty)).collect();
        let dy = settled.iter().zip(&self.outputs).filter_map(|(t, x)| {
            let ty = t.as_ref()?.ty().clone();
            Some(Value {
                ty,
                placement: x.placements.gradient(),
            })
        });
        let dx = slots.iter().zip(&self.inputs).filter_map(|(s, x)| {
            let ty = s.as_ref()?.tensor.ty().clone();
            Some(Value {
                ty,
                placement: x.gradient.clone(),
            })
        });
        chip.tell(Told {
            kind: EventKind::Op,
            op: format!("{}.backward", self.op.name()).into(),
            site: self.site,
            inputs: dy.collect(),
            outputs: dx.collect(),
            cost: self.op.backward_cost(&local_in, &local_out, wanted),
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
    }
}

impl Chip {
    /// A gradient in the type that its value's gradients have.
    pub(super) fn gradient_as(
        &self,
        dy: &Tensor,
        dtype: DType,
        p: &Placements,
        site: &'static Location<'static>,
    ) -> Tensor {
        if dy.dtype() == dtype {
            return dy.clone();
        }
        let began = self.now();
        let ty = TensorType::new(dy.shape(), dtype);
        let mut cast = self.allocate(&ty);
        device::cast(dy, &mut cast);
        let value = |ty: &TensorType| Value {
            ty: ty.clone(),
            placement: p.clone(),
        };
        self.tell(Told {
            kind: EventKind::Op,
            op: "cast.backward".into(),
            site,
            inputs: vec![value(dy.ty())],
            outputs: vec![value(&ty)],
            cost: Cost {
                flops: 0,
                bytes: dy.ty().bytes() + ty.bytes(),
                scratch: 0,
            },
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
        cast
    }

    /// Puts a node that hands each result's contributions to the operand as they are: for values that are the same
    /// tensor seen otherwise (another placement, another shape).
    pub(super) fn record_passage(
        &self,
        from: &Sharded,
        to: &mut Sharded,
        convert: impl Fn(Placements, Tensor) -> (Placements, Tensor) + 'static,
        site: &'static Location<'static>,
    ) {
        if from.tracked.value.is_none() || self.inner().tape.borrow().is_none() {
            return;
        }
        let value: ValueId = self.new_value();
        let tracked = from.tracked;
        to.tracked = Tracked {
            value: Some(value),
            leaf: None,
            ..tracked
        };
        self.push_node(Node {
            outputs: vec![value],
            has_inputs: !tracked.weight,
            has_weights: false,
            backward: Box::new(move |chip, gradients, _| {
                for (placements, tensor) in gradients.take(value) {
                    let (placements, tensor) = convert(placements, tensor);
                    chip.contribute(gradients, &tracked, placements, tensor, site);
                }
            }),
        });
    }
}
