//! ZeRO: what an optimizer needs is split over the chips that split the batch (Rajbhandari et al., arXiv:1910.02054).
//!
//! Along one mesh axis every chip uses the same parameters for different rows, so each need not keep all of them. With P
//! chips along the axis, elements psi, and Adam in f32, a chip keeps
//!
//! | stage | parameters | gradients | state | sent per chip and step |
//! |---|---|---|---|---|
//! | 0 | 4 psi | 4 psi | 8 psi | all-reduce of gradients: 2 S (P-1)/P |
//! | 1 | 4 psi | 4 psi | 8 psi / P | reduce-scatter of gradients, all-gather of parameters: 2 S (P-1)/P |
//! | 2 | 4 psi | 4 psi / P | 8 psi / P | the same, with a reduce-scatter for each use and micro-batch |
//! | 3 (FSDP) | 4 psi / P | 4 psi / P | 8 psi / P | also all-gathers where parameters are used, forward and again backward: 3 S (P-1)/P |
//!
//! bytes, with S = 4 psi. A parameter is cut along its first dimension that the chips divide and that no other axis cuts;
//! failing that along its longest free one. A vector that a later axis of the mesh already cuts stays whole: cutting it
//! along the earlier axis would interleave the pieces (see `placement`).
//!
//! Stage 3 gathers a parameter where the program asks for it, in the type in which it is used, and an op that needs it again
//! in the backward keeps its share and gathers once more. A block that is being recomputed keeps what it has just gathered.

use super::sharded::Tracked;
use super::{Chip, Sharded};
use crate::error::{Error, ErrorKind, Result};
use crate::placement::Placement::{Replicate, Shard};
use crate::placement::Placements;
use crate::tape::{Gradients, Node, Pass};
use crate::tensor::Tensor;
use crate::trace::Phase;
use std::cell::{Cell, RefCell};
use std::panic::Location;
use std::rc::Rc;

/// How much of what belongs to a parameter is split along an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Zero {
    /// Nothing: stage 0.
    #[default]
    Nothing,
    /// Optimizer state: stage 1.
    State,
    /// State and gradients: stage 2.
    Gradients,
    /// State, gradients and the parameters themselves: stage 3, fully sharded data parallel.
    Parameters,
}

impl Zero {
    /// The stage of this number.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for numbers above 3.
    pub fn stage(number: usize) -> Result<Self> {
        match number {
            0 => Ok(Zero::Nothing),
            1 => Ok(Zero::State),
            2 => Ok(Zero::Gradients),
            3 => Ok(Zero::Parameters),
            _ => Err(Error::new(
                ErrorKind::Input,
                format!("ZeRO has stages 0 to 3, not {number}; 3 splits the most"),
            )),
        }
    }
}

/// A parameter that was gathered to be used, and the share to gather it from again.
#[derive(Debug)]
pub(super) struct Gathered {
    name: Rc<str>,
    /// The same parameter of the block whose backward comes next.
    next: Option<String>,
    shard: Tensor,
    global: Vec<usize>,
    from: Placements,
    to: Placements,
    /// False if no tape recorded the gathering: no gradient would find its way back.
    pub recorded: bool,
    pub site: &'static Location<'static>,
    /// Ops that need it in the backward, how many of them have had it, and the whole for those that come.
    users: Cell<u32>,
    served: Cell<u32>,
    kept: RefCell<Option<Tensor>>,
}

impl Gathered {
    /// One more op will ask for it in each pass of the backward.
    pub(super) fn add_user(&self) {
        self.users.set(self.users.get() + 1);
    }

    /// Gathered for the backward of an op, once for all that need it: the chunks of one product.
    pub(super) fn again(&self, chip: &Chip) -> Tensor {
        let whole = self.kept.take().unwrap_or_else(|| self.gather_again(chip));
        self.served.set(self.served.get() + 1);
        if !self.served.get().is_multiple_of(self.users.get()) {
            self.kept.replace(Some(whole.clone()));
        }
        whole
    }

    fn gather_again(&self, chip: &Chip) -> Tensor {
        let whole = chip
            .gathered_ahead(&self.name, self.site)
            .unwrap_or_else(|| {
                let shard = self.shard.clone();
                let (from, to) = (&self.from, &self.to);
                chip.move_tensor(shard, &self.global, from, to, "gather", self.site)
            });
        if let Some(next) = &self.next {
            chip.gather_ahead(next, self.shard.dtype(), &self.to, self.site);
        }
        whole
    }
}

impl Chip {
    /// From here on splits what belongs to each parameter along `axis`, as far as `stage` says. An axis of one chip, or
    /// one that the mesh lacks, splits nothing.
    ///
    /// With stage 3, [`Chip::parameter`] gathers: ask for parameters inside [`Chip::record`], where they are used.
    ///
    /// # Panics
    /// If a parameter was used before, or the axis has uneven shares.
    #[track_caller]
    pub fn split_parameters(&self, stage: Zero, axis: &str) {
        assert!(
            self.parameters().is_empty(),
            "parameters are split over '{axis}' before the first of them is used, not after {}",
            self.parameters().len()
        );
        let splits = stage != Zero::Nothing && self.size_of(axis) > 1;
        if splits {
            self.equal_shares(axis, "split_parameters", Location::caller());
        }
        let zero = splits.then(|| (stage, self.mesh().axis_index(axis)));
        self.inner().zero.set(zero);
    }

    /// True if parameters are split, and gathered where they are used: stage 3.
    pub(crate) fn gathers_parameters(&self) -> bool {
        matches!(self.inner().zero.get(), Some((Zero::Parameters, _)))
    }

    /// Where a parameter lies, and its settled gradient and state, if the program uses it as `used`.
    pub(super) fn zero_placements(
        &self,
        shape: &[usize],
        used: &Placements,
    ) -> (Placements, Placements) {
        let Some((stage, axis)) = self.inner().zero.get() else {
            return (used.clone(), used.clone());
        };
        let kept = self.cut_along(axis, shape, used);
        match stage {
            Zero::Parameters => (kept.clone(), kept),
            _ => (used.clone(), kept),
        }
    }

    fn cut_along(&self, axis: usize, shape: &[usize], used: &Placements) -> Placements {
        let size = |axis: usize| self.mesh().axes()[axis].size();
        if used[axis] != Replicate {
            return used.clone();
        }
        let chips = |dim: usize| size(axis) * used.axes_of(dim).map(size).product::<usize>();
        let nests = |dim: &usize| used.axes_of(*dim).all(|other| other < axis);
        let even = |dim: &usize| shape[*dim].is_multiple_of(chips(*dim));
        let free = |dim: &usize| used.axes_of(*dim).next().is_none();
        let long = |dim: &usize| shape[*dim] >= chips(*dim);
        let dims = || (0..shape.len()).filter(nests).filter(long);
        let dim = dims()
            .filter(free)
            .find(even)
            .or_else(|| dims().find(even))
            .or_else(|| dims().filter(free).max_by_key(|dim| shape[*dim]));
        dim.map_or_else(|| used.clone(), |dim| used.with(axis, Shard(dim)))
    }

    /// A parameter, or its cast, as the program uses it: gathered if it is split, with gradients that are reduced on
    /// their way back if those are.
    ///
    /// `x` is `leaf` in the type in which it is used. Gradients of both are in f32, so those of `x` go to the leaf at once.
    pub(super) fn as_used(
        &self,
        (name, leaf): (&Rc<str>, Tracked),
        x: Sharded,
        used: &Placements,
        kept: &Placements,
        site: &'static Location<'static>,
    ) -> Sharded {
        let Some((stage, axis)) = self.inner().zero.get() else {
            return x;
        };
        if kept == used || stage < Zero::Gradients {
            return x;
        }
        if stage == Zero::Gradients {
            let mut whole = x.detach();
            self.reduce_on_the_way_back(leaf, &x, &mut whole, (axis, kept), site);
            // Outside of a tape the parameter itself can still be used on one, reduced at the end.
            return if whole.tracked.value.is_some() {
                whole
            } else {
                x
            };
        }
        let what = "gather of a parameter";
        let tensor = self.gathered_ahead(name, site).unwrap_or_else(|| {
            self.move_tensor(x.tensor.clone(), &x.global, &x.placements, used, what, site)
        });
        let mut whole = Sharded::unrecorded(self, tensor, x.global.clone(), used.clone());
        self.reduce_on_the_way_back(leaf, &x, &mut whole, (axis, kept), site);
        whole.gathered = Some(Rc::new(Gathered {
            name: name.clone(),
            next: self.next_backward(name),
            recorded: whole.tracked.value.is_some(),
            shard: x.tensor,
            global: x.global,
            from: x.placements,
            to: used.clone(),
            site,
            users: Cell::new(0),
            served: Cell::new(0),
            kept: RefCell::new(None),
        }));
        whole
    }

    /// Puts a node on the tape that reduces the contributions to the gradient of `to` over one axis at once, and hands the
    /// pieces to `from`. Sums over other axes stay owed until the end of the step.
    fn reduce_on_the_way_back(
        &self,
        leaf: Tracked,
        from: &Sharded,
        to: &mut Sharded,
        (axis, kept): (usize, &Placements),
        site: &'static Location<'static>,
    ) {
        if from.tracked.value.is_none() || self.inner().tape.borrow().is_none() {
            return;
        }
        let value = self.new_value();
        let tracked = from.tracked;
        to.tracked = Tracked {
            value: Some(value),
            leaf: None,
            ..tracked
        };
        let (global, piece) = (from.global.clone(), kept[axis]);
        let scope = self.recorder().scope();
        let reduce = move |chip: &Chip, gradients: &mut Gradients| {
            for (placements, tensor) in gradients.take(value) {
                let target = placements.with(axis, piece);
                chip.reduce_beside(tensor, &global, (placements, target), leaf, site);
            }
        };
        self.push_node(Node {
            outputs: vec![value],
            has_inputs: false,
            has_weights: true,
            backward: Box::new(move |chip, gradients, pass| {
                let phase = match pass {
                    Pass::Weights => Phase::Weight,
                    _ => Phase::Backward,
                };
                chip.recorder().enter_scope(scope);
                chip.phase(phase, || reduce(chip, gradients));
                chip.recorder().leave();
            }),
        });
    }

    /// Changes a parameter's share that has a piece of its gradient here: `change` gets it with the state. If the
    /// parameter is whole on every chip, the others' pieces are gathered behind it. `change` runs in a ghost too.
    #[track_caller]
    pub(crate) fn change_kept(
        &self,
        index: usize,
        change: impl FnOnce(&mut Tensor, &mut [Tensor]),
    ) {
        let site = Location::caller();
        let (global, used, kept) = {
            let p = &self.parameters()[index];
            (p.padded.clone(), p.placements.clone(), p.kept.clone())
        };
        let decides = self.decides(&kept);
        let change = |value: &mut Tensor, state: &mut [Tensor]| {
            if decides != Some(false) {
                change(value, state);
            }
        };
        // Chips of several kinds that hold the same take it from the one that decides.
        let agreed = |x: &mut Tensor| {
            if decides.is_some() {
                *x = self.decided(x, &kept, site);
            }
        };
        let agree_on_state = || {
            let mut state = std::mem::take(&mut self.parameters_mut()[index].state);
            state.iter_mut().for_each(agreed);
            self.parameters_mut()[index].state = state;
        };
        if used == kept {
            {
                let p = &mut self.parameters_mut()[index];
                change(&mut p.value, &mut p.state);
            }
            let mut value = self.parameters()[index].value.clone();
            agreed(&mut value);
            self.parameters_mut()[index].value = value;
            return agree_on_state();
        }
        let whole = self.parameters()[index].value.clone();
        let mut piece = self.move_tensor(whole, &global, &used, &kept, "slice", site);
        change(&mut piece, &mut self.parameters_mut()[index].state);
        agreed(&mut piece);
        agree_on_state();
        // The old value goes before the new one comes: a step takes room for one.
        self.parameters_mut()[index].value = piece.clone();
        let whole = self.move_tensor(piece, &global, &kept, &used, "gather of a parameter", site);
        self.parameters_mut()[index].value = whole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::Mesh;
    use crate::placement::Transition;
    use crate::spmd::World;

    #[test]
    fn parameters_are_cut_where_no_other_axis_cuts() {
        type Case = (
            &'static str,
            &'static [usize],
            &'static [(&'static str, usize)],
            Option<usize>,
        );
        let cases: [Case; 8] = [
            ("dp=2,tp=2", &[6, 8], &[("tp", 1)], Some(0)),
            ("dp=2,tp=2", &[6, 8], &[("tp", 0)], Some(1)),
            ("dp=4", &[6, 8], &[], Some(1)),
            ("dp=4", &[6, 9], &[], Some(1)),
            ("dp=4", &[3], &[], None),
            ("dp=2,tp=2", &[8], &[("tp", 0)], None),
            ("tp=2,dp=2", &[8], &[("tp", 0)], Some(0)),
            ("tp=2,dp=2", &[6], &[("tp", 0)], None),
        ];
        for (mesh, shape, split, want) in cases {
            let mesh = Mesh::parse(mesh).expect("a mesh");
            let program = |chip: &Chip| {
                let named: Vec<_> = split
                    .iter()
                    .map(|(axis, dim)| (*axis, Shard(*dim)))
                    .collect();
                let used = chip.placed(&named);
                chip.split_parameters(Zero::State, "dp");
                let (stored, kept) = chip.zero_placements(shape, &used);
                assert_eq!(stored, used);
                let axis = chip.mesh().axis_index("dp");
                let want = want.map_or(used.clone(), |dim| used.with(axis, Shard(dim)));
                assert_eq!(kept, want, "{shape:?} on {mesh}");
                let steps =
                    crate::placement::plan(&used, &kept, shape, chip.mesh()).expect("a plan");
                let slices = |s: &(usize, Transition)| matches!(s.1, Transition::Slice { .. });
                assert!(steps.iter().all(slices), "no chip sends what it only cuts");
            };
            World::ghost(&mesh)
                .trace(program)
                .expect("a program that runs");
        }
    }
}
