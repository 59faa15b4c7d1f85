//! A part of a program on a tape of its own: several may be open at once, and each runs backward when its gradient comes.
//!
//! A pipeline's stage holds one for every micro-batch and chunk that it has run forward and not yet backward. The tape keeps
//! what its nodes need; neither the operand nor the result is kept beside it.

use super::redistribute::Site;
use super::{Chip, Sharded};
use crate::dtype::{DType, TensorType};
use crate::placement::Placements;
use crate::tape::{Gradients, Tape, ValueId};
use std::panic::Location;

/// A value at the border of a segment, without its contents.
struct Border {
    value: ValueId,
    shape: Vec<usize>,
    dtype: DType,
    placements: Placements,
}

/// A part of a program that was recorded and not yet run backward.
pub struct Segment {
    tape: Tape<Chip>,
    gradients: Gradients,
    input: Option<Border>,
    output: Border,
    site: Site,
}

impl Chip {
    /// Runs `body` on a tape of its own. Its result comes back without a gradient; the segment takes that later. `input`, if
    /// there is one, is what the segment's backward gives a gradient for.
    ///
    /// # Panics
    /// If the result depends neither on `input` nor on a parameter.
    #[track_caller]
    pub fn segment(
        &self,
        input: Option<Sharded>,
        body: impl FnOnce(Option<&Sharded>) -> Sharded,
    ) -> (Sharded, Segment) {
        let site = Location::caller();
        let outer = self.inner().tape.borrow_mut().replace(Tape::default());
        let input = input.map(|x| x.variable());
        let output = body(input.as_ref());
        let tape = self.inner().tape.replace(outer);
        let border = |x: &Sharded| Border {
            value: x.tracked.value.unwrap_or_else(|| {
                panic!("segment at {site}: {x:?} depends on no parameter and on no operand")
            }),
            shape: x.global.clone(),
            dtype: x.tracked.gradient,
            placements: x.placements.clone(),
        };
        let segment = Segment {
            tape: tape.expect("the body leaves the tape that it was given"),
            gradients: Gradients::default(),
            input: input.as_ref().map(border),
            output: border(&output),
            site,
        };
        (output.detach(), segment)
    }
}

impl Segment {
    /// Runs backward. `dy` is the gradient of the result, placed as its [`Placements::gradient`]; without one the result is a
    /// loss, one number whose gradient is 1. Returns the gradient of the operand.
    ///
    /// # Panics
    /// If `dy` has another shape than the result, or is missing though the result is not one number.
    pub fn backward(mut self, chip: &Chip, dy: Option<Sharded>) -> Option<Sharded> {
        self.begin(chip, dy);
        self.tape.backward(chip, &mut self.gradients);
        chip.end_of_backward();
        self.gradient_of_input(chip)
    }

    /// As [`Segment::backward`] without the gradients of weights, which [`Segment::backward_weights`] gives later.
    ///
    /// # Panics
    /// As [`Segment::backward`].
    pub fn backward_inputs(&mut self, chip: &Chip, dy: Option<Sharded>) -> Option<Sharded> {
        self.begin(chip, dy);
        self.tape.backward_inputs(chip, &mut self.gradients);
        chip.end_of_backward();
        self.gradient_of_input(chip)
    }

    /// Runs what [`Segment::backward_inputs`] left.
    pub fn backward_weights(mut self, chip: &Chip) {
        self.tape.backward_weights(chip, &mut self.gradients);
        chip.end_of_backward();
    }

    fn begin(&mut self, chip: &Chip, dy: Option<Sharded>) {
        let (out, site) = (&self.output, self.site);
        let target = out.placements.gradient();
        let dy = dy.unwrap_or_else(|| {
            let elements: usize = out.shape.iter().product();
            assert!(
                elements == 1 && out.dtype == DType::F32,
                "the segment of {site} ends in {} {:?}, not in a loss: its backward needs a gradient",
                out.dtype,
                out.shape
            );
            let mut one = chip.allocate(&TensorType::new(out.shape.clone(), out.dtype));
            if !chip.is_ghost() {
                one.slice_mut().typed::<f32>().fill(1.0);
            }
            Sharded::unrecorded(chip, one, out.shape.clone(), target.clone())
        });
        assert!(
            dy.global == out.shape && dy.placements == target && dy.dtype() == out.dtype,
            "the segment of {site} ends in {} {:?}, whose gradient is placed {target}; it was given {dy:?}",
            out.dtype,
            out.shape
        );
        self.gradients.put(out.value, target, dy.tensor);
    }

    fn gradient_of_input(&mut self, chip: &Chip) -> Option<Sharded> {
        let input = self.input.as_ref()?;
        let contributions = self.gradients.take(input.value);
        let target = input.placements.gradient();
        let tensor = chip.settle(contributions, &target, &input.shape, self.site)?;
        Some(Sharded::unrecorded(
            chip,
            tensor,
            input.shape.clone(),
            target,
        ))
    }
}
