//! What follows the gradients: reducing them once per parameter, and changing parameters in place.

use super::apply::Told;
use super::{Chip, Sharded};
use crate::ops::Cost;
use crate::trace::{EventKind, Phase, Stream};
use std::panic::Location;

impl Chip {
    /// Reduces every parameter's gradient to where the parameter keeps it: over the axes that split the work but not the
    /// parameter, contributions are summed, once. Parameters without a gradient are left out.
    ///
    /// Returns the indices into [`Chip::parameters`] with their gradients, which the chip no longer holds.
    #[track_caller]
    pub fn take_gradients(&self) -> Vec<(usize, Sharded)> {
        let site = Location::caller();
        let reduce = |i: usize| {
            let (contributions, target, global, name) = {
                let p = &mut self.parameters_mut()[i];
                (
                    std::mem::take(&mut p.gradient),
                    p.kept.gradient(),
                    p.padded.clone(),
                    p.name.clone(),
                )
            };
            let tensor =
                self.scope(&name, || self.settle(contributions, &target, &global, site))?;
            Some((i, Sharded::unrecorded(self, tensor, global, target)))
        };
        let count = self.parameters().len();
        self.phase(Phase::Update, || (0..count).filter_map(reduce).collect())
    }

    /// Runs a change in place as one event.
    #[track_caller]
    pub(crate) fn change(
        &self,
        op: &'static str,
        operands: &[&Sharded],
        cost: Cost,
        change: impl FnOnce(),
    ) {
        let site = Location::caller();
        self.arrive(op, site);
        let began = self.now();
        change();
        self.tell(Told {
            kind: EventKind::Op,
            op: op.into(),
            site,
            inputs: operands.iter().map(|x| x.traced()).collect(),
            outputs: Vec::new(),
            cost,
            traffic: None,
            stream: Stream::Compute,
            ticket: None,
            began,
        });
    }
}
