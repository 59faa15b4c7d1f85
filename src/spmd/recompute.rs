//! The tape of a chip: recording, running backward, and blocks that are computed again instead of kept.
//!
//! A recomputed block keeps its operands only. Its backward runs the block again on a tape of its own, and that tape
//! backward; parameters are found by name, so a block holds no copy of them (Chen et al., arXiv:1604.06174).

use super::{Chip, Sharded};
use crate::dtype::DType;
use crate::placement::Placements;
use crate::tape::{Gradients, Node, Pass, Tape};
use crate::tensor::{Tensor, TensorType};
use crate::trace::Phase;
use std::panic::Location;
use std::rc::Rc;

impl Chip {
    /// Runs `body` with recording on: what it computes from parameters and variables can be differentiated afterwards.
    pub fn record<T>(&self, body: impl FnOnce() -> T) -> T {
        *self.inner().tape.borrow_mut() = Some(Tape::default());
        body()
    }

    /// Ends recording and drops what was recorded.
    pub fn stop_recording(&self) {
        *self.inner().tape.borrow_mut() = None;
    }

    #[track_caller]
    pub(super) fn backward(&self, loss: &Sharded) {
        let (mut tape, mut gradients) = self.begin_backward(loss, Location::caller());
        tape.backward(self, &mut gradients);
        self.end_of_backward();
        *self.inner().gradients.borrow_mut() = gradients;
    }

    /// As [`Sharded::backward`], but leaves the gradients of weights for [`Chip::backward_weights`].
    #[track_caller]
    pub fn backward_inputs(&self, loss: &Sharded) {
        let (mut tape, mut gradients) = self.begin_backward(loss, Location::caller());
        tape.backward_inputs(self, &mut gradients);
        self.end_of_backward();
        *self.inner().gradients.borrow_mut() = gradients;
        *self.inner().tape.borrow_mut() = Some(tape);
    }

    /// Computes the gradients of weights that [`Chip::backward_inputs`] left.
    pub fn backward_weights(&self) {
        let Some(mut tape) = self.inner().tape.borrow_mut().take() else {
            return;
        };
        let mut gradients = self.inner().gradients.take();
        tape.backward_weights(self, &mut gradients);
        self.end_of_backward();
        *self.inner().gradients.borrow_mut() = gradients;
    }

    fn begin_backward(
        &self,
        loss: &Sharded,
        site: &'static Location<'static>,
    ) -> (Tape<Chip>, Gradients) {
        let tape = self.inner().tape.borrow_mut().take();
        let tape = tape.unwrap_or_else(|| {
            panic!("backward at {site}: nothing was recorded; compute the loss inside Chip::record")
        });
        let value = loss.tracked.value.unwrap_or_else(|| {
            panic!("backward at {site}: {loss:?} does not depend on any parameter or variable that was recorded")
        });
        assert_eq!(
            loss.tensor.elements(),
            1,
            "backward at {site} starts from one number, not from {loss:?}"
        );
        let mut one = self.allocate(&TensorType::new(loss.tensor.shape(), loss.tracked.gradient));
        if !self.is_ghost() {
            assert_eq!(
                one.dtype(),
                DType::F32,
                "backward at {site}: a loss is in f32, this one is {}",
                one.dtype()
            );
            one.slice_mut().typed::<f32>().fill(1.0);
        }
        let mut gradients = Gradients::default();
        gradients.put(value, loss.placements.gradient(), one);
        (tape, gradients)
    }

    /// The gradient of a [`Sharded::variable`] after a backward, placed as the variable is; none if it has none.
    #[track_caller]
    pub fn take_gradient(&self, variable: &Sharded) -> Option<Sharded> {
        let site = Location::caller();
        let contributions = self
            .inner()
            .gradients
            .borrow_mut()
            .take(variable.tracked.value?);
        let target = variable.placements.gradient();
        let tensor = self.settle(contributions, &target, &variable.global, site)?;
        Some(Sharded::unrecorded(
            self,
            tensor,
            variable.global.clone(),
            target,
        ))
    }

    /// Runs a block of the program whose intermediate values are not kept: its backward computes them again.
    ///
    /// `block` must give the same results each time for the same operands.
    #[track_caller]
    pub fn recompute(
        &self,
        inputs: &[&Sharded],
        block: impl Fn(&Chip, &[Sharded]) -> Vec<Sharded> + 'static,
    ) -> Vec<Sharded> {
        let site = Location::caller();
        let tape = self.inner().tape.borrow_mut().take();
        let operands: Vec<Sharded> = inputs.iter().map(|x| (*x).clone()).collect();
        let mut outputs = block(self, &operands);
        let Some(tape) = tape else { return outputs };
        *self.inner().tape.borrow_mut() = Some(tape);
        for output in &mut outputs {
            if output.dtype().is_float() {
                *output = output.detach().variable();
            }
        }
        let mut again = Again {
            scope: self.recorder().scope(),
            inputs: operands,
            outputs: outputs
                .iter()
                .map(|o| (o.tracked.value, o.global.clone(), o.placements.clone()))
                .collect(),
            block: Rc::new(block),
            deferred: None,
            site,
        };
        self.push_node(Node {
            outputs: outputs.iter().filter_map(|o| o.tracked.value).collect(),
            has_inputs: true,
            has_weights: true,
            backward: Box::new(move |chip, gradients, pass| again.backward(chip, gradients, pass)),
        });
        outputs
    }
}

type Block = dyn Fn(&Chip, &[Sharded]) -> Vec<Sharded>;

/// A block that runs again.
struct Again {
    scope: u32,
    inputs: Vec<Sharded>,
    outputs: Vec<(Option<crate::tape::ValueId>, Vec<usize>, Placements)>,
    block: Rc<Block>,
    deferred: Option<(Tape<Chip>, Gradients, Vec<Sharded>)>,
    site: &'static Location<'static>,
}

impl Again {
    fn backward(&mut self, chip: &Chip, gradients: &mut Gradients, pass: Pass) {
        if pass == Pass::Weights {
            if let Some((mut tape, mut inner, variables)) = self.deferred.take() {
                tape.backward_weights(chip, &mut inner);
                self.hand_over(chip, gradients, &mut inner, &variables);
                self.inputs.clear();
            }
            return;
        }
        let settled: Vec<Option<Tensor>> = self
            .outputs
            .iter()
            .map(|(value, global, p)| {
                chip.settle(gradients.take((*value)?), &p.gradient(), global, self.site)
            })
            .collect();
        let (mut tape, mut inner, variables) = self.run_again(chip, settled);
        match pass {
            Pass::Inputs => {
                tape.backward_inputs(chip, &mut inner);
            }
            _ => tape.backward(chip, &mut inner),
        }
        self.hand_over(chip, gradients, &mut inner, &variables);
        if pass == Pass::Inputs {
            self.deferred = Some((tape, inner, variables));
        } else {
            self.inputs.clear();
        }
    }

    /// Hands the gradients that the block's operands have got to the outer tape: those of weights that came in as
    /// operands arrive in the second pass.
    fn hand_over(
        &self,
        chip: &Chip,
        gradients: &mut Gradients,
        inner: &mut Gradients,
        variables: &[Sharded],
    ) {
        for (x, variable) in self.inputs.iter().zip(variables) {
            // A parameter that came in as an operand got its gradient from the inner tape directly.
            let Some(value) = variable
                .tracked
                .value
                .filter(|_| x.tracked.value.is_some() && x.tracked.leaf.is_none())
            else {
                continue;
            };
            for (p, tensor) in inner.take(value) {
                chip.contribute(gradients, &x.tracked, p, tensor, self.site);
            }
        }
    }

    fn run_again(
        &self,
        chip: &Chip,
        settled: Vec<Option<Tensor>>,
    ) -> (Tape<Chip>, Gradients, Vec<Sharded>) {
        let fresh = |x: &Sharded| match (x.tracked.value, x.tracked.leaf) {
            (Some(_), None) => Sharded {
                tracked: super::sharded::Tracked {
                    value: Some(chip.new_value()),
                    ..x.tracked
                },
                ..x.clone()
            },
            _ => x.clone(),
        };
        let variables: Vec<Sharded> = self.inputs.iter().map(fresh).collect();
        let outer = chip.inner().tape.borrow_mut().replace(Tape::default());
        chip.recorder().enter_scope(self.scope);
        let results = chip.phase(Phase::Recompute, || (self.block)(chip, &variables));
        chip.recorder().leave();
        let tape = chip
            .inner()
            .tape
            .replace(outer)
            .expect("the block leaves the tape that it was given");
        let mut inner = Gradients::default();
        for (result, dy) in results.iter().zip(settled) {
            if let (Some(value), Some(dy)) = (result.tracked.value, dy) {
                inner.put(value, result.placements.gradient(), dy);
            }
        }
        (tape, inner, variables)
    }
}
